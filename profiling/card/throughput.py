"""``fastlocal bench throughput``: images per second and peak memory of a training step, ours beside the rivals.

Each set-up takes turns with plain end-to-end training (timm as it comes, eager), so that clocks and neighbours weigh on
both alike; its speed is the median of the pairs' ratios. Steps run the whole of training: forward, backward, AdamW
(fused on CUDA), images on the device. Warm-up, compilation included, is not timed. Rivals have timm's fast norm,
torch.compile, both attention paths of timm (TIMM_FUSED_ATTN), channels-last, and non-reentrant checkpointing of blocks.
With ``--cap`` it asks instead what trains on a smaller card; see `fastlocal.profiling.card.caps`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlocal.profiling import memory, results
from fastlocal.profiling.card.campaign import Campaign
from fastlocal.profiling.cli import ArgumentParser, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MIB = 2**20
SAMPLE_SECONDS = 0.3  # a timed sample is as many steps as fill this
WARM_UP_STEPS = 3  # compiles, creates optimizer states, settles the allocator
ROUNDS = 7
TRACED_STEPS = 2
OFFLOADING = ("fsdp", "fsdp bf16", "fsdp bf16 saved", "torchao")  # of the rivals' methods, those that are timed


@dataclass(frozen=True)
class Setup(memory.Setup):
    """One way to train, as `fastlocal.profiling.memory.Setup`, and how its arithmetic runs.

    Attributes:
        compile: torch.compile, of the whole model for a rival and of each module for ours.
        cuda_graphs: of what is compiled.
        fused_attention: the value of TIMM_FUSED_ATTN that the model is built under; 1 is timm's default. At 2 Swin's
            windows go through PyTorch's fused attention, at 0 nothing does.
        channels_last: a rival's weights and images.
    """

    compile: bool = False
    cuda_graphs: bool = False
    fused_attention: int = 1
    channels_last: bool = False

    @property
    def label(self) -> str:
        """Everything that tells this set-up from another, in words."""
        ours = self.family != "rival"
        base = replace(self, tuned=False).name
        parts = [f"{base}, K={self.modules}" if ours else base]
        parts += [{"triton": "Triton kernels", "reference": "reference kernels"}[self.kernels]] if ours else []
        parts += ["torch.compile" + " with CUDA graphs" * self.cuda_graphs] if self.compile else []
        parts += [f"TIMM_FUSED_ATTN={self.fused_attention}"] if self.fused_attention != 1 else []
        parts += ["channels-last"] if self.channels_last else []
        parts += [f"parts of {self.micro_batch}"] if self.micro_batch is not None else []
        parts += ["recompute"] if ours and self.recompute else []
        parts += [f"residency {self.residency}"] if ours else []
        parts += ["boundaries on the host"] if self.boundaries == "host" else []
        parts += ["low weights"] if self.weights == "low" else []
        return ", ".join(parts)


# --- What is compared -------------------------------------------------------------------------------------------------


def baseline() -> Setup:
    """Plain end-to-end training: timm as it comes, eager."""
    return Setup("rival", None, False, tuned=False)


def rivals(model: str, micro_batch: int) -> list[Setup]:
    """Plain, compiled, checkpointing, accumulation and both, each with both attention paths of timm."""
    other = 2 if "swin" in model else 0  # what timm does by default is unfused for Swin's windows, fused for the rest
    plain = baseline()
    both = Setup("rival", micro_batch, True)
    offloading = [replace(both, method=name) for name in OFFLOADING if name != "torchao"]
    offloading += [replace(both, micro_batch=None, method="torchao")]  # it may not run between two backwards
    setups = [plain, replace(plain, channels_last=True), replace(plain, compile=True), replace(plain, recompute=True)]
    setups += [Setup("rival", micro_batch, False), both, replace(both, compile=True)]
    setups += [replace(setup, fused_attention=other) for setup in setups if not setup.channels_last]
    return [*setups, replace(plain, compile=True, cuda_graphs=True), *offloading]


def ours(modules: Sequence[int], micro_batch: int, kernels: Sequence[tuple[str, bool]]) -> list[Setup]:
    """`feature` at each K and exact gradients at the largest, by kernels and residency; then larger parts.

    Args:
        kernels: (``"reference"`` or ``"triton"``, compiled or not), the best first.
    """
    most = max(modules)
    local = [Setup("local", micro_batch, True, count, "feature", "linear", "all") for count in sorted(modules)[::-1]]
    exact = Setup("exact", micro_batch, True, most, residency="all")
    setups = [
        replace(setup, residency=residency, kernels=name, compile=compiled)
        for setup in (local[0], exact, *local[1:])
        for name, compiled in kernels
        for residency in ("module", "all")
    ]
    # More memory for more speed: the curve on which rivals of equal memory are compared.
    for setup in (replace(local[0], kernels=kernels[0][0]), replace(exact, kernels=kernels[0][0])):
        setups += [replace(setup, micro_batch=size) for size in (2 * micro_batch, 4 * micro_batch)]
        setups += [replace(setup, micro_batch=None), replace(setup, micro_batch=None, recompute=False)]
        setups += [replace(setup, micro_batch=None, residency="module")]
    # Graphs save launches, so they pay where parts are small, if at all.
    setups += [
        replace(setup, residency="all", kernels=name, compile=True, cuda_graphs=True)
        for setup in (local[0], exact)
        for name, compiled in kernels[:2]
        if compiled
    ]
    return list(dict.fromkeys(setups))


def least_memory(blocks: int, micro_batch: int, kernels: str) -> list[Setup]:
    """The README's: exact, with a module per block and all but one of them on the host; in parts of two, and larger."""
    exact = Setup(
        "exact", micro_batch, True, blocks, residency="module", boundaries="host", weights="low", kernels=kernels
    )
    return list(dict.fromkeys([exact, replace(exact, micro_batch=min(2, micro_batch))]))


def available_kernels(device: torch.device) -> list[tuple[str, bool]]:
    """What `ours` can be given on ``device``. Nothing is compiled for a CPU: that says nothing about a card."""
    from fastlocal.kernels.dispatch import why_not_triton

    if device.type != "cuda":
        return [("reference", False)]
    triton = [("triton", False), ("triton", True)] if why_not_triton(device) is None else []
    return [*triton, ("reference", False)]


# --- One set-up, ready to step ----------------------------------------------------------------------------------------


class Training:
    """A model and its batch in one set-up.

    Args:
        model: name of a timm model.
        image_size: pixels; None is the model's own.

    Attributes:
        micro_batch: samples in a part, None for the whole batch; may change between steps.
        close: ends what a method started, a process group of this one process; to be called when all steps are done.
    """

    def __init__(
        self, model: str, setup: Setup, batch_size: int, device: torch.device, image_size: int | None = None
    ) -> None:
        import torch

        self.setup, self.device = setup, device
        self.close: Callable[[], object] = lambda: None
        self.amp_dtype = _amp_dtype(device)
        torch.manual_seed(0)
        self.model = create_model(model, setup, image_size)
        self.state: list[Any] = [self.model]
        self._step: Callable[[Tensor, Tensor], object] = self._rival() if setup.family == "rival" else self._ours()
        self.batch_size = batch_size

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        import torch

        self._batch_size = size
        images, _ = memory.batch(self.model, self.setup, size)
        if images.dtype == torch.uint8:
            images = torch.randint(0, 256, images.shape, dtype=torch.uint8, device=self.device)
        else:
            images = torch.randn(images.shape, device=self.device)
        if self.setup.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        self.images, self.labels = images, torch.randint(0, memory.CLASSES, (size,), device=self.device)

    @property
    def micro_batch(self) -> int | None:
        return self._micro_batch

    @micro_batch.setter
    def micro_batch(self, size: int | None) -> None:
        self._micro_batch = size
        if self.setup.family != "rival":
            self.state[1].micro_batch = size

    def step(self) -> None:
        self._step(self.images, self.labels)

    def held(self) -> list[Any]:
        """What the meter is to count from the start: the model, heads, optimizers and the batch."""
        if self.setup.family == "rival":
            return [*self.state, self.images, self.labels]
        trainer = self.state[1]
        return [self.model, *trainer.modules, *trainer.optimizers, self.images, self.labels]

    def _optimizer(self, groups: Any) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05, fused=self.device.type == "cuda")

    def _rival(self) -> Callable[[Tensor, Tensor], None]:
        import torch
        from torch.nn.functional import cross_entropy

        setup, device = self.setup, self.device
        model: Any = self.model
        if not setup.method.startswith("fsdp"):  # it brings what it needs
            model.to(device)
        if setup.channels_last:
            model.to(memory_format=torch.channels_last)
        model.train()
        if setup.recompute:
            model.set_grad_checkpointing()
        optimizer, around = self._offloading(model)
        self.state.append(optimizer)
        if setup.compile:
            model.compile(mode="reduce-overhead" if setup.cuda_graphs else None)
        scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in ((124.0, 116, 104), (58.0,) * 3))
        self._micro_batch = setup.micro_batch

        def step(images: Tensor, labels: Tensor) -> None:
            size = self._micro_batch or len(images)
            for start in range(0, len(images), size):
                part = images[start : start + size]
                inputs = part.float().sub_(mean).div_(std) if part.dtype == torch.uint8 else part
                with torch.autocast(device.type, self.amp_dtype, cache_enabled=not setup.tuned), around():
                    loss = cross_entropy(model(inputs), labels[start : start + size]) * (len(part) / len(images))
                del inputs
                scaler.scale(loss).backward()
                del loss
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _offloading(
        self, model: nn.Module
    ) -> tuple[torch.optim.Optimizer, Callable[[], contextlib.AbstractContextManager[Any]]]:
        """The optimizer of a rival, and what its forward is in; ``model`` is made ready for its method.

        Raises:
            ImportError: torchao is not installed.
        """
        import torch

        method, card = self.setup.method, self.device.type == "cuda"
        if method == "torchao":
            from torchao.optim import CPUOffloadOptimizer

            options = {"lr": 1e-4, "weight_decay": 0.05, "fused": True}
            return CPUOffloadOptimizer(
                model.parameters(), torch.optim.AdamW, offload_gradients=True, **options
            ), contextlib.nullcontext
        if method.startswith("fsdp"):
            import torch.distributed as dist
            from torch.distributed.device_mesh import init_device_mesh

            from fastlocal.profiling.memory.methods import shard

            if not dist.is_initialized():
                dist.init_process_group("nccl" if card else "gloo", store=dist.HashStore(), rank=0, world_size=1)
            self.close = dist.destroy_process_group
            mesh = init_device_mesh(self.device.type, (1,))
            shard(model, mesh, bf16="bf16" in method, pinned=card)
            save = functools.partial(torch.autograd.graph.save_on_cpu, pin_memory=card)
            adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)  # on the CPU
            return adamw, save if "saved" in method else contextlib.nullcontext
        return self._optimizer(model.parameters()), contextlib.nullcontext

    def _ours(self) -> Callable[[Tensor, Tensor], object]:
        setup = self.setup
        trainer = memory.local_trainer(
            self.model,
            setup,
            optimizer=self._optimizer,
            micro_batch=setup.micro_batch,
            amp_dtype=self.amp_dtype,
            device=self.device,
            kernels=setup.kernels,
            compile="reduce-overhead" if setup.cuda_graphs else setup.compile,
        )
        self.state.append(trainer)
        self._micro_batch = setup.micro_batch
        return trainer.step


def create_model(name: str, setup: Setup, image_size: int | None = None) -> nn.Module:
    """A timm model under the set-up's TIMM_FUSED_ATTN and with fast norm, which timm reads while it builds."""
    import timm
    from timm.layers import config, fast_norm

    before = config._USE_FUSED_ATTN, fast_norm.is_fast_norm()
    try:
        config.set_fused_attn(setup.fused_attention > 0, experimental=setup.fused_attention > 1)
        fast_norm.set_fast_norm(True)
        size: dict[str, Any] = {"img_size": image_size} if image_size else {}
        return timm.create_model(name, num_classes=memory.CLASSES, **size)
    finally:
        config.set_fused_attn(before[0] > 0, experimental=before[0] > 1)
        fast_norm.set_fast_norm(before[1])


def _amp_dtype(device: torch.device) -> torch.dtype:
    import torch

    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def default_device() -> torch.device:
    """The CUDA card if there is one, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


# --- Measuring --------------------------------------------------------------------------------------------------------


def measure_peak(training: Training) -> dict[str, Any]:
    """Peak of one step in MiB: torch's own counters on CUDA (and what the allocator reserved), the meter on a CPU."""
    import torch

    if training.device.type == "cuda":
        release()
        torch.cuda.reset_peak_memory_stats()
        training.step()
        torch.cuda.synchronize()
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_mib": allocated / MIB, "reserved_mib": reserved / MIB, "peak_by": "torch.cuda"}
    from fastlocal.memory import Meter

    with Meter(*training.held(), device=training.device) as meter:
        training.step()
    return {"peak_mib": meter.peak / MIB, "reserved_mib": None, "peak_by": "meter"}


def time_step(training: Training, steps: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per step, from and to a device that has nothing left to do."""
    synchronize(training.device)
    begun = clock()
    for _ in range(steps):
        training.step()
    synchronize(training.device)
    return (clock() - begun) / steps


def take_turns(first: Callable[[], float], second: Callable[[], float], rounds: int) -> list[tuple[float, float]]:
    """Pairs of seconds per step, one per round; who goes first alternates, so that a drift favours neither."""
    pairs = []
    for turn in range(rounds):
        if turn % 2 == 0:
            a = first()
            b = second()
        else:
            b = second()
            a = first()
        pairs.append((a, b))
    return pairs


def summary(pairs: Sequence[tuple[float, float]], batch_size: int) -> dict[str, float]:
    """Median images per second of the second of each pair, and the quartiles of its speed over the first."""
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "images_per_s": batch_size / statistics.median(b for _, b in pairs),
        "speed": middle,
        "speed_low": low,
        "speed_high": high,
    }


def measure(
    model: str, setup: Setup, batch_size: int, device: torch.device, image_size: int | None = None, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Peak memory alone on the device, then the speed in turns with the baseline, if that fits beside it."""
    import torch

    torch._dynamo.reset()  # with the CUDA graphs of the set-up before, and their memory
    release()
    begun = time.perf_counter()
    with contextlib.closing(Training(model, setup, batch_size, device, image_size)) as training:
        for _ in range(WARM_UP_STEPS):
            training.step()
        synchronize(device)
        warm_up = time.perf_counter() - begun
        peak = measure_peak(training)
        steps = max(1, math.ceil(SAMPLE_SECONDS / time_step(training)))
        rival: Training | None = None
        if setup != baseline():
            try:
                rival = Training(model, baseline(), batch_size, device, image_size)
                for _ in range(WARM_UP_STEPS):
                    rival.step()
            except torch.OutOfMemoryError:
                rival = None
        if rival is None:
            pairs = [(seconds, seconds) for seconds in (time_step(training, steps) for _ in range(rounds))]
        else:
            rival_steps = max(1, math.ceil(SAMPLE_SECONDS / time_step(rival)))
            pairs = take_turns(lambda: time_step(rival, rival_steps), lambda: time_step(training, steps), rounds)
        figures: dict[str, Any] = summary(pairs, batch_size)
        if rival is None and setup != baseline():
            figures |= dict.fromkeys(("speed", "speed_low", "speed_high"))  # the baseline does not fit beside it
        return {**figures, **peak, "rounds": rounds, "steps_per_sample": steps, "warm_up_s": round(warm_up, 1)}


def synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Give back what nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- Trace ------------------------------------------------------------------------------------------------------------


def trace(training: Training, path: Path) -> dict[str, Any]:
    """Write a Chrome trace of two steps to ``path``.json, and on CUDA a memory snapshot to ``path``.pickle.

    Returns how much of the time of the copies between host and device lies behind kernels (see `hidden_share`).
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = training.device.type == "cuda"
    for _ in range(WARM_UP_STEPS):
        training.step()
    synchronize(training.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities) as profiler:
        for _ in range(TRACED_STEPS):
            training.step()
        synchronize(training.device)
    chrome = path.with_suffix(".json")
    profiler.export_chrome_trace(str(chrome))
    if cuda:
        torch.cuda.memory._record_memory_history()
        training.step()
        torch.cuda.memory._dump_snapshot(str(path.with_suffix(".pickle")))
        torch.cuda.memory._record_memory_history(enabled=None)
    return hidden_share(json.loads(chrome.read_text())["traceEvents"])


def hidden_share(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a Chrome trace: milliseconds of copies over the host bus, and the share of them during which a kernel ran."""
    copies = [_span(e) for e in events if e.get("cat") == "gpu_memcpy" and ("HtoD" in e["name"] or "DtoH" in e["name"])]
    kernels = _union([_span(e) for e in events if e.get("cat") == "kernel"])
    hidden = sum(
        max(0.0, min(end, last) - max(start, first)) for start, end in _union(copies) for first, last in kernels
    )
    total = sum(end - start for start, end in _union(copies))
    return {"copies_ms": total / 1e3, "hidden_share": hidden / total if total else None}


def _span(event: Mapping[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


# --- The command ------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Run the subcommand; returns 1 if one of our set-ups fails with anything but a lack of memory."""
    parser = ArgumentParser(prog="fastlocal bench throughput", description=__doc__)
    parser.add_argument(
        "--model",
        nargs="+",
        default=["swin_tiny_patch4_window7_224"],
        help="timm models (swin_tiny_patch4_window7_224)",
    )
    parser.add_argument("--image-size", type=int, help="pixels; the model's own if not given")
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples in a part (%(default)s)")
    parser.add_argument("--modules", type=int, nargs="+", metavar="K", help="(2 4)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns with the baseline (%(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only set-ups with one of these in their name, and plain E2E",
    )
    parser.add_argument("--cap", metavar="SIZES", help="what trains on smaller cards, e.g. 2GiB,4GiB,8GiB,all")
    parser.add_argument("--trace", action="store_true", help="instead write a trace of --only's set-ups")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop in time; the next call goes on")
    parser.add_argument("--output", type=Path, default=results.RESULTS, help="folder of the results (%(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("batch_size", "micro_batch", "image_size", "rounds", "budget"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if arguments.trace:
        parser.refuse_void(argv, ("--rounds", "--budget"), "with --trace")
        if not arguments.only:
            raise UserError("--trace needs --only TEXT: a trace of every set-up would be gigabytes.")
    for model in arguments.model:
        memory.skeleton(model, arguments.image_size)  # refuses what is no timm model

    folder = results.card_folder(arguments.output)
    if arguments.cap is not None:
        parser.refuse_void(argv, ("--trace", "--modules", "--micro-batch", "--rounds"), "with --cap")
        from fastlocal.profiling.card import caps

        return caps.run(arguments, folder)
    device = default_device()
    chosen = [(model, setup) for model in arguments.model for setup in _setups(arguments, model, device)]
    if not chosen:
        raise UserError(f"--only: no set-up has {' or '.join(map(repr, arguments.only))} in its name.")
    if arguments.trace:
        return _trace_all(chosen, arguments, folder, device)
    chosen = list(dict.fromkeys((model, setup) for model, known in chosen for setup in (baseline(), known)))

    campaign = Campaign(folder / "throughput.jsonl", arguments.budget)
    place = {"bench": "throughput", "image_size": arguments.image_size, "batch_size": arguments.batch_size}
    jobs = [({**place, "model": model, **asdict(setup)}, (model, setup)) for model, setup in chosen]
    failed = False
    for model, setup in campaign.todo(jobs):
        row = {**place, "model": model, **asdict(setup), "name": setup.label, "error": None}
        try:
            row |= measure(model, setup, arguments.batch_size, device, arguments.image_size, arguments.rounds)
        except Exception as error:  # a set-up that cannot run is a result too
            row["error"] = results.sentence(error)
            failed |= setup.family != "rival" and row["error"] != "out of memory"
        campaign.add(row)
        print(_progress(row), flush=True)
    done = [found for key, _ in jobs if (found := campaign.find(key)) is not None]
    for model in arguments.model:
        results.show(
            f"\n{model}, batch {arguments.batch_size}\n\n{table([row for row in done if row['model'] == model])}"
        )
    if campaign.left:
        print(f"\nOut of time with {campaign.left} set-ups left; the same command goes on with them.")
    return int(failed)


def _setups(arguments: Any, model: str, device: torch.device) -> list[Setup]:
    skeleton = memory.skeleton(model, arguments.image_size)
    modules = memory.possible(skeleton, arguments.modules, default=[2, 4])
    size = min(arguments.micro_batch, arguments.batch_size)
    kernels = available_kernels(device)
    known = rivals(model, size)
    if device.type != "cuda":
        known = [setup for setup in known if not setup.compile]
    every = ours(modules, size, kernels)
    mine = [
        setup
        for setup in [*every[:2], *least_memory(memory.number_of_blocks(skeleton), size, kernels[0][0]), *every[2:]]
        if setup.micro_batch is None or setup.micro_batch < arguments.batch_size
    ]
    # The baseline first, then one of ours for one of theirs: a session cut short still compares.
    mixed = [*known[:1], *_alternate(mine, known[1:])]
    return [setup for setup in mixed if asked_for(setup.label, arguments.only)]


def asked_for(label: str, only: Sequence[str]) -> bool:
    """Whether ``--only`` asks for the set-up of this name."""
    return not only or any(text in label for text in only)


def _alternate(first: Sequence[Setup], second: Sequence[Setup]) -> Iterator[Setup]:
    for position in range(max(len(first), len(second))):
        yield from first[position : position + 1]
        yield from second[position : position + 1]


def _trace_all(chosen: Sequence[tuple[str, Setup]], arguments: Any, folder: Path, device: torch.device) -> int:
    for model, setup in chosen:
        name = "".join(c if c.isalnum() else "-" for c in f"{model}-{setup.label}")
        with contextlib.closing(Training(model, setup, arguments.batch_size, device, arguments.image_size)) as training:
            found = trace(training, folder / "traces" / name)
        place = {"bench": "trace", "model": model, "batch_size": arguments.batch_size, "name": setup.label}
        results.append_row(folder / "traces.jsonl", {**place, **asdict(setup), **found})
        copies = "no copies between host and device"
        if found["hidden_share"] is not None:
            copies = f"{found['copies_ms']:.1f} ms of copies, {100 * found['hidden_share']:.0f} % of it behind kernels"
        print(f"{setup.label}: {copies}; {folder / 'traces' / name}.json", flush=True)
        release()
    return 0


def _progress(row: Mapping[str, Any]) -> str:
    if row["error"] is not None:
        return f"{row['model']}, {row['name']}: {row['error']}"
    speed = f", {row['speed']:.2f} × E2E" if row["speed"] is not None else ""
    return f"{row['model']}, {row['name']}: {row['images_per_s']:.1f} images/s{speed}, {row['peak_mib']:.0f} MiB"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Set-ups by peak memory; speed and memory as multiples of plain end-to-end training."""
    if not rows:
        return "Nothing was measured."
    plain = next((row for row in rows if row["name"] == baseline().label and row["error"] is None), None)
    lines = []
    for row in sorted(rows, key=lambda row: -(row.get("peak_mib") or math.inf)):
        line = {"set-up": row["name"]}
        if row["error"] is not None:
            line["remark"] = row["error"]
        else:
            line |= {"images/s": row["images_per_s"], "× E2E": row["speed"], "peak MiB": row["peak_mib"]}
            line |= {"reserved MiB": row["reserved_mib"]} if row["reserved_mib"] is not None else {}
            line |= {"memory, of E2E": row["peak_mib"] / plain["peak_mib"]} if plain is not None else {}
            line |= {"quartiles": f"{row['speed_low']:.3f} to {row['speed_high']:.3f}"} if row["speed"] else {}
        lines.append(line)
    columns = dict.fromkeys(name for line in lines for name in line)
    return results.markdown_table(lines, {name: name for name in columns})
