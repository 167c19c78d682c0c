"""What a run says while it goes: rich progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch

from fastlocal.train.config import TrainConfig
from fastlocal.train.errors import printable
from fastlocal.train.logs import Log, flat, open_log


def device_name(device: torch.device) -> str:
    """The card's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count anew on a CUDA device: this process may have trained another model before."""
    if device.type == "cuda":
        torch.cuda.init()  # without it there are no counts to reset
        torch.cuda.reset_peak_memory_stats(device)


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


class Voice:
    """Standard output, which may fall silent and never fails.

    A reader that left (``| head``), a full disk, a closed terminal: whatever happens to words must not end a training run.
    What an encoding has no character for is escaped.
    """

    def __init__(self) -> None:
        self._stream = sys.stdout  # None where the process was started without

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
                self._stream.flush()
            except (OSError, ValueError):
                self._fall_silent()
        return len(text)

    def flush(self) -> None:
        """Nothing: `write` does."""

    def _fall_silent(self) -> None:
        # Python flushes sys.stdout once more when it ends, and would turn the failure into an exit code.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._stream = None


class Report:
    """Reports of one run; use as a context manager.

    Args:
        folder: the run's, whose name other people's logs have.
        steps: training steps per epoch.
        exits: names of the classifiers, in the order of the losses.
        epoch: epochs that were completed before.
    """

    def __init__(self, config: TrainConfig, folder: Path, steps: int, exits: Sequence[str], epoch: int) -> None:
        self.config, self.steps, self.exits, self._voice = config, steps, exits, Voice()
        self._progress = None
        self._log: Log | None = None
        self._to_log(lambda _: setattr(self, "_log", open_log(config, folder, epoch)))
        if self._voice.isatty():
            from rich import console, progress

            self._progress = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=None),  # what the words leave
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[state]}"),
                transient=True,
                expand=True,
                console=console.Console(file=cast(IO[str], self._voice)),
            )
            self._bar = self._progress.add_task("", total=steps, state="")

    def __enter__(self) -> Report:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._to_log(lambda log: log.close() if log is not None else None)

    def say(self, text: str) -> None:
        """One line of text."""
        text = printable(text)
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=cast(IO[str], self._voice))

    def _say_all(self, words: Sequence[str], indent: int) -> None:
        for line in wrapped(words, indent, shutil.get_terminal_size().columns):
            self.say(line)

    def step(self, epoch: int, step: int, loss: torch.Tensor, rate: float) -> None:
        """After a training step: ``loss`` [K] of this step, ``rate`` in images per second, ``step`` counted from 1."""
        on_terminal = self._progress is not None
        if step % (min(10, self.config.reports.log_interval) if on_terminal else self.config.reports.log_interval):
            return  # reading a loss waits for the device
        values = [f"{value:.3f}" for value in loss.tolist()]
        if self._progress is not None:
            state = f"last loss {values[-1]}  {rate:.0f} images/s"
            self._progress.update(
                self._bar, description=f"epoch {epoch}", completed=step, total=self.steps, state=state
            )
        else:
            place = f"epoch {epoch} step {step}/{self.steps}  {rate:.0f} images/s  loss"
            self._say_all([place, *by_module(self.exits, values)], indent=4)

    def validating(self, batches: Iterable[Any], total: int) -> Iterator[Any]:
        """``batches`` as they come, the bar moving along; ``total`` of them are expected."""
        for done, batch in enumerate(batches, start=1):
            yield batch
            if self._progress is not None:
                self._progress.update(self._bar, description="validation", completed=done, total=total, state="")

    def epoch(self, row: Mapping[str, Any]) -> None:
        """After an epoch: its row of ``metrics.jsonl``, in lines that break between values only."""
        self._to_log(lambda log: log.write(flat(row), row["epoch"]) if log is not None else None)
        memory, average = row["peak_memory_bytes"], row.get("ema_validation_accuracy")
        losses = [f"{loss:.3f}" for loss in row["loss"]]
        accuracies = [f"{100 * share:.1f} %" for share in row["validation_accuracy"]]
        several = len(losses) > 1
        words = [f"epoch {row['epoch']}/{self.config.optimization.epochs}"]
        words += [] if several else [f"loss {losses[0]}", f"val accuracy {accuracies[0]}"]
        words += [f"lr {row['lr']:.1e}", f"{row['images_per_second']:.0f} images/s"]
        words += [f"{memory / 2**20:.0f} MiB"] if memory is not None else []
        words += [f"exported: moving average, {100 * average:.1f} %"] if average is not None else []
        self._say_all(words, indent=4)
        for name, values in (("loss", losses), ("val accuracy", accuracies)) if several else ():
            first, *rest = by_module(row["exits"], values)
            self._say_all([f"    {name:13s}{first}", *rest], indent=17)

    def _to_log(self, action: Callable[[Log | None], object]) -> None:
        """Do something with another log, if there is one; its failures end the log and not the run."""
        try:
            action(self._log)
        except Exception as error:  # services and threads hand on whatever they ran into
            self._log = None
            self.say(f"--log {self.config.reports.log} ends here: {error}")


def by_module(exits: Sequence[str], values: Sequence[str]) -> list[str]:
    """``["module 1: 2.301", "2: 1.204"]``: values labelled by the exits that they belong to; one alone needs no label."""
    if len(values) == 1:
        return list(values)
    names = [exits[0], *(name.removeprefix("module ") for name in exits[1:])]
    return [f"{name}: {value}" for name, value in zip(names, values, strict=True)]


def wrapped(words: Sequence[str], indent: int, width: int) -> list[str]:
    """``words``, two spaces apart, in lines of at most ``width`` that break between words only."""
    lines = [""]
    for word in words:
        if lines[-1].strip() and len(lines[-1]) + 2 + len(word) > width:
            lines.append(" " * indent)
        lines[-1] += f"  {word}" if lines[-1].strip() else word
    return lines
