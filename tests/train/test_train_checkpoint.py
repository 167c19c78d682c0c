"""Saving survives a crash at any point; loading never runs code."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlocal.train import checkpoint
from fastlocal.train.errors import UserError


def _content(mark: int) -> dict[str, Any]:
    weights = torch.randn(3000, generator=torch.Generator().manual_seed(mark))
    return {"mark": mark, "weights": {"a": weights, "b": weights.view(50, 60) * 2}, "notes": ["x", 1.5, None]}


def _save(path: Path, tree: dict[str, Any]) -> None:
    checkpoint.write_atomically(path, lambda file: checkpoint.write(tree, file))


def test_a_saved_tree_loads_back(tmp_path: Path) -> None:
    _save(tmp_path / "last.pt", _content(1))
    loaded = checkpoint.read_tree(tmp_path / "last.pt")
    assert loaded["mark"] == 1
    assert loaded["notes"] == ["x", 1.5, None]
    assert torch.equal(loaded["weights"]["b"], _content(1)["weights"]["b"])
    assert os.listdir(tmp_path) == ["last.pt"]


def _save_and_die(path: Path, at: int) -> None:
    """In a forked child: save mark 2 and be killed at event ``at``: in the middle of a write, or at a system call."""
    events = 0

    def event(before_dying: Callable[[], object] = lambda: None) -> None:
        nonlocal events
        if events == at:
            before_dying()
            os.kill(os.getpid(), signal.SIGKILL)
        events += 1

    class Dying:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            event(lambda: (self.file.write(bytes(data)[: len(data) // 2]), self.file.flush()))
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    torch_save, fsync, replace = torch.save, os.fsync, os.replace
    torch.save = lambda tree, file: torch_save(tree, Dying(file))  # type: ignore[assignment]
    os.fsync = lambda descriptor: (event(), fsync(descriptor))  # type: ignore[assignment]
    os.replace = lambda *names: (event(), replace(*names), event())  # type: ignore[assignment]
    _save(path, _content(2))
    os._exit(0)


def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    marks, killed = [], True
    while killed:
        _save(path, _content(1))
        child = os.fork()
        if child == 0:
            try:
                _save_and_die(path, at=len(marks))
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0
        loaded = checkpoint.read_tree(path)
        assert torch.equal(loaded["weights"]["a"], _content(loaded["mark"])["weights"]["a"])
        marks.append(loaded["mark"])
    # Old content up to the rename, the new one from there on; the last round ran to its end.
    assert marks == sorted(marks)
    assert marks.count(1) >= 10
    assert marks.count(2) >= 3


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path / "last.pt", _content(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        _save(tmp_path / "last.pt", _content(2))
    assert os.listdir(tmp_path) == ["last.pt"]
    assert checkpoint.read_tree(tmp_path / "last.pt")["mark"] == 1


def test_truncated_files_are_named(tmp_path: Path) -> None:
    _save(tmp_path / "whole.pt", _content(1))
    whole = (tmp_path / "whole.pt").read_bytes()
    for share in (0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.999):
        (tmp_path / "cut.pt").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=r"cut\.pt .*(truncated|damaged)"):
            checkpoint.read_tree(tmp_path / "cut.pt")


class _Malicious:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.flag),))


@pytest.mark.parametrize("form", ["torch zip", "torch legacy", "plain pickle"])
def test_a_pickle_is_never_run(tmp_path: Path, form: str) -> None:
    tree, path = {"format": checkpoint.FORMAT, "weights": _Malicious(tmp_path / "ran")}, tmp_path / "bad.pt"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(tree))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=form == "torch zip")
    with pytest.raises(UserError, match=r"bad\.pt"):
        checkpoint.read_tree(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False) if form == "torch zip" else pickle.loads(pickle.dumps(tree))
    assert (tmp_path / "ran").exists()  # the trap works where it is sprung


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a fastlocal checkpoint"):
        checkpoint.read_tree(tmp_path / "other.pt")
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.read_tree(tmp_path / "missing.pt")


def test_random_state_comes_back_through_a_file(tmp_path: Path) -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    np.random.randn(), random.gauss(0, 1)  # both keep half of a pair in reserve
    _save(tmp_path / "random.pt", {"random": checkpoint.random_state()})

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(()).item()]

    expected, others = draw(), draw()
    checkpoint.restore_random_state(checkpoint.read_tree(tmp_path / "random.pt")["random"])
    assert draw() == expected != others


LOADING = """
import sys, threading, timm, torch, fastlocal
from pathlib import Path
from fastlocal.train.checkpoint import load_trainer, read_tree, write, write_atomically

def trainer():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=384, depth=16, num_heads=6, num_classes=10)
    return fastlocal.LocalTrainer(model, modules=8, objective="end-to-end", residency="module")

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

path = Path(sys.argv[1])
if not path.exists():
    one = trainer()
    one.step(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    write_atomically(path, lambda file: write({"trainer": one.state_dict()}, file))
    sys.exit()
fastlocal.LocalTrainer(timm.create_model("test_vit", num_classes=10))  # imports what is only imported now
before = peak = resident()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())
thread = threading.Thread(target=watch)
thread.start()
one = trainer()
load_trainer(one, read_tree(path)["trainer"], path)
done.set()
thread.join()
print((peak - before) / path.stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_state_is_loaded_in_little_more_memory_than_it_has(tmp_path: Path) -> None:
    """The model, its states on the host and all that loading takes meanwhile, with AdamW's moments."""
    for _ in range(2):  # written by one process, read by another
        command = [sys.executable, "-c", LOADING, str(tmp_path / "state.pt")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3
