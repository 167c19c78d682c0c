"""A disk that fills up, at every size: no file may grow beyond a limit that the system enforces."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from soak.compare import assert_same, result
from soak.kills import SETUPS, TINY
from soak.processes import Processes

LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, resource.RLIM_INFINITY))"

TOLD = 300  # bytes that the sentence takes, which is written to a file as well


def trials(processes: Processes, folder: Path, seed: int) -> Iterator[tuple[int, str]]:
    """Endless trials: the limit in bytes, and what went wrong, if anything did."""
    shutil.rmtree(folder, ignore_errors=True)
    flags = [*TINY, *SETUPS["recovery interval"], "--save-retry", 0, "--output", folder, "--experiment"]
    assert processes.run(["train", *flags, "straight"]) == 0
    expected, largest = result(folder / "straight"), (folder / "straight" / "last.pt").stat().st_size
    draw, told = random.Random(seed), folder / "stderr"
    while True:
        run, limit = (
            folder / "full",
            draw.choice((draw.randrange(TOLD, 2000), draw.randrange(TOLD, largest), largest - draw.randrange(3000))),
        )
        shutil.rmtree(run, ignore_errors=True)
        told.unlink(missing_ok=True)
        code = processes.run(["train", *flags, "full"], code=LIMIT.format(limit), stderr=told)
        sentence = told.read_text() if told.exists() else ""
        wrong = [path.name for path in (*folder.iterdir(), *run.glob("*")) if path.suffix in (".tmp", ".starting")]
        if code not in (0, 2) or (code == 2 and (sentence.count("\n") != 1 or "cannot be written" not in sentence)):
            wrong.append(f"exit code {code}: {sentence[-300:]}")
        if run.exists() or code == 0:
            code = processes.run(["train", "--resume", run])
            try:
                assert code == 0, f"resumed with exit code {code}"
                assert_same(result(run), expected)
            except (AssertionError, OSError, KeyError) as error:
                wrong.append(f"{type(error).__name__} {error}")
        yield limit, "; ".join(wrong)
