"""What a run says while it goes: rich progress on a terminal, plain lines elsewhere, one JSON row per epoch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastlocal.train.checkpoint import write_atomically
from fastlocal.train.config import TrainConfig, UserError


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak so far: allocated by torch on a CUDA device, resident in the whole process on a CPU.

    None where the system does not tell (Windows has no ``getrusage``).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_rows(path: Path, epochs: int) -> None:
    """Drop the rows after epoch ``epochs``: a run killed between a row and its checkpoint will write them again."""
    if path.exists():
        kept = b"".join(path.read_bytes().splitlines(keepends=True)[:epochs])
        write_atomically(path, lambda file: file.write(kept))


class Report:
    """Reports of one run; use as a context manager.

    Args:
        folder: where ``metrics.jsonl`` (and TensorBoard's events) go.
        steps: training steps per epoch.

    Raises:
        UserError: ``log="tensorboard"`` and TensorBoard is not installed.
    """

    def __init__(self, config: TrainConfig, folder: Path, exits: Sequence[str], steps: int) -> None:
        self.config, self.folder, self.exits, self.steps = config, folder, tuple(exits), steps
        self._tensorboard = self._progress = None
        if config.log == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--log tensorboard needs TensorBoard: pip install tensorboard.") from None
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if sys.stdout.isatty():
            from rich import progress

            self._progress = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[state]}"),
                transient=True,
            )
            self._bar = self._progress.add_task("", total=steps, state="")

    def __enter__(self) -> Report:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def say(self, text: str) -> None:
        """One line of text."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def step(self, epoch: int, step: int, loss: torch.Tensor, rate: float) -> None:
        """After a training step: ``loss`` [K] of this step, ``rate`` in images per second, ``step`` counted from 1."""
        on_terminal = self._progress is not None
        if step % (min(10, self.config.log_interval) if on_terminal else self.config.log_interval):
            return  # reading a loss waits for the device
        state = f"loss {_numbers(loss.tolist(), '.3f')}  {rate:.0f} images/s"
        if self._progress is not None:
            self._progress.update(self._bar, description=f"epoch {epoch}", completed=step, state=state)
        else:
            print(f"epoch {epoch} step {step}/{self.steps}  {state}", flush=True)

    def epoch(self, row: dict[str, Any]) -> None:
        """After an epoch: append its row to ``metrics.jsonl`` and say it in one line."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._tensorboard is not None:
            self._write_tensorboard(row)
        memory = row["peak_memory_bytes"]
        self.say(
            f"epoch {row['epoch']}/{self.config.epochs}"
            f"  loss {_numbers(row['loss'], '.3f')}"
            f"  val accuracy {_numbers([100 * share for share in row['validation_accuracy']], '.1f')} %"
            f"  lr {row['lr']:.1e}  {row['images_per_second']:.0f} images/s"
            + (f"  {memory / 2**20:.0f} MiB" if memory is not None else "")
        )

    def _write_tensorboard(self, row: dict[str, Any]) -> None:
        assert self._tensorboard is not None
        for name, value in row.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(name, value, row["epoch"])
            elif isinstance(value, list) and name != "exits":
                for module, entry in enumerate(value, start=1):
                    self._tensorboard.add_scalar(f"{name}/{module}", entry, row["epoch"])


def _numbers(values: Sequence[float], form: str) -> str:
    return " ".join(format(value, form) for value in values)
