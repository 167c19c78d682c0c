"""``fastlocal train`` in several processes: the numbers of one, saved and resumed on any number; faults stop all of them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from soak.compare import assert_same, result
from soak.crews import PATIENCE, Crew
from soak.kills import TINY
from soak.processes import Processes

MODULES = ["--parallel", "modules"]
LOCAL = ["--exact-epochs", 0]  # what modules of several processes have by themselves
BOTH = [*MODULES, "--data-parallel", 2]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        assert processes.run(["--version"]) == 0  # the first one waits for imports, which tests of time must not
        yield processes


def left(folder: Path) -> dict[str, Any]:
    """What a run leaves, less how it was shared out."""
    found = result(folder)
    for name in ("last.pt", "best.pt"):
        del found[name]["config"]
    return found


def apart(one: Path, other: Path) -> float:
    """The largest difference of any number in what two runs left, but for what they drew."""
    trees = left(one), left(other)
    for tree in trees:
        for name in ("last.pt", "best.pt"):
            del tree[name]["random"]
    return difference(*trees)


def difference(one: Any, other: Any) -> float:
    if isinstance(one, torch.Tensor):
        return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, float):
        return abs(one - other)
    assert one == other
    return 0.0


SMALL: list[object] = ["--model-kwargs", "patch_size=2", "embed_dim=8", "depth=4", "num_heads=2", "--modules", 4]


def flags(folder: Path, name: str, *more: object) -> list[object]:
    return ["train", *TINY, *SMALL, "--output", folder, "--experiment", name, *more]


def trained(processes: Processes, size: int, command: list[object]) -> None:
    codes, errors = Crew(processes, size, command).wait() if size > 1 else ([processes.run(command)], [""])
    assert codes == [0] * size, errors


STOCHASTIC = ["--drop-path", 0.3, "--mixup", 0.8, "--cutmix", 1.0, "--model-ema", "--crop-padding", 2]


def test_modules_on_several_processes_end_as_one_does(processes: Processes, tmp_path: Path) -> None:
    trained(processes, 1, flags(tmp_path, "one", *STOCHASTIC, *LOCAL))
    trained(processes, 2, flags(tmp_path, "two", *STOCHASTIC, *MODULES, "--rank-cuts", 1))
    assert_same(left(tmp_path / "two"), left(tmp_path / "one"))
    trained(processes, 4, flags(tmp_path, "four", *STOCHASTIC, *MODULES, "--recovery-interval", 2))
    assert_same(left(tmp_path / "four"), left(tmp_path / "one"))


def test_a_batch_on_several_processes_ends_as_on_one(processes: Processes, tmp_path: Path) -> None:
    more = ["--mixup", 0.8, "--cutmix", 1.0, "--model-ema", "--micro-batch", 3, "--clip-grad", 0.1, "--opt", "sgd"]
    for objective in ("feature", "end-to-end"):
        learning = ["--objective", objective, *more]
        trained(processes, 1, flags(tmp_path, f"one {objective}", *learning))
        trained(processes, 2, flags(tmp_path, f"two {objective}", *learning, "--recovery-interval", 2))
        assert apart(tmp_path / f"two {objective}", tmp_path / f"one {objective}") < 1e-5


@pytest.mark.parametrize("sharing", ["modules", "both"])
def test_saved_on_four_resumed_on_another_number(processes: Processes, tmp_path: Path, sharing: str) -> None:
    more = ["--model-ema", "--crop-padding", 2, "--opt", "sgd"]
    trained(processes, 1, flags(tmp_path, "one", *more, *LOCAL))
    shared = MODULES if sharing == "modules" else BOTH
    for size in (1, 2):
        name = f"then {size}"
        crew = Crew(processes, 4, flags(tmp_path, name, *more, *shared, "--recovery-interval", 1))
        deadline = time.monotonic() + 60
        while not (tmp_path / name / "previous.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        crew.kill(0, signal.SIGTERM)
        codes, errors = crew.wait()
        assert codes in ([143] * 4, [0] * 4), errors
        trained(processes, size, ["train", "--resume", tmp_path / name, "--data-parallel", 1])
        if sharing == "modules":
            assert_same(left(tmp_path / name), left(tmp_path / "one"))
        else:
            assert apart(tmp_path / name, tmp_path / "one") < 1e-5


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("sharing", [[], MODULES])
def test_the_others_stop_when_one_is_killed(
    processes: Processes, tmp_path: Path, sharing: list[object], victim: int
) -> None:
    command = flags(tmp_path, "run", "--epochs", 500, "--recovery-interval", 1, *sharing)
    # As torchrun does, one store serves the processes of every start.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": True, "MASTER_PORT": store.port, "TORCHELASTIC_MAX_RESTARTS": 1}
    crew = Crew(processes, 2, command, **agent)
    while not (tmp_path / "run" / "previous.pt").exists():
        time.sleep(0.01)
    crew.kill(victim)
    begun = time.monotonic()
    codes, errors = crew.wait()
    assert time.monotonic() - begun < PATIENCE
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 143
    sentence = "another process of this run has ended or lost its connection"
    assert errors[1 - victim].startswith(f"error: {sentence}")
    assert errors[1 - victim].count("\n") == 1
    # torchrun starts the same command again, which goes on from the last save.
    again = {**agent, "TORCHELASTIC_RESTART_COUNT": 1}
    before = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["trainer"]["steps"]
    crew = Crew(processes, 2, flags(tmp_path, "run", "--epochs", 500, "--recovery-interval", 1, *sharing), **again)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if torch.load(tmp_path / "run" / "last.pt", weights_only=True)["trainer"]["steps"] > before:
            break
    else:
        raise AssertionError("nothing was trained after the restart")
    crew.kill(0, signal.SIGTERM)
    codes, errors = crew.wait()
    assert codes == [143, 143], errors


@pytest.mark.parametrize(
    ("victim", "places"),
    [
        (0, ("joined_store", "dist.init_process_group", "Crew")),
        (2, ("joined_store", "watched", "init_device_mesh", "dist.new_group")),
    ],
)
def test_the_others_stop_when_one_is_killed_while_it_joins_them(
    processes: Processes, tmp_path: Path, victim: int, places: tuple[str, ...]
) -> None:
    hurry = "from fastlocal.train import ranks, watch; watch.GRACE = 0.5; watch.JOIN = ranks.JOIN = 3.0"
    for place in places:
        dies = f"import os, signal; ranks.{place} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"
        code = {rank: f"{hurry}; {dies}" if rank == victim else hurry for rank in range(4)}
        begun = time.monotonic()
        codes, errors = Crew(processes, 4, flags(tmp_path, "run", *BOTH), code=code).wait()
        assert time.monotonic() - begun < 20, place
        assert codes.pop(victim) == -signal.SIGKILL, place
        assert errors.pop(victim) == "", place
        assert codes == [143] * 3, (place, errors)
        for told in errors:
            assert told.startswith("error: another process of this run "), place
            assert told.endswith(", so this one stops as well. What was saved last can be resumed.\n"), place
            assert told.count("\n") == 1, place
    assert not (tmp_path / "run").exists()


def test_a_process_that_hangs_is_noticed(processes: Processes, tmp_path: Path) -> None:
    for name, sharing in (("data", []), ("modules", MODULES)):
        command = flags(tmp_path, name, "--epochs", 500, "--recovery-interval", 1, "--timeout", 3, *sharing)
        crew = Crew(processes, 2, command)
        while not (tmp_path / name / "previous.pt").exists():
            time.sleep(0.01)
        crew.kill(1, signal.SIGSTOP)
        time.sleep(5)
        crew.kill(1, signal.SIGKILL)
        codes, errors = crew.wait()
        assert codes[0] == 143
        assert errors[0].startswith("error: another process of this run did not answer for 3 seconds")


def test_what_is_refused_at_the_start(processes: Processes, tmp_path: Path) -> None:
    def refused(size: int, *more: object, each: Any = (), **env: Any) -> str:
        codes, errors = Crew(processes, size, flags(tmp_path, "refused", *more), each, **env).wait()
        assert codes == [2] * size, errors
        assert len(set(errors)) == 1
        assert errors[0].count("\n") == 1
        return errors[0]

    differing = refused(2, each=[["--lr", 0.1], ["--lr", 0.2]])
    assert (
        "--lr is 0.2 in process 1 and 0.1 in process 0: every process of a run needs the same arguments." in differing
    )
    assert "--parallel modules cannot train --objective end-to-end" in refused(2, *MODULES, "--objective", "end-to-end")
    refusal = refused(2, *MODULES, "--exact-epochs", 1)
    assert "--parallel modules cannot train an exact step" in refusal
    assert "or no exact steps (--exact-epochs 0 --exact-every 0)." in refusal
    assert "--data-parallel 2 is for --parallel modules" in refused(2, "--data-parallel", 2)
    assert "--data-parallel 3 does not divide the 2 processes" in refused(2, *MODULES, "--data-parallel", 3)
    assert "modules: 1 modules are too few for 2" in refused(2, *MODULES, "--modules", 1)
    assert "a batch of 2 images is too small for 2 processes" in refused(2, "--batch-size", 2)
    assert "needs --experiment NAME" in refused(2, "--experiment", "", TORCHELASTIC_MAX_RESTARTS=1)
    assert "--queue 1 would do nothing: it needs --parallel modules" in refused(2, "--queue", 1)
    assert "--parallel 'modules' would do nothing: this is one process" in refused(1, *MODULES)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("place", ["a stranger", "process 0"])
def test_what_never_answers_at_the_start_is_not_waited_for(processes: Processes, tmp_path: Path, place: str) -> None:
    """torch's store has no end of its own for that: not where a stranger listens, nor where process 0 hangs."""
    hurry = "from fastlocal.train import ranks, watch; ranks.GRACE = 1.0; watch.JOIN = ranks.JOIN = 4.0"
    stops = "import os, signal; ranks.watched = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)"
    begun = time.monotonic()
    if place == "a stranger":
        with socket.create_server(("127.0.0.1", 0)) as stranger:
            where = {"MASTER_PORT": stranger.getsockname()[1]}
            codes, errors = Crew(processes, 2, flags(tmp_path, "run"), code={0: hurry, 1: hurry}, **where).wait()
        assert codes == [2, 143]
        assert f"error: port {where['MASTER_PORT']}, at which the processes were to meet, is in use" in errors[0]
    else:
        crew = Crew(processes, 2, flags(tmp_path, "run"), code={0: f"{hurry}; {stops}", 1: hurry})
        codes, errors = [0, processes.wait(crew.members[1])], ["", (crew.errors / "1").read_text()]
        crew.kill(0)
        assert processes.wait(crew.members[0]) == -signal.SIGKILL
        assert codes[1] == 143
    assert time.monotonic() - begun < 30
    assert errors[1].startswith("error: another process of this run did not answer for ")
    assert errors[1].count("\n") == 1


@pytest.mark.parametrize("victim", [0, 2])
def test_all_leave_together(processes: Processes, tmp_path: Path, victim: int) -> None:
    """A process that is killed when the others are done stops them as ever, and what is saved is whole."""
    dies = "from fastlocal.train import ranks; import os, signal; "
    dies += "ranks.dist.destroy_process_group = lambda: os.kill(os.getpid(), signal.SIGKILL)"
    hurry = "from fastlocal.train import watch; watch.GRACE = 0.5"
    code = {rank: dies if rank == victim else hurry for rank in range(4)}
    codes, errors = Crew(processes, 4, flags(tmp_path, "run", *BOTH), code=code).wait()
    assert codes.pop(victim) == -signal.SIGKILL
    assert codes == [143] * 3, errors
    trained(processes, 1, ["train", "--resume", tmp_path / "run", "--data-parallel", 1])


def test_a_process_that_cannot_end_after_an_error_is_ended() -> None:
    hangs = (
        "import sys, threading, time\n"
        "from fastlocal.train.signals import end_after_errors\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"  # Python waits for it
        "with end_after_errors(1):\n    sys.exit(2)\n"
    )
    begun = time.monotonic()
    assert subprocess.run([sys.executable, "-c", hangs]).returncode == -signal.SIGALRM
    assert time.monotonic() - begun < 50
