"""SIGKILL at random moments, resumed until done, compared with a run that nothing disturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from soak.compare import assert_same, result
from soak.processes import Processes

TINY: list[object] = [
    *("--data", "digits", "--train-limit", 24, "--val-limit", 16, "--epochs", 2, "--batch-size", 8, "--modules", 2),
    *("--model", "vit_tiny_patch16_224", "--model-kwargs", "patch_size=2", "embed_dim=8", "depth=2", "num_heads=2"),
]
SETUPS: dict[str, list[object]] = {
    "feature": ["--objective", "feature", "--drop-path", 0.2],
    "moving average": ["--objective", "image", "--model-ema", "--opt", "sgd"],
    "mixup": ["--objective", "cross-entropy", "--mixup", 0.8, "--cutmix", 1.0],
    "residency": ["--objective", "transport", "--residency", "module", "--micro-batch", 5],
    "recovery interval": ["--objective", "end-to-end", "--recovery-interval", 1],
    "two processes": ["--objective", "feature", "--recovery-interval", 2],
}


@dataclass
class Trial:
    """What one run went through."""

    kills: int
    lost: str  # what was not as in the undisturbed run; empty if nothing
    seconds: float = 0.0  # until the others of several processes had stopped


def trials(processes: Processes, folder: Path, setup: str, seed: int) -> Iterator[Trial]:
    """Endless trials of one of `SETUPS`, in a folder of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    flags = [*TINY, *SETUPS[setup], "--output", folder, "--experiment"]
    assert processes.run(["--version"]) == 0  # the first waits for what all later ones have imported
    begun = time.monotonic()
    assert processes.run(["train", *flags, "straight"]) == 0
    usual, expected, draw = time.monotonic() - begun, result(folder / "straight"), random.Random(seed)
    while True:
        run, kills, lost = folder / "killed", 0, ""
        shutil.rmtree(run, ignore_errors=True)
        for attempt in range(20):
            command = ["train", "--resume", run] if run.exists() else ["train", *flags, "killed"]
            started = [processes.start(command) for _ in range(2 if setup == "two processes" else 1)]
            if attempt < 3:
                time.sleep(draw.uniform(0, 1.1 * usual))
                for process in started:
                    os.kill(process, signal.SIGKILL)  # one that has ended waits for `wait`, and keeps its number
            codes = [processes.wait(process) for process in started]
            kills += sum(code == -signal.SIGKILL for code in codes)
            if any(code not in (0, 2, -signal.SIGKILL) for code in codes) or (attempt >= 3 and 0 not in codes):
                lost = f"exit codes {codes}"
                break
            if 0 in codes:
                break
        try:
            if not lost:
                assert_same(result(run), expected)
                left = [
                    path.name for path in (*run.iterdir(), *folder.iterdir()) if path.suffix in (".tmp", ".starting")
                ]
                assert not left, f"left behind: {left}"
        except (AssertionError, OSError, KeyError) as error:
            lost = f"{type(error).__name__} {error}"
        yield Trial(kills, lost)
