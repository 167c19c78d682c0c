"""``fastlocal plan``: from a memory budget to a way of training, and why not another."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fastlocal.planner import NOMINAL, Candidate, Plan, Search, format_bytes, parse_bytes, search
from fastlocal.planner.devices import Sharing, sharings
from fastlocal.planner.scaling import PARTS
from fastlocal.train.build import build_device, build_model, planned_for, pretrained_configuration, unplanned_options
from fastlocal.train.config import OPTIONS, TrainConfig
from fastlocal.train.errors import UserError, printable
from fastlocal.train.options.values import flag

WIDTH = 80  # of a terminal that nobody has widened


def make_plan(config: TrainConfig, asked: Collection[str]) -> Search:
    """Search for plans of ``config``'s model, batch size and memory, without taking memory for the model.

    Args:
        asked: the options that were given. Without an objective among them exact gradients are weighed against local ones, and
            where none says how a local run ends, with and without a finish.

    Raises:
        UserError: no memory is given, or a name is not known.
        ValueError: what the planner refuses.
    """
    if config.memory.budget is None:
        raise UserError("--memory is missing: give the card's, such as --memory 4GiB.")
    decided = {"objective", "exact_epochs", "exact_every"}.intersection(asked)
    return search(
        _skeleton(config),
        batch_size=config.optimization.batch_size,
        budget=config.memory.budget,
        objective=config.learning.objective if "objective" in asked else None,
        exact_share=config.exact_share if decided else None,
        **planned_for(config),
        **_options(config),
    )


def _skeleton(config: TrainConfig) -> nn.Module:
    """The model, without memory for it."""
    with torch.device("meta"):
        height, width = pretrained_configuration(config.model.name)["input_size"][-2:]
        return build_model(config, 1000, config.model.img_size or (height, width))


def _options(config: TrainConfig) -> dict[str, Any]:
    return unplanned_options(config, _device(config))


def _device(config: TrainConfig) -> torch.device | None:
    """Where the plan will be followed: on a machine without a card it is for one with a card, None."""
    return build_device(config) if torch.cuda.is_available() or config.memory.device != "auto" else None


def show(found: Search, config: TrainConfig, as_json: bool) -> int:
    """Print what was found; returns 0 if something fits, else 2."""
    chosen = found.chosen
    if as_json:
        print(
            json.dumps(
                {
                    "budget": found.budget,
                    "reserve": found.reserve,
                    "chosen": chosen and chosen.to_dict(),
                    "command": chosen and command(chosen, config),
                    "smallest": found.smallest,
                    "candidates": [_plain(candidate) for candidate in found.candidates],
                    "rivals": [_plain(candidate) for candidate in found.rivals],
                }
            )
        )
        return 0 if chosen else 2
    console = Console(width=WIDTH, highlight=False)
    console.print(_table("Plans, best first", found.candidates))
    console.print(_table("Ordinary end-to-end training in the same memory", found.rivals))
    speed = "a card of its class" if found.card is NOMINAL else found.card.name
    room = f"{format_bytes(found.budget)} less {format_bytes(found.reserve)} of reserve"
    if chosen is None:
        least = format_bytes(found.smallest + found.reserve, up=True)
        console.print(f"Nothing fits {room}; the smallest card that would do has {least}.")
        return 2
    if chosen.is_plain:
        console.print("Plain training fits: use it.")
    console.print(f"Accuracy: {_about(chosen)}.")
    console.print(
        f"Peak {format_bytes(chosen.peak)} of tensors and cuBLAS's workspaces, seen in a rehearsal, of {room}.\n"
        f"Host memory {format_bytes(chosen.host)}, bus {format_bytes(chosen.traffic)} a step.\n"
        f"Peaks marked ≈ are estimates; time is ranked for {speed}.\n"
    )
    print(command(chosen, config))  # as it is: a console would break a long list of cuts, and a shell what was pasted
    return 0


def _about(plan: Plan) -> str:
    """What the class of accuracy of ``plan`` means, for people."""
    if plan.accuracy == "exact":
        return "exact, that of plain training: the gradients are those of backpropagation"
    learns = f"each module learns from its own loss ({plan.objective})"
    if plan.accuracy == "local":
        return f"local: {learns}, which may end some points behind exact gradients"
    return f"local + exact finish: {learns}, and with exact gradients in the last {plan.exact_share:.0%} of the steps"


# What the plan command knows of a run besides the plan itself.
_PASSED_ON = (
    *(
        "model",
        "model_kwargs",
        "img_size",
        "in_chans",
        "decoder",
        "first_target",
        "reconstruction",
        "normalize_target",
        "lookahead",
        "opt",
        "amp",
    ),
    *("amp_dtype", "model_ema", "kernels", "device", "mixup", "cutmix", "freeze", "train", "linear_probe"),
    *("opt_betas", "opt_eps", "opt_kwargs", "epochs", "exact_every"),
)


def command(plan: Plan, config: TrainConfig, start: str = "", more: Sequence[str] = ()) -> str:
    """A complete ``fastlocal train`` command that follows ``plan``; it runs as it is, on random images.

    Args:
        start: what stands before it, and ``more``: options after it.
    """
    if not plan.exact_share:  # no finish was asked for, or all steps are exact
        config = config.changed(exact_epochs=0, exact_every=0)
    words: dict[str, str] = {}
    for option, (_, entry) in OPTIONS.items():
        value = config.get(option)
        given = value != entry.default and value != {}
        if option not in _PASSED_ON or (not given and option != "model"):
            continue
        if option.endswith("_kwargs"):
            words[option] = " ".join([flag(option), *(shlex.quote(f"{name}={one}") for name, one in value.items())])
        else:
            words[option] = flag(option) if value is True else f"{flag(option)} {shlex.quote(_text(value))}"
    settings = {**plan.arguments(), "modules": plan.cuts or 1, "batch_size": plan.batch_size}
    if plan.accuracy == "local":
        settings["exact_epochs"] = 0
    elif plan.exact_share and (config.exact_epochs or not config.learning.exact_every):
        epochs = config.optimization.epochs
        settings["exact_epochs"] = config.exact_epochs or max(round(plan.exact_share * epochs), 1)
    for option, value in settings.items():
        if isinstance(value, bool):
            words[option] = flag(option) if value else f"--no-{flag(option).removeprefix('--')}"
        else:  # "8," is a cut, and 8 a number of modules
            single = isinstance(value, tuple) and len(value) == 1
            words[option] = f"{flag(option)} {_text(value)}{',' * single}"
    void = config.changed(data="synthetic", memory=None, **settings).without_effect(words)  # which `train` refuses
    lines = [f"{start}fastlocal train --data synthetic"]
    for word in (*(word for option, word in words.items() if option not in void), *more):
        if len(lines[-1]) + len(word) + 3 > WIDTH:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(candidate: Candidate) -> dict[str, Any]:
    accuracy = candidate.plan.accuracy
    return {
        **candidate.plan.to_dict(),
        "accuracy": accuracy,
        "verdict": candidate.verdict,
        "measured": candidate.measured,
    }


def _table(title: str, candidates: tuple[Candidate, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("accuracy", "K", "parts", "kept here", "peak", "FLOPs", "bus", ""):
        right = heading in ("K", "parts", "peak", "FLOPs", "bus")
        table.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for candidate in candidates:
        plan = candidate.plan
        kept = {"all": "all", "optimizer": "weights", "module": "a module"}[plan.residency]
        alone = "one module" if not plan.prefetch else kept
        kept = alone + ", low" * (plan.weights == "low") + ", no bound." * (plan.boundaries == "host")
        table.add_row(
            plan.accuracy,
            str(plan.modules),
            f"{plan.micro_batch}{'*' * (plan.recompute == 'block')}",
            kept,
            ("" if candidate.measured else "≈") + format_bytes(plan.peak),
            f"{plan.compute:.2f}",
            format_bytes(plan.traffic) if plan.traffic else "–",
            candidate.verdict,
        )
    table.caption = "* blocks recomputed"
    return table


RATES = {"Gbit/s": 125e6, "Mbit/s": 125e3, "GB/s": 1e9, "MB/s": 1e6}


def bytes_per_second(text: str) -> float:
    """``"1GB/s"`` or ``"10 Gbit/s"`` as bytes a second.

    Raises:
        UserError: it is no rate.
    """
    for unit, size in RATES.items():
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return float(number) * size
    raise UserError(f"--bandwidth must be a rate such as 1GB/s or 10Gbit/s, got {printable(text, 40)!r}.")


def show_devices(config: TrainConfig, devices: int, bandwidth: str, as_json: bool) -> int:
    """Print what ``devices`` devices with links of ``bandwidth`` would gain and need, simulated.

    Returns:
        0; 2 if a memory is given and no way of sharing fits it.

    Raises:
        UserError: the bandwidth is no rate, or a name is not known.
        ValueError: what the engine or the planner refuses.
    """
    rate = bytes_per_second(bandwidth)
    size, settings = config.optimization.batch_size, planned_for(config)
    reserve, limit = parse_bytes(settings["reserve"], "reserve", least=0), None
    if config.memory.budget is not None:
        limit = parse_bytes(config.memory.budget) - reserve
    found, obstacles = sharings(
        _skeleton(config),
        devices=devices,
        bandwidth=rate,
        batch_size=size,
        objective=config.learning.objective,
        limit=limit,
        host_memory=settings["host_memory"] and parse_bytes(settings["host_memory"], "host_memory"),
        queue=config.devices.queue,
        image_dtype=settings["image_dtype"],
        **_options(config),
    )
    local = [one for one in found if one.plans]
    several = [one for one in local if one.scaling.grid != (1, 1) or devices == 1]
    best = several[0]
    alone = next(one for one in local if one.scaling.grid == (1, 1))
    fits = best.fits is not False
    as_fast = alone.fits is not False and alone.scaling.speed_up >= best.scaling.speed_up
    words = _torchrun(*(alone, config, 1) if as_fast else (best, config, devices)) if fits else None
    if as_json:
        ways = [
            {**asdict(one.scaling), "cuts": one.cuts, "fits": one.fits, "rank_cuts": one.rank_cuts} for one in found
        ]
        for way, one in zip(ways, found, strict=True):
            way["memory"] = [plan.peak for plan in one.plans]
        print(json.dumps({"ways": ways, "limit": limit, "simulated": True, "command": words}, default=list))
        return 0 if fits else 2
    console = Console(width=WIDTH, highlight=False)
    console.print(_devices_table(found, f"{devices} devices, {bandwidth}, batch {size}: simulated", limit))
    console.print("\nTensors on each device, estimated, in GiB:")
    console.print("\n".join(map(_peaks, local)))
    if obstacles:
        console.print(f"\nLeft out: {'; '.join(obstacles)}.")
    console.print(
        "\nMesh: devices along data × modules. Speed: of plain training on one device.\n"
        f"Exact pipeline (GPipe, 1F1B): a bubble of (S − 1)/(M + S − 1), {devices - 1}/{PARTS + devices - 1} for S = {devices}"
        f" stages and M = {PARTS} parts of a batch.\nLocal modules have none."
    )
    if limit is not None and not fits:
        room = f"{format_bytes(limit + reserve)} less {format_bytes(reserve)} of reserve"
        least = format_bytes(min(one.peak for one in several) + reserve, up=True)
        console.print(f"Nothing fits {room} on {devices} devices; the smallest cards that would do have ≈{least} each.")
        return 2
    if as_fast:
        console.print("One device is as fast: the links cannot carry what would be sent.\n")
    else:
        alone_does = " It does not fit one device." if alone.fits is False else ""
        console.print(f"Choose {_flags(best)}: ≈{format_bytes(best.peak)} on the fullest device.{alone_does}\n")
    print(words)
    return 0


NAMES = {"modules": "modules", "data": "data", "both": "both", "pipeline": "exact pipeline"}


def _name(one: Sharing) -> str:
    return "one device" if one.scaling.grid == (1, 1) else NAMES[one.scaling.way]


def _devices_table(found: list[Sharing], title: str, limit: int | None) -> Table:
    """Speed, balance, bytes sent and memory of each way; with a limit, whether it fits."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("", "K", "mesh", "speed", "balance", "sent", "memory", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for one in found:
        about = one.scaling
        over = one.peak - limit if one.plans and limit is not None else 0
        table.add_row(
            _name(one),
            str(len(one.cuts) + 1),
            f"{about.grid[0]} × {about.grid[1]}",
            f"{about.speed_up:.2f} ×",
            f"{about.balance:.2f}",
            "–" if not about.bytes_sent else _decimal(about.bytes_sent),
            format_bytes(one.peak) if one.plans else "–",
            "" if one.fits is None else "fits" if one.fits else f"{format_bytes(over)} over",
        )
    return table


def _decimal(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _peaks(one: Sharing) -> str:
    """What each device along the modules holds, in GiB of tensors; those along "data" hold the same."""
    peaks = " ".join(f"{plan.peak / 2**30:.2f}" for plan in one.plans)
    rows, columns = one.scaling.grid
    return f"  {_name(one)}, {rows} × {columns}: {peaks}" + (f", each {rows} times" if rows > 1 else "")


def _flags(one: Sharing) -> str:
    """What says on the command line that the work is shared like this."""
    rows, columns = one.scaling.grid
    return f"--parallel {'data' if columns == 1 else 'modules'}" + f" --data-parallel {rows}" * (min(rows, columns) > 1)


def _torchrun(one: Sharing, config: TrainConfig, devices: int) -> str:
    """The command that trains as ``one``."""
    whole = replace(one.plans[0], cuts=one.cuts, batch_size=config.optimization.batch_size)
    more = [_flags(one)] if devices > 1 else []
    more += [f"--rank-cuts {','.join(map(str, one.rank_cuts))}"] if one.rank_cuts else []
    waiting = config.devices.queue
    more += [f"--queue {waiting}"] if one.rank_cuts and waiting != OPTIONS["queue"][1].default else []
    start = f"torchrun --nproc-per-node {devices} -m " if devices > 1 else ""
    return command(whole, config, start, more)
