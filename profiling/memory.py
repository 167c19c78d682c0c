"""``fastlocal bench memory``: the peak memory and the compute of a training step, ours and the rivals', with no GPU.

Every number comes from a dry run of one step after a first one (optimizer states exist): peak live bytes from
`fastlocal.memory`, FLOPs from torch's FlopCounterMode. Rivals are plain training loops around the timm model, each with
its best settings: bf16 autocast, an optimizer without temporaries (what fused AdamW is on CUDA), LayerNorm in low
precision (timm's fast norm), non-reentrant checkpointing of every block.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastlocal.profiling.cli import ArgumentParser, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastlocal.memory import Kind, Meter

MIB = 2**20
TIMELINE_POINTS = 500
CLASSES = 10

Family = Literal["rival", "local", "exact"]


@dataclass(frozen=True)
class Setup:
    """One way to train: a line of the table.

    Attributes:
        family: ``"rival"``, an ordinary loop over the whole model; ``"local"``, LocalTrainer; ``"exact"``, LocalTrainer
            with end-to-end gradients.
        micro_batch: samples in a part; None is the whole batch.
        recompute: recompute each block in the backward (for a rival, timm's gradient checkpointing).
        tuned: what few loops do and ours does: images wait on the device as uint8 and are normalized part by part, and
            autocast keeps no copies of the weights. Otherwise all images are there in fp32, and autocast is as it is.
    """

    family: Family
    micro_batch: int | None
    recompute: bool
    modules: int = 1
    objective: str = "end-to-end"
    decoder: str = ""
    residency: str = "all"
    tuned: bool = True

    @property
    def name(self) -> str:
        if self.family == "rival":
            parts = ["E2E", "checkpointing" * self.recompute, "accumulation" * (self.micro_batch is not None)]
            return " + ".join(filter(None, parts)) + (", tuned" if self.tuned else "")
        return f"local, {self.objective}" if self.family == "local" else "exact, one module at a time"


@dataclass(frozen=True)
class Result:
    """What a setup costs: bytes on the device at the peak (and there by kind), on the host, and FLOPs of a step."""

    setup: Setup
    peak: int
    peak_by_kind: dict[Kind, int]
    host: int
    flops: int
    seconds: float
    timeline: list[tuple[int, dict[Kind, int]]]


# --- What is compared -------------------------------------------------------------------------------------------------


def rivals(batch_size: int, micro_batch: int) -> list[Setup]:
    """Plain training, + checkpointing, + accumulation, + both: at ``micro_batch`` and at the smallest that helps, 1."""
    setups = [Setup("rival", None, recompute, tuned=False) for recompute in (False, True)]
    for size in sorted({min(micro_batch, batch_size), 1}, reverse=True):
        setups += [Setup("rival", size, recompute, tuned=False) for recompute in (False, True)]
        setups += [Setup("rival", size, True)]
    return setups


def ours(modules: Sequence[int], objectives: Sequence[str], decoders: Sequence[str], micro_batch: int) -> list[Setup]:
    """The paper's setting, then one axis at a time from 4 modules: K, residency, recompute, objective, decoder."""
    base = Setup("local", micro_batch, True, 4, "feature", "linear", "module")
    four = [count for count in modules if count == 4]
    setups = [
        replace(base, modules=count, micro_batch=None, recompute=False, residency="all")
        for count in modules
        if count in (2, 4)
    ]
    setups += [replace(base, modules=count) for count in modules]
    setups += [replace(base, family="exact", objective="end-to-end", decoder="", modules=count) for count in modules]
    setups += [replace(base, micro_batch=1, modules=count) for count in modules if count == max(modules)]
    if four:
        setups += [replace(base, residency=residency) for residency in ("all", "optimizer")]
        setups += [replace(base, family="exact", objective="end-to-end", decoder="", residency="all")]
        setups += [replace(base, recompute=False)]
        setups += [
            replace(base, objective=name, decoder="linear" if name == "image" else "")
            for name in objectives
            if name != "feature"
        ]
        setups += [replace(base, decoder=name) for name in decoders if name != "linear"]
    return list(dict.fromkeys(setups))


# --- One step of each -------------------------------------------------------------------------------------------------

Step = Callable[["Tensor", "Tensor"], object]


def measure(model: nn.Module, setup: Setup, batch_size: int) -> Result:
    """Peak memory and FLOPs of one step of ``setup``; ``model`` (on ``meta``, say) is only copied."""
    from fastlocal.memory import HOST

    start = time.perf_counter()
    meter = meter_step(model, setup, batch_size)
    # Neither the size of the parts nor where tensors wait changes what is computed.
    flops = count_flops(model, replace(setup, micro_batch=None, residency="all", tuned=False), batch_size)
    return Result(
        setup,
        peak=meter.peak,
        peak_by_kind=meter.peak_by_kind,
        host=meter.peak_by_device.get(HOST, 0),
        flops=flops,
        seconds=time.perf_counter() - start,
        timeline=meter.timeline(TIMELINE_POINTS),
    )


def meter_step(model: nn.Module, setup: Setup, batch_size: int) -> Meter:
    """The meter of one step of ``setup`` in a dry run."""
    from fastlocal import memory

    with memory.dry_run():
        copy = memory.fake_copy(model)
        step, given = _build(copy, setup)
        images, labels = _batch(model, setup, batch_size)
        step(images[:1], labels[:1])  # creates the optimizer states
        with memory.Meter(copy, *given(), images, labels) as meter:
            step(images, labels)
    return meter


@functools.cache
def count_flops(model: nn.Module, setup: Setup, batch_size: int) -> int:
    """FLOPs of one step of ``setup``: the matrix products, convolutions and attention of FlopCounterMode."""
    from fastlocal import memory
    from fastlocal.profiling.flops import count

    with memory.dry_run():
        step, _ = _build(memory.fake_copy(model), setup)
        images, labels = _batch(model, setup, batch_size)
        return count(lambda: step(images, labels))


def _build(model: nn.Module, setup: Setup) -> tuple[Step, Callable[[], list[Any]]]:
    """The training step of ``setup``, and what holds its state besides the model."""
    import torch

    if setup.family == "rival":
        return _rival(model, setup)
    from fastlocal import LocalTrainer

    trainer = LocalTrainer(
        model,
        modules=setup.modules,
        objective=setup.objective,
        decoder=setup.decoder or "linear",
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-4, weight_decay=0.05),
        micro_batch=setup.micro_batch,
        recompute="block" if setup.recompute else "none",
        residency=setup.residency,  # type: ignore[arg-type]
        amp_dtype=torch.bfloat16,
    )
    parts = trainer.engine.parts
    trainer.engine.parts = lambda batch: representative(parts(batch))  # type: ignore[method-assign]
    return trainer.step, lambda: [*trainer.modules, *trainer.optimizers]


def _rival(model: nn.Module, setup: Setup) -> tuple[Step, Callable[[], list[Any]]]:
    import torch
    from torch.nn.functional import cross_entropy

    model.train()
    if setup.recompute:
        model.set_grad_checkpointing()  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    mean = torch.tensor([123.7, 116.3, 103.5]).view(-1, 1, 1)

    def step(images: Tensor, labels: Tensor) -> None:
        size = setup.micro_batch or len(images)
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        for part in representative(parts):
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=not setup.tuned):
                inputs = images[part].float().sub_(mean).div_(58) if setup.tuned else images[part]
                loss = cross_entropy(model(inputs), labels[part]) / len(parts)
                del inputs
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: [optimizer]


def representative(parts: list[slice]) -> list[slice]:
    """The parts whose memory differs: the first, which makes the gradients, the second, which adds to them, and the
    last.

    All others are like the second, so a dry run over these finds the same peak, in a fraction of the time.
    """
    return [*parts[:2], *parts[2:][-1:]]


def _batch(model: nn.Module, setup: Setup, batch_size: int) -> tuple[Tensor, Tensor]:
    import torch

    channels, height, width = model.pretrained_cfg["input_size"]  # type: ignore[index]
    if (embedding := getattr(model, "patch_embed", None)) is not None and embedding.img_size is not None:
        height, width = embedding.img_size
    dtype = torch.uint8 if setup.tuned else torch.float32
    return torch.empty(batch_size, channels, height, width, dtype=dtype), torch.zeros(batch_size, dtype=torch.long)


# --- Reporting --------------------------------------------------------------------------------------------------------


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as rows of a table; compute and memory relative to the first, plain end-to-end training."""
    plain = results[0]
    return [
        {
            "set-up": result.setup.name,
            "modules": result.setup.modules if result.setup.family != "rival" else None,
            "decoder": result.setup.decoder,
            "micro-batch": result.setup.micro_batch,
            "recompute": result.setup.recompute,
            "residency": result.setup.residency,
            "peak MiB": round(result.peak / MIB, 1),
            "vs E2E": round(result.peak / plain.peak, 3),
            "host MiB": round(result.host / MIB, 1),
            "compute": round(result.flops / plain.flops, 3),
        }
        for result in results
    ]


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="fastlocal bench memory", description=__doc__)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224", help="any timm model (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--image-size", type=int, help="pixels; the model's own if not given")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples in a part (%(default)s)")
    parser.add_argument("--modules", type=int, nargs="+", default=[*range(1, 9)], metavar="K", help="(1 to 8)")
    names = ["feature", "image", "cross-entropy", "transport"]
    parser.add_argument("--objectives", nargs="+", default=names, choices=names, help="(all)")
    names = ["linear", "mlp", "conv", "transformer"]
    parser.add_argument("--decoders", nargs="+", default=names, choices=names, help="(all)")
    parser.add_argument("--output", type=Path, default=Path("profiling/results"), help="folder (%(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("batch_size", "micro_batch", "image_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")

    model = _model(arguments.model, arguments.image_size)
    setups = rivals(arguments.batch_size, arguments.micro_batch)
    setups += ours(_possible(model, arguments.modules), arguments.objectives, arguments.decoders, arguments.micro_batch)
    folder = arguments.output / "memory"
    stem = f"{arguments.model}-{arguments.batch_size}"
    results = list(_measure_all(model, setups, arguments, folder / f"{stem}.jsonl"))

    from fastlocal.profiling.results import markdown_table

    title = f"# Peak memory of a training step: {arguments.model}, batch {arguments.batch_size}"
    note = (
        f"Dry run, bf16 autocast, AdamW with fp32 states. The fp32 images of the rivals take "
        f"{results[0].peak_by_kind['inputs'] / MIB:.1f} MiB of their peaks; tuned rivals keep uint8 images and no "
        "autocast weight cache, as ours do. `compute`: FLOPs of a step relative to E2E."
    )
    table = markdown_table(rows(results))
    (folder / f"{stem}.md").write_text(f"{title}\n\n{note}\n\n{table}\n")
    print(f"\n{table}")
    plot_timelines(_telling(results), folder / f"{stem}-timeline")
    plot_pareto(results, folder / f"{stem}-pareto")
    print(f"\nWritten to {folder}/{stem}*")
    return 0


def _model(name: str, image_size: int | None) -> nn.Module:
    import timm
    import torch

    if not timm.is_model(name):
        raise UserError(f"--model must be a timm model, got {name!r}; `timm.list_models()` lists them.")
    options: dict[str, Any] = {"img_size": image_size} if image_size else {}
    with torch.device("meta"):
        return timm.create_model(name, num_classes=CLASSES, **options)


def _possible(model: nn.Module, modules: Sequence[int]) -> list[int]:
    from fastlocal.backbone import backbone

    try:
        blocks = len(backbone(model).blocks)
    except ValueError as error:
        raise UserError(str(error)) from None
    return [count for count in modules if 1 <= count <= blocks]


def _measure_all(model: nn.Module, setups: Sequence[Setup], arguments: Any, path: Path) -> Iterator[Result]:
    from fastlocal.profiling.results import append_row

    for setup in setups:
        result = measure(model, setup, arguments.batch_size)
        append_row(
            path,
            {
                "model": arguments.model,
                "batch_size": arguments.batch_size,
                **asdict(setup),
                "name": setup.name,
                "peak_bytes": result.peak,
                "peak_by_kind": result.peak_by_kind,
                "host_bytes": result.host,
                "flops": result.flops,
                "seconds": round(result.seconds, 1),
            },
        )
        print(f"{result.peak / MIB:8.1f} MiB  {_label(setup)}  ({result.seconds:.0f} s)", flush=True)
        yield result


def _label(setup: Setup) -> str:
    modules = f", K={setup.modules}" if setup.family != "rival" else ""
    parts = f", parts of {setup.micro_batch}" if setup.micro_batch is not None else ""
    return f"{setup.name}{modules}{parts}"


def _telling(results: Sequence[Result]) -> list[Result]:
    """Six set-ups: plain, with checkpointing, the best rival, the paper's, our best exact and local ones."""
    by_family: dict[Family, list[Result]] = {
        family: [result for result in results if result.setup.family == family]
        for family in ("rival", "local", "exact")
    }
    chosen = by_family["rival"][:2]
    chosen += [min(by_family["rival"], key=lambda result: result.peak)]
    chosen += [result for result in by_family["local"] if result.setup.micro_batch is None][-1:]
    chosen += [min(group, key=lambda r: r.peak) for group in (by_family["exact"], by_family["local"]) if group]
    return list({result.setup: result for result in chosen}.values())


# Okabe and Ito's colours, which the colour-blind tell apart.
_KIND_COLOURS: dict[Kind, str] = {
    "parameters": "#0072B2",
    "optimizer": "#56B4E9",
    "gradients": "#009E73",
    "inputs": "#999999",
    "boundary": "#CC79A7",
    "graph": "#D55E00",
    "temporary": "#F0E442",
}
_FAMILY_MARKS: dict[Family, tuple[str, str, str]] = {
    "rival": ("#555555", "s", "end-to-end rivals"),
    "exact": ("#0072B2", "^", "fastlocal, exact gradients"),
    "local": ("#D55E00", "o", "fastlocal, local learning"),
}


def plot_timelines(results: Sequence[Result], path: Path) -> None:
    """Live bytes by kind over one step of each set-up, stacked: ``path``.png and .svg."""
    pyplot = _pyplot()
    columns = 2
    lines = -(-len(results) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(11, 2.7 * lines), squeeze=False, layout="constrained")
    for axes in grid.flat[len(results) :]:
        axes.set_visible(False)
    for axes, result in zip(grid.flat, results, strict=False):
        last = max(result.timeline[-1][0], 1)
        progress = [100 * index / last for index, _ in result.timeline]
        layers = [[state[kind] / MIB for _, state in result.timeline] for kind in _KIND_COLOURS]
        axes.stackplot(progress, layers, colors=list(_KIND_COLOURS.values()), labels=list(_KIND_COLOURS), linewidth=0)
        axes.set_title(f"{_label(result.setup)}: {result.peak / MIB:,.0f} MiB", fontsize=10)
        axes.set_xlim(0, 100)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("live MiB")
    for axes in grid[-1]:
        axes.set_xlabel("allocations and releases of one step, % (of equal parts, three are run)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _save(figure, path)


def plot_pareto(results: Sequence[Result], path: Path) -> None:
    """Peak memory against extra compute, with the front of each family: ``path``.png and .svg."""
    pyplot = _pyplot()
    from matplotlib.ticker import StrMethodFormatter

    plain = results[0]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for family, (colour, mark, label) in _FAMILY_MARKS.items():
        points = sorted(
            (
                (100 * (result.flops / plain.flops - 1), result.peak / MIB, result.setup)
                for result in results
                if result.setup.family == family
            ),
            key=lambda point: point[:2],
        )
        if not points:
            continue
        axes.scatter([x for x, *_ in points], [y for _, y, _ in points], c=colour, marker=mark, label=label, alpha=0.8)
        front, lowest = [], float("inf")
        for x, y, setup in points:
            if y < 0.99 * lowest:
                lowest = y
                front.append((x, y))
                text = _label(setup) if family == "rival" else f"K={setup.modules}"
                axes.annotate(text, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7, color=colour)
        axes.step(*zip(*front, strict=True), where="post", color=colour, linewidth=1, alpha=0.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(-4, axes.get_xlim()[1] + 6)
    axes.set_xlabel("extra compute of a step over E2E, % of FLOPs")
    axes.set_ylabel("peak memory, MiB")
    axes.grid(which="both", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("the plots need matplotlib: pip install 'fastlocal[plots]'.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(path.with_name(f"{path.name}.{suffix}"), dpi=160)
    _pyplot().close(figure)
