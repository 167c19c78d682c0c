"""Runs of several processes, as torchrun starts them, and what becomes of the others when one is killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from soak.compare import assert_same, result
from soak.kills import TINY, Trial
from soak.processes import Processes

SETUPS: dict[str, tuple[int, list[object]]] = {
    "data": (2, ["--recovery-interval", 2]),
    "modules": (2, ["--parallel", "modules", "--recovery-interval", 2, "--drop-path", 0.2]),
    "both": (4, ["--parallel", "modules", "--data-parallel", 2, "--recovery-interval", 1, "--modules", 2]),
}
PATIENCE = 60  # seconds in which the others must have stopped


class Crew:
    """``size`` processes of one command.

    Args:
        each: more arguments, for each process.
        code: Python that a process runs first, by rank.
    """

    def __init__(
        self,
        processes: Processes,
        size: int,
        arguments: Sequence[object],
        each: Sequence[Sequence[object]] = (),
        code: Mapping[int, str] | None = None,
        **env: Any,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._processes = processes
        self._kept = TemporaryDirectory()  # gone with this object, whatever becomes of it
        self.errors = Path(self._kept.name)
        self.members = []
        for rank in range(size):
            about = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            environment = {name: str(value) for name, value in {**about, **env}.items()}
            first = f"import os; os.environ.update({environment!r})\n{(code or {}).get(rank, '')}"
            own = each[rank] if each else []
            self.members.append(
                processes.start([*arguments, *own], stderr=self.errors / str(rank), code=first, deadline=200)
            )

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.members[rank], number)

    def wait(self) -> tuple[list[int], list[str]]:
        """Exit codes and what went to stderr."""
        codes = [self._processes.wait(member) for member in self.members]
        errors = [(self.errors / str(rank)).read_text() for rank in range(len(codes))]
        return codes, errors


def trials(processes: Processes, folder: Path, setup: str, seed: int) -> Iterator[Trial]:
    """Endless trials: one process is killed at a random moment, the others must stop; resumed, the run must end as usual."""
    shutil.rmtree(folder, ignore_errors=True)
    size, options = SETUPS[setup]
    flags = ["train", *TINY, *options, "--output", folder, "--experiment"]
    for name in ("first", "straight"):  # the first one takes longer
        begun = time.monotonic()
        codes, errors = Crew(processes, size, [*flags, name]).wait()
        assert codes == [0] * size, errors
    usual, expected, draw = time.monotonic() - begun, result(folder / "straight"), random.Random(seed)
    while True:
        run, lost = folder / "killed", ""
        shutil.rmtree(run, ignore_errors=True)
        crew = Crew(processes, size, [*flags, "killed"])
        time.sleep(draw.uniform(0, 0.9 * usual))
        victim = draw.randrange(size)
        crew.kill(victim)
        begun = time.monotonic()
        codes, errors = crew.wait()
        waited = time.monotonic() - begun
        killed = codes[victim] == -signal.SIGKILL
        others = [(code, text) for rank, (code, text) in enumerate(zip(codes, errors, strict=True)) if rank != victim]
        if waited > PATIENCE:
            lost = f"the others took {waited:.0f} s"
        elif killed and any(code == 0 for code, _ in others) and not all(code == 0 for code, _ in others):
            lost = f"exit codes {codes}"
        elif any(code not in (0, 143) for code, _ in others):
            lost = f"exit codes {codes}: {errors}"
        elif any(code and (text.count("\n") != 1 or not text.startswith("error: ")) for code, text in others):
            lost = f"told {errors}"
        try:
            if not lost:
                command = ["train", "--resume", run] if run.exists() else [*flags, "killed"]
                codes, errors = Crew(processes, size, command).wait()
                assert codes == [0] * size, errors
                assert_same(result(run), expected)
                left = [p.name for p in (*run.iterdir(), *folder.iterdir()) if p.suffix == ".tmp"]
                assert not left, f"left behind: {left}"
        except (AssertionError, OSError, KeyError) as error:
            lost = f"{type(error).__name__} {error}"
        yield Trial(int(killed and all(code for code, _ in others)), lost, waited)
