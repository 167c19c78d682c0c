"""Steps for an hour: memory, open files and threads must not grow."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from soak.kills import TINY
from soak.processes import Processes

WARM_UP = 60.0  # seconds before the first look


def looks(processes: Processes, folder: Path, seconds: float, every: float = 30.0) -> Iterator[dict[str, int]]:
    """What a training process holds, every so many seconds: resident bytes, open files, threads."""
    shutil.rmtree(folder, ignore_errors=True)
    flags = [*TINY, "--epochs", 1_000_000, "--recovery-interval", 20, "--output", folder, "--experiment", "steps"]
    process = processes.start(["train", *flags], deadline=int(seconds + WARM_UP + 300))
    time.sleep(min(WARM_UP, seconds / 4))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        yield {
            "bytes": 1024 * int(status["VmRSS"].split()[0]),
            "files": len(os.listdir(f"/proc/{process}/fd")),
            "threads": int(status["Threads"]),
        }
        time.sleep(every)
    os.kill(process, signal.SIGTERM)
    code = processes.wait(process)
    assert code == 143, code
