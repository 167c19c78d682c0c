"""The folder of a run: one process owns it, one file in it commits what was trained, all others follow from that one.

==================== ==================================================================================================
``last.pt``          the state that training goes on from; a save counts from the moment this name points to it
``previous.pt``      the state before that
``best.pt``          the best state so far, written after ``last.pt``; a process that ends in between leaves it to the next
``model.safetensors`` its weights as timm loads them (``local-dir:RUN``), likewise
``config.json``      what timm reads beside them: architecture, label names, mean, std, crop
``metrics.jsonl``    one row per epoch, written before ``last.pt``; rows that it does not count yet are written again
``curves.png``       a plot of those rows, redrawn as training goes on
``config.yaml``      the options
==================== ==================================================================================================
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from fastlocal.train import checkpoint as checkpoints
from fastlocal.train.errors import UserError, printable
from fastlocal.train.signals import StopRequest

RETRY_EVERY = 5.0  # seconds


class SaveError(UserError):
    """A file of the run folder could not be written."""


class RunFolder:
    """A run folder that this process owns until it ends, however it ends.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._patience: _Patience | None = None  # a failed write is final
        self._lock = _Lock(path)
        for leftover in path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)  # of a process that was killed while it wrote

    @classmethod
    def create(cls, output: Path) -> RunFolder:
        """A folder in ``output`` that nobody sees before `publish`.

        Raises:
            UserError: it cannot be made.
        """
        for _ in range(2):
            with contextlib.suppress(UserError):  # a process that starts at the same moment may have swept it away
                return cls(_make(output))
        return cls(_make(output))

    @classmethod
    def sweep(cls, output: Path) -> None:
        """Remove from ``output`` what processes left that were killed before their folder had its name."""
        for folder in output.glob(".*.starting"):
            with contextlib.suppress(UserError, OSError):  # its process lives
                if (folder / ".lock").exists():
                    cls(folder).discard()
                else:
                    folder.rmdir()

    def publish(self, name: str, *, unique: bool) -> None:
        """Give the folder its ``name``, or if that is taken and need not be ``unique``, the name with a number.

        Raises:
            UserError: there is a run or a file of that name.
        """
        for number in range(1, 1000):
            path = self.path.with_name(name if number == 1 else f"{name}-{number}")
            try:
                self.path.rename(path)  # takes the place of an empty folder
            except OSError as error:
                if path.is_dir():
                    if not unique:
                        continue
                    raise UserError(
                        f"run folder {path} exists already: choose another --experiment, or continue with --resume {path}."
                    ) from None
                if path.exists():
                    raise UserError(f"run folder {path} cannot be made: a file of that name is in the way.") from None
                raise UserError(
                    f"run folder {path} cannot be made: {error.strerror}; choose another --output."
                ) from None
            self.path = path
            checkpoints.sync_folder(path.parent)
            return

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def close(self) -> None:
        self._lock.release()

    # Writing

    def retry_for(self, minutes: float, say: Callable[[str], object], stop: StopRequest) -> None:
        """From now on, go on trying for ``minutes`` or until ``stop`` when a write fails; ``say`` hears of it once."""
        self._patience = _Patience(minutes, say, stop)

    def write(self, name: str, write: Callable[[IO[bytes]], object], keep: Path | None = None) -> None:
        """Replace the file ``name`` as `checkpoint.write_atomically` does.

        Raises:
            SaveError: it could not be written.
        """
        since = time.monotonic()
        for attempt in itertools.count():
            try:
                self._lock.check(self.path)
                checkpoints.write_atomically(self.path / name, write, keep)
                return
            except OSError as error:
                sentence = f"{self.path / name} cannot be written: {error.strerror or error}"
            if self._patience is None or not self._patience.wait(sentence, attempt, since):
                raise SaveError(f"{sentence}.")

    def commit(self, checkpoint: Mapping[str, Any]) -> None:
        """Save ``checkpoint`` as ``last.pt``; what was there is ``previous.pt`` from now on."""

        self.write("last.pt", lambda file: checkpoints.write(checkpoint, file), keep=self.path / "previous.pt")

    # Rows

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``metrics.jsonl``."""
        self._write_rows([*self.rows(), row])

    def keep_rows(self, epochs: int) -> list[int]:
        """Keep one whole row for each of the first ``epochs`` epochs; returns the epochs that have none."""
        rows = {row["epoch"]: row for row in self.rows()}
        kept = [rows[epoch] for epoch in range(1, epochs + 1) if epoch in rows]
        if kept or (self.path / "metrics.jsonl").exists():
            self._write_rows(kept)
        return [epoch for epoch in range(1, epochs + 1) if epoch not in rows]

    def rows(self) -> list[dict[str, Any]]:
        """The whole rows; what is torn or no row of a run's is left out."""
        try:
            lines = (self.path / "metrics.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return []
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("epoch"), int):
                    rows.append(row)
        return rows

    def _write_rows(self, rows: list[Any]) -> None:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.write("metrics.jsonl", lambda file: file.write(content))


def _make(output: Path) -> Path:
    try:
        output.mkdir(parents=True, exist_ok=True)
        RunFolder.sweep(output)
        path = output / f".{os.getpid()}-{time.time_ns()}.starting"
        path.mkdir()
    except OSError as error:
        raise UserError(f"run folder {output} cannot be made: {error.strerror}; choose another --output.") from None
    return path


@dataclass(frozen=True)
class _Patience:
    minutes: float
    say: Callable[[str], object]
    stop: StopRequest

    def wait(self, sentence: str, attempt: int, since: float) -> bool:
        """Wait before the next attempt; False if there should be none."""
        if time.monotonic() + RETRY_EVERY > since + 60 * self.minutes:
            return False
        if attempt == 0:
            self.say(f"{sentence}; the state is kept in memory, trying again for {self.minutes:g} minutes")
        self.stop.sleep(RETRY_EVERY)
        return not self.stop.requested


def default_name(data: str, objective: str) -> str:
    """Time, data and objective: a name for a run that was given none."""
    kind = re.sub(r"[^A-Za-z0-9]+", "-", data.split(":")[0]).strip("-")
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}-{objective}"


class _Lock:
    """Ownership of a folder, which ends with the process.

    A record lock: unlike flock's, it is not inherited by worker processes, which may live a little longer than their
    parent.
    """

    _held: ClassVar[set[tuple[int, int]]] = set()  # by this process, which its own record locks would not stop

    def __init__(self, folder: Path) -> None:
        try:
            self._descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"run folder {folder} cannot be written: {error.strerror}.") from None
        status = os.fstat(self._descriptor)
        self._identity = status.st_dev, status.st_ino
        if self._identity in _Lock._held:  # and the descriptor stays open: closing it would release the owner's lock
            raise UserError(f"run folder {folder} is in use by another run of this process.")
        try:
            _lock(self._descriptor)
        except OSError as error:
            os.close(self._descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"run folder {printable(str(folder))} is in use by another process: wait until it ends."
                ) from None
            raise UserError(f"run folder {folder} cannot be locked: {error.strerror}.") from None
        _Lock._held.add(self._identity)

    def check(self, folder: Path) -> None:
        """Raise OSError unless ``folder`` is still the one that was locked."""
        status = os.stat(folder / ".lock")
        if (status.st_dev, status.st_ino) != self._identity:
            raise OSError(errno.ESTALE, "another run has taken the folder's place")

    def release(self) -> None:
        if self._identity in _Lock._held:
            _Lock._held.remove(self._identity)
            os.close(self._descriptor)


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]  # there is none on Linux
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
