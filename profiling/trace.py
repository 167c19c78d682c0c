"""``fastlocal bench trace``: the losses of 50 steps, per family and objective, against those that were recorded.

A refactoring that changes a number is seen here. Floating-point sums depend on the order that a processor's vector units and
a torch version give them, and training amplifies the last bit, so the recorded trace says where it is from: on the same torch
and kind of processor the comparison is exact, all 50 steps; elsewhere it is of the first `ROUNDED` steps, to `TOLERANCE`, the
first of them, whose losses come before any update, to `FORWARD_TOLERANCE`: other masks or pixels show there on any machine.
To compare two versions of the code exactly on any machine, record with one and compare with the other.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlocal.profiling.results import RESULTS
from fastlocal.train.errors import UserError
from fastlocal.train.options.learning import OBJECTIVES

STEPS, ROUNDED, TOLERANCE, FORWARD_TOLERANCE = 50, 5, 1e-3, 5e-6
_VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
_SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", _VIT),
    "deit": ("deit_tiny_distilled_patch16_224", _VIT),
    "beit": ("beit_base_patch16_224", _VIT),
    "eva02": ("eva02_tiny_patch14_224", _VIT),
    "swin": ("swin_tiny_patch4_window7_224", _SWIN),
    "swinv2": ("swinv2_tiny_window8_256", _SWIN),
}

Trace = list[list[float]]  # [steps][exits]


def trace(family: str, objective: str) -> Trace:
    """The losses of each exit in `STEPS` steps of a small model on random images, on the CPU with one thread."""
    import timm
    import torch

    import fastlocal

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        name, options = FAMILIES[family]
        model = timm.create_model(name, img_size=16, num_classes=4, **options)
        trainer = fastlocal.LocalTrainer(model, modules=2, objective=objective, decoder="linear", kernels="reference")
        images, labels = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), torch.randint(4, (8,))
        return [trainer.step(images, labels).loss.tolist() for _ in range(STEPS)]
    finally:
        torch.set_num_threads(threads)


def origin() -> dict[str, str]:
    """What the last bit of a trace depends on."""
    import timm
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "timm": timm.__version__, "cpu": f"{platform.machine()} {capability}"}


def differences(recorded: dict[str, Any], name: str, now: Trace) -> Iterator[str]:
    """How ``now`` differs from the recorded trace of that name; a sentence, if it does."""
    exact, then = recorded["origin"] == origin(), recorded["traces"].get(name)
    if then is None:
        yield f"{name} was not recorded"
        return
    for step in range(STEPS if exact else ROUNDED):
        pairs = list(zip(then[step], now[step], strict=True))
        tolerance = TOLERANCE if step else FORWARD_TOLERANCE
        if any(a != b if exact else abs(a - b) > tolerance * max(abs(a), 1) for a, b in pairs):
            yield f"{name}: step {step + 1} was {then[step]} and is {now[step]}"
            return


def main(argv: list[str]) -> int:
    """Compare, or record; returns 0, or 2 if a loss has changed."""
    parser = argparse.ArgumentParser(prog="fastlocal bench trace", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the file in place of comparing with it")
    parser.add_argument("--file", type=Path, default=RESULTS / "trace" / "trace.json", help="default: %(default)s")
    given = parser.parse_args(argv)
    if not given.record and not given.file.exists():
        raise UserError(f"--file {given.file} does not exist: run once with --record.")
    names = [(family, objective) for family in FAMILIES for objective in OBJECTIVES]
    traces = {f"{family} {objective}": trace(family, objective) for family, objective in names}
    if given.record:
        given.file.parent.mkdir(parents=True, exist_ok=True)
        given.file.write_text(json.dumps({"origin": origin(), "traces": traces}) + "\n")
        print(f"recorded {len(traces)} traces of {STEPS} steps in {given.file}")
        return 0
    recorded = json.loads(given.file.read_text())
    found = [line for name, now in traces.items() for line in differences(recorded, name, now)]
    how = "exactly" if recorded["origin"] == origin() else f"in {ROUNDED} steps to {TOLERANCE:g} (recorded elsewhere)"
    print("\n".join(found) or f"{len(traces)} traces agree {how}")
    return 2 if found else 0
