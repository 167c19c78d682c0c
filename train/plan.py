"""``fastlocal plan``: from a memory budget to a way of training, and why not another."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastlocal.backbones import backbone
from fastlocal.planner import NOMINAL, Candidate, Plan, Search, format_bytes, search
from fastlocal.planner.scaling import Scaling, module_costs, scaling
from fastlocal.train.build import build_device, build_model, planned_for, pretrained_configuration, unplanned_options
from fastlocal.train.config import OPTIONS, TrainConfig
from fastlocal.train.errors import UserError, printable
from fastlocal.train.options.values import flag

WIDTH = 80  # of a terminal that nobody has widened


def make_plan(config: TrainConfig, objective: str | None) -> Search:
    """Search for plans of ``config``'s model, batch size and memory, without taking memory for the model.

    Args:
        objective: the only one to plan for; None weighs exact gradients against local ones.

    Raises:
        UserError: no memory is given, or a name is not known.
        ValueError: what the planner refuses.
    """
    if config.memory.budget is None:
        raise UserError("--memory is missing: give the card's, such as --memory 4GiB.")
    with torch.device("meta"):
        height, width = pretrained_configuration(config.model.name)["input_size"][-2:]
        model = build_model(config, 1000, config.model.img_size or (height, width))
    options = unplanned_options(config, build_device(config))
    if config.memory.device == "auto" and not torch.cuda.is_available():
        del options["device"]  # a plan on a machine without a card is for one with a card
    return search(
        model,
        batch_size=config.optimization.batch_size,
        budget=config.memory.budget,
        objective=objective,
        **planned_for(config),
        **options,
    )


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
    console.print(
        f"Peak {format_bytes(chosen.peak)} of tensors, seen in a rehearsal, of {room}.\n"
        f"Host memory {format_bytes(chosen.host)}, bus {format_bytes(chosen.traffic)} a step.\n"
        f"Peaks marked ≈ are estimates; time is ranked for {speed}.\n\n{command(chosen, config)}"
    )
    return 0


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
    *("opt_betas", "opt_eps", "opt_kwargs"),
)


def command(plan: Plan, config: TrainConfig) -> str:
    """A complete ``fastlocal train`` command that follows ``plan``; it runs as it is, on random images."""
    words = ["fastlocal train --data synthetic"]
    for option, (_, entry) in OPTIONS.items():
        value = config.get(option)
        given = value != entry.default and value != {}
        if option not in _PASSED_ON or (not given and option != "model"):
            continue
        if option.endswith("_kwargs"):
            words.append(" ".join([flag(option), *(shlex.quote(f"{name}={value}") for name, value in value.items())]))
        else:
            words.append(flag(option) if value is True else f"{flag(option)} {shlex.quote(_text(value))}")
    cuts = ",".join(map(str, plan.cuts)) + "," * (len(plan.cuts) == 1)  # "8," is a cut, and 8 a number of modules
    for name, value in {**plan.arguments(), "modules": cuts or 1, "batch_size": plan.batch_size}.items():
        negated = f"--no-{flag(name).removeprefix('--')}"
        words.append(f"{flag(name)} {value}" if not isinstance(value, bool) else flag(name) if value else negated)
    lines = [words[0]]
    for word in words[1:]:
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
    for heading in ("", "K", "parts", "kept here", "peak", "FLOPs", "bus", ""):
        right = heading in ("K", "parts", "peak", "FLOPs", "bus")
        table.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for candidate in candidates:
        plan = candidate.plan
        kept = {"all": "all", "optimizer": "weights", "module": "a module"}[plan.residency]
        alone = "one module" if not plan.prefetch else kept
        kept = alone + ", low" * (plan.weights == "low") + ", no bound." * (plan.boundaries == "host")
        table.add_row(
            plan.accuracy if plan.accuracy == "exact" else f"local: {plan.objective}",
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
    """Print what ``devices`` devices with links of ``bandwidth`` would gain, simulated; returns 0.

    Raises:
        UserError: the bandwidth is no rate, or a name is not known.
        ValueError: what the engine refuses.
    """
    rate = bytes_per_second(bandwidth)
    with torch.device("meta"):
        height, width = pretrained_configuration(config.model.name)["input_size"][-2:]
        model = build_model(config, 1000, config.model.img_size or (height, width))
    objective = config.learning.objective if config.learning.objective != "end-to-end" else "feature"
    found: dict[str, tuple[int, Scaling]] = {}
    size = config.optimization.batch_size
    blocks = len(backbone(model).blocks)
    for count in dict.fromkeys((min(max(devices, 4), blocks), min(2 * devices, blocks))):
        costs = module_costs(
            model, modules=count, objective=objective, batch_size=size, decoder=config.learning.decoder
        )
        for one in scaling(costs, devices, rate):
            if one.way not in found or one.seconds < found[one.way][1].seconds:
                found[one.way] = (count, one)
    ranked = sorted(found.values(), key=lambda entry: entry[1].seconds)
    if as_json:
        print(json.dumps([{"modules": count, **asdict(one)} for count, one in ranked]))
        return 0
    console = Console(width=WIDTH, highlight=False)
    table = Table(title=f"{devices} devices, {bandwidth}, batch {size}: simulated", box=None, pad_edge=False)
    for heading in ("", "K", "data × modules", "speed-up", "balance", "sent a step"):
        table.add_column(heading, justify="left" if not heading else "right")
    names = {"modules": "--parallel modules", "data": "--parallel data", "both": "both", "pipeline": "exact pipeline"}
    for count, one in ranked:
        grid = f"{one.grid[0]} × {one.grid[1]}"
        sent = f"{one.bytes_sent / 1e6:.1f} MB"
        table.add_row(names[one.way], str(count), grid, f"{one.speed_up:.2f}", f"{one.balance:.2f}", sent)
    table.caption = "exact pipeline: 8 parts, bubble (N − 1)/(8 + N − 1)"
    console.print(table)
    best = next(one for _, one in ranked if one.way != "pipeline")
    if best.speed_up <= 1:
        console.print("One device is as fast: the links cannot carry what would be sent.")
    else:
        more = f" --data-parallel {best.grid[0]}" if best.way == "both" else ""
        console.print(f"Choose {names['modules' if best.way == 'both' else best.way]}{more}.")
    return 0
