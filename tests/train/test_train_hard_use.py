"""What ends, disturbs or fills up around a training process loses nothing. ``make soak`` does the same for hours."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from soak import disk
from soak.compare import assert_same, result
from soak.kills import TINY
from soak.processes import Processes

import fastlocal
from fastlocal.train import checkpoint, loop, workers
from fastlocal.train.config import TrainConfig
from fastlocal.train.errors import UserError
from fastlocal.train.run_folder import RunFolder

Options = Callable[..., dict[str, Any]]
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as started:
        yield started


def _flags(output: Path, name: str = "run") -> list[object]:
    return [*TINY, "--output", output, "--experiment", name]


def _wait_for(path: Path) -> None:
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


# One commit point

DIE_AT = """
import os, signal
left, replace = {0}, os.replace
def dying(*names):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = dying
"""


def test_a_process_that_dies_between_any_two_files_loses_nothing(processes: Processes, tmp_path: Path) -> None:
    assert processes.run(["train", *_flags(tmp_path, "straight")]) == 0
    expected, places, code = result(tmp_path / "straight"), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        run = tmp_path / f"run{places}"
        code = processes.run(["train", *_flags(tmp_path, run.name)], code=DIE_AT.format(places))
        # Seen means resumable; not seen means that the same command may be given again.
        again = ["train", "--resume", run] if run.exists() else ["train", *_flags(tmp_path, run.name)]
        assert processes.run(again) == 0
        assert_same(result(run), expected)
        places += 1
    assert code == 0
    assert places > 8  # config, last, and per epoch row, previous, last, best and model, as far as each is due
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".starting"]


# A bad state is never saved or trusted


def test_a_run_that_diverges_keeps_two_states_that_are_good(cli: Command, flags: Any, tmp_path: Path) -> None:
    told = cli("train", *flags(lr=1e9, opt="sgd", warmup_epochs=0, recovery_interval=1))
    assert told.code == 2
    assert "training has diverged" in told.err
    for name in ("last.pt", "previous.pt")[: 1 + (tmp_path / "runs" / "tiny" / "previous.pt").exists()]:
        assert checkpoint.unusable(checkpoint.load(tmp_path / "runs" / "tiny" / name)["trainer"]) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e29])
def test_weights_that_no_training_goes_on_from_are_refused_at_the_start(
    value: float, tiny: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, **options: Any) -> torch.nn.Module:
        model = real(*arguments, **options)
        model.state_dict()["head.weight"][0, 0] = value
        return model

    real = loop.build_model
    monkeypatch.setattr(loop, "build_model", build)
    with pytest.raises(UserError, match=r"would start from are of no use: model\.head\.weight"):
        loop.run(TrainConfig.of(**tiny()))


def test_a_module_that_takes_no_step_ends_the_run(tiny: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        metrics = real(self, *arguments, **options)
        metrics.skipped[1] = True
        return metrics

    real = fastlocal.LocalTrainer.step
    monkeypatch.setattr(fastlocal.LocalTrainer, "step", step)
    with pytest.raises(UserError, match="module 2 skipped 4 of 4 steps: its gradients are not finite"):
        loop.run(TrainConfig.of(**tiny()))


def test_some_skipped_steps_are_mentioned(
    tiny: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        metrics = real(self, *arguments, **options)
        metrics.skipped[2] = self.steps == 2
        return metrics

    real = fastlocal.LocalTrainer.step
    monkeypatch.setattr(fastlocal.LocalTrainer, "step", step)
    loop.run(TrainConfig.of(**tiny()))
    assert capsys.readouterr().out.count("module 3 skipped 1 of 4 steps") == 1


# Speech never stops training

GONE = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)"


@pytest.mark.parametrize(
    "how",
    [
        {"stdout": "/dev/full"},
        {"stdout": None},
        {"code": GONE},
        {"stdout": None, "stderr": None},
        {"encoding": "ascii"},
    ],
    ids=["full", "closed", "reader left", "both closed", "ascii"],
)
def test_nobody_has_to_listen(how: dict[str, Any], processes: Processes, tmp_path: Path) -> None:
    assert processes.run(["train", *_flags(tmp_path, "läuft")], **how) == 0
    assert (tmp_path / "läuft" / "model.safetensors").exists()


# Whatever ends the loop saves first


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.random.default_rng(i).integers(0, 256, (80, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / split / name / f"{i}.png")
    return tmp_path / "pictures"


def _with_workers(pictures: Path) -> list[object]:
    flags = [*_flags(pictures.parent), "--data", f"folder:{pictures}", "--img-size", 8]
    return [*flags, "--workers", 2, "--batch-size", 4, "--epochs", 1000, "--recovery-interval", 1]


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_the_whole_group_saves(number: str, processes: Processes, pictures: Path) -> None:
    run, told = pictures.parent / "run", pictures.parent / "stderr"
    process = processes.start(["train", *_with_workers(pictures)], stderr=told)
    _wait_for(run / "previous.pt")
    os.killpg(process, getattr(signal, number))
    time.sleep(0.02)
    os.killpg(process, getattr(signal, number))
    assert processes.wait(process) == (130 if number == "SIGINT" else 143)
    assert told.read_text() == ""
    assert checkpoint.load(run / "last.pt")["trainer"]["steps"] > 0


def test_a_parent_that_takes_no_more_batches_is_no_news(capfd: pytest.CaptureFixture[str]) -> None:
    for error in (BrokenPipeError("left"), EOFError(), ValueError("a fault")):
        workers._tell_unless_left(type(error), error, None)
    assert capfd.readouterr().err == "ValueError: a fault\n"


class _NoRoom:
    def __getitem__(self, index: int) -> int:
        return index


class _Unsendable:
    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


@dataclass
class _Trouble:
    """Puts batches together until the third image, which brings it."""

    kind: str

    def __call__(self, items: list[int]) -> Any:
        if items[0] == 2:
            if self.kind == "killed":
                time.sleep(1)  # the batch before is on its way
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "no room":
                return _Unsendable()
            time.sleep(60)
        return items


@pytest.mark.parametrize("trouble", ["killed", "no room", "stuck"])
def test_workers_that_are_gone_or_stuck_are_noticed(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK_EVERY", 1)
    batches = workers.read_in_workers(_NoRoom(), [[0, 1], [2, 3]], _Trouble(trouble), 1)  # type: ignore[arg-type]  # it has items, and need be no Dataset
    assert next(batches) == [0, 1]
    monkeypatch.setattr(workers, "LONGEST_WAIT", 2 if trouble == "stuck" else 300)  # a worker's start may take longer
    begun = time.monotonic()
    with pytest.raises(workers.WorkersLostError, match=r"--workers that read images stopped .*shm"):
        next(batches)
    assert time.monotonic() - begun < 60


def test_an_image_that_cannot_be_read_any_more_saves_first(cli: Command, pictures: Path) -> None:
    flags = [*_with_workers(pictures), "--workers", 0, "--recovery-interval", 0]
    (pictures / "train" / "b" / "3.png").write_bytes((pictures / "train" / "b" / "3.png").read_bytes()[:-3000])
    told = cli("train", *flags)
    assert told.code == 2
    assert "b/3.png" in told.err
    saved = checkpoint.load(pictures.parent / "run" / "last.pt")["trainer"]["steps"]
    assert f"--resume {pictures.parent / 'run'}" in told.err
    assert saved < 4


# One owner per folder


def test_a_folder_has_one_owner(tiny: Options, processes: Processes, tmp_path: Path) -> None:
    run, told = loop.run(TrainConfig.of(**tiny(epochs=1))).folder, tmp_path / "stderr"
    owner = RunFolder(run)
    with pytest.raises(UserError, match="in use by another run of this process"):
        RunFolder(run)
    assert processes.run(["train", "--resume", run], stderr=told) == 2
    assert "is in use by another process" in told.read_text()
    owner.close()
    assert processes.run(["train", "--resume", run]) == 0


def test_runs_without_a_name_that_start_at_once_get_folders_of_their_own(processes: Processes, tmp_path: Path) -> None:
    fixed = "import time; time.strftime = lambda *_: 'now'"
    command = ["train", *_flags(tmp_path)[:-2]]
    started = [processes.start(command, code=fixed) for _ in range(3)]
    assert [processes.wait(process) for process in started] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"now-digits-feature{end}" for end in ("", "-2", "-3")]


@pytest.mark.parametrize("resumed", [False, True])
def test_what_was_killed_before_it_had_a_name_is_swept_away(tiny: Options, resumed: bool) -> None:
    config = TrainConfig.of(**tiny(epochs=1))
    output = Path(config.reports.output)
    run = loop.run(config).folder
    (output / ".1-1.starting").mkdir()  # killed before it had its lock
    (output / ".1-2.starting").mkdir()
    (output / ".1-2.starting" / ".lock").touch()
    (output / ".1-2.starting" / "config.yaml").touch()
    alive = RunFolder.create(output)
    if resumed:
        loop.resume(run)
    else:
        loop.run(config.changed(experiment="another"))
    assert list(output.glob(".*.starting")) == [alive.path]
    alive.close()


def test_a_folder_that_another_process_swept_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        if self.suffix == ".starting" and not swept:
            swept.append(self)
            self.rmdir()

    real, swept = Path.mkdir, list[Path]()
    monkeypatch.setattr(Path, "mkdir", mkdir)
    folder = RunFolder.create(tmp_path)
    assert list(tmp_path.iterdir()) == [folder.path] != swept
    folder.close()


def test_rows_are_repaired(tiny: Options) -> None:
    run = loop.run(TrainConfig.of(**tiny(epochs=3))).folder
    rows = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(
        rows[0] + rows[2] + b'[1]\n{"epoch": 2, "to\n' + rows[0] + rows[1].strip() + b"\n\xff"
    )
    loop.resume(run)
    assert (run / "metrics.jsonl").read_bytes().splitlines(keepends=True) == rows


# The disk


def test_a_full_disk_is_told_and_loses_nothing(processes: Processes, tmp_path: Path) -> None:
    for limit, wrong in islice(disk.trials(processes, tmp_path / "disk", seed=0), 8):
        assert not wrong, f"{limit} bytes: {wrong}"


def test_a_disk_that_has_room_again_within_the_minutes_is_no_end(processes: Processes, tmp_path: Path) -> None:
    run, told = tmp_path / "run", tmp_path / "stdout"
    patience = "import fastlocal.train.run_folder as f; f.RETRY_EVERY = 0.1; " + disk.LIMIT.format(10**9)
    flags = [*_flags(tmp_path), "--epochs", 1000, "--recovery-interval", 1]
    process = processes.start(["train", *flags], code=patience, stdout=told)
    _wait_for(run / "previous.pt")
    resource.prlimit(process, resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    for _ in range(1200):
        if "trying again for 10 minutes" in told.read_text():
            break
        time.sleep(0.05)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saved = (run / "last.pt").stat().st_mtime_ns
    while (run / "last.pt").stat().st_mtime_ns == saved:
        time.sleep(0.05)
    os.kill(process, signal.SIGTERM)
    assert processes.wait(process) == 143


def test_a_folder_that_is_gone_is_told(tiny: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.steps == 5:
            (tmp_path / "runs" / "tiny").rename(tmp_path / "elsewhere")
        return real(self, *arguments, **options)

    real = fastlocal.LocalTrainer.step
    monkeypatch.setattr(fastlocal.LocalTrainer, "step", step)
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        loop.run(TrainConfig.of(**tiny(save_retry=0)))
    assert checkpoint.load(tmp_path / "elsewhere" / "last.pt")["progress"]["epoch"] == 1


# Names


def test_a_symlinked_checkpoint_is_followed(tiny: Options, tmp_path: Path) -> None:
    run = loop.run(TrainConfig.of(**tiny(epochs=1))).folder
    (run / "last.pt").rename(tmp_path / "far.pt")
    (run / "last.pt").symlink_to(tmp_path / "far.pt")
    folder = RunFolder(run)
    folder.commit({"mark": 1})
    folder.close()
    assert (run / "last.pt").is_symlink()
    assert checkpoint.read_tree(tmp_path / "far.pt")["mark"] == 1
    assert checkpoint.load(run / "previous.pt")["progress"]["epoch"] == 1


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".x", "a\x1b[31m", "a\nb", "x" * 300])
def test_an_experiment_is_the_name_of_one_folder(name: str, cli: Command, flags: Any) -> None:
    told = cli("train", *flags(experiment=name))
    assert told.code == 2
    assert "--experiment must be" in told.err
    assert "\x1b" not in told.err
