"""The command line from end to end, on a run of a second."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

import fastlocal
from fastlocal.train.build import amp_dtype
from fastlocal.train.config import TrainConfig
from fastlocal.train.report import Report, Voice, by_module, wrapped

Command = Callable[..., Any]
Flags = Callable[..., list[str]]


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fastlocal.train.cli import main; main(['--help'])\n"
        "print([name for name in ('torch', 'timm', 'numpy', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("train", "eval", "doctor"):
        assert command in done.stdout


def test_version_and_help_of_a_command(cli: Command) -> None:
    assert cli("--version").out == f"fastlocal {fastlocal.__version__}\n"
    helped = cli("train", "--help")
    assert helped.code == 0
    for flag in ("--model-kwargs", "--objective", "--resume", "--config", "--micro-batch", "--no-amp"):
        assert flag in helped.out


def test_doctor_names_versions_and_kernels(cli: Command) -> None:
    told = cli("doctor")
    assert told.code == 0
    assert torch.__version__.split("+")[0] in told.out
    assert timm.__version__ in told.out
    if sys.platform == "linux":
        assert re.search(r"^host memory +[\d.]+ GiB free$", told.out, re.MULTILINE)
    kernels = "kernels on cpu window_attention, attention, rotary_embedding, reconstruction_loss: PyTorch"
    assert kernels in " ".join(told.out.split())


def test_everything_reads_at_80_columns(cli: Command, flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = cli("doctor").out
    assert all(len(line) <= 80 for line in told.splitlines())
    sentences = re.findall(r"[A-Z][^.:]*\.", " ".join(told.split()))
    assert len(sentences) == len(set(sentences))
    trained = cli("train", *flags(epochs=1, log_interval=1)).out.splitlines()
    assert [line for line in trained if len(line) > 80 and not line.startswith(("run ", "done: "))] == []  # paths
    assert any(re.fullmatch(r"    val accuracy module 1: [\d.]+ %  2: [\d.]+ %.*", line) for line in trained)


def test_numbers_are_labelled_by_module_and_lines_break_between_them() -> None:
    exits = [f"module {i}" for i in range(1, 25)]
    words = by_module(exits, ["100.0 %"] * 24)
    assert words[:2] == ["module 1: 100.0 %", "2: 100.0 %"]
    lines = wrapped(["    val accuracy", *words], 17, 80)
    assert "".join(lines).count("100.0 %") == 24
    assert all(len(line) <= 80 and not line.endswith(":") for line in lines)
    assert all(line.startswith(" " * 17) for line in lines[1:])
    assert by_module(["module 4"], ["2.0"]) == ["2.0"]


def test_validation_moves_the_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Voice, "isatty", lambda self: True)
    with Report(TrainConfig.of(), tmp_path, 5, ["module 1"], 0) as report:
        seen = [(batch, report._progress.tasks[0].completed) for batch in report.validating(iter("abc"), 3)]
        bar = report._progress.tasks[0]
    assert seen == [("a", 0), ("b", 1), ("c", 2)]
    assert (bar.description, bar.completed, bar.total) == ("validation", 3, 3)


def test_train_then_evaluate_then_plain_timm(cli: Command, flags: Flags, tmp_path: Path) -> None:
    trained = cli("train", *flags(epochs=3, lr=3e-3))
    assert trained.code == 0, trained.err
    assert "epoch 3/3" in trained.out
    folder = tmp_path / "runs" / "tiny"
    assert {file.name for file in folder.iterdir()} == {
        *(
            "config.yaml",
            "curves.png",
            "metrics.jsonl",
            "last.pt",
            "previous.pt",
            "best.pt",
            "model.safetensors",
            "config.json",
            ".lock",
        )
    }

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["exits"] == ["module 1", "module 2", "module 3", "module 4"]
    for name in ("loss", "regularizer", "accuracy", "gradient_norm", "validation_loss", "validation_accuracy"):
        assert len(rows[-1][name]) == 4, name
    assert rows[-1]["loss"][-1] < rows[0]["loss"][-1]
    assert rows[-1]["images_per_second"] > 0
    assert rows[-1]["peak_memory_bytes"] > 2**20
    assert rows[0]["lr"] > rows[-1]["lr"] > 0
    best = max(rows, key=lambda row: row["validation_accuracy"][-1])

    told = json.loads(cli("eval", folder, "--json").out)
    assert told["images"] == 40
    assert told["accuracy"] == pytest.approx(best["validation_accuracy"])
    assert told["loss"] == pytest.approx(best["validation_loss"], rel=1e-5)
    assert "module 4" in cli("eval", folder / "last.pt", "--val-limit", 20).out

    # The exported file is an ordinary timm model, with all it takes to use it.
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        about = file.metadata()
    model = timm.create_model(about["model"], num_classes=10, **json.loads(about["model_kwargs"])).eval()
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    from fastlocal.train.config import TrainConfig
    from fastlocal.train.data import read
    from fastlocal.train.options.files import read_file

    config = TrainConfig.of(**read_file(folder / "config.yaml"))
    split = read(config, {"input_size": (3, 224, 224)}).validation
    images, labels = next(split.batches([torch.arange(40)], None))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in json.loads(about["normalize"]))
    with torch.no_grad():
        predicted = model((images.float() / 255 - mean) / std).argmax(1)
    assert (predicted == labels).float().mean().item() == pytest.approx(told["accuracy"][-1])


def test_the_digits_recipe_learns(cli: Command, tmp_path: Path) -> None:
    # The whole recipe, 30 epochs, is `make demo` and reaches 99 %; 12 epochs reach 94 %.
    trained = cli("train", "--epochs", 12, "--output", tmp_path, "--experiment", "digits")
    assert trained.code == 0, trained.err
    row = json.loads((tmp_path / "digits" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["validation_accuracy"][-1] > 0.9
    assert row["validation_accuracy"][1] > 0.5  # early exits are trained, too


def test_a_file_of_options_and_flags_over_it(cli: Command, flags: Flags, tmp_path: Path) -> None:
    assert cli("train", *flags(epochs=1)).code == 0
    file = tmp_path / "runs" / "tiny" / "config.yaml"
    again = cli("train", "--config", file, "--experiment", "again")
    assert again.code == 0, again.err
    one, other = (
        safetensors.torch.load_file(file.parents[1] / name / "model.safetensors") for name in ("tiny", "again")
    )
    assert all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(
    number: signal.Signals, cli: Command, flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fastlocal.LocalTrainer.step

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.steps == 1:
            os.kill(os.getpid(), number)
        return real(self, *arguments, **options)

    monkeypatch.setattr(fastlocal.LocalTrainer, "step", step)
    stopped = cli("train", *flags(epochs=1))
    assert stopped.code == 128 + number
    line = next(line for line in stopped.out.splitlines() if line.startswith("stopped"))
    command = shlex.split(line.partition(": ")[2])
    assert command[:3] == ["fastlocal", "train", "--resume"]
    resumed = cli(*command[1:])
    assert resumed.code == 0, resumed.err
    assert "epoch 1/1" in resumed.out


def test_synthetic_data_say_what_they_are_for(cli: Command, flags: Flags) -> None:
    trained = cli("train", *flags(data="synthetic", epochs=1, model_kwargs={**_tiny_model(), "img_size": 8}))
    assert trained.code == 0, trained.err
    assert "only the throughput" in trained.out


def test_moving_average_is_measured_and_exported(cli: Command, flags: Flags, tmp_path: Path) -> None:
    trained = cli("train", *flags(epochs=2, model_ema=True, model_ema_decay=0.5, lr=3e-3))
    assert trained.code == 0, trained.err
    folder = tmp_path / "runs" / "tiny"
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["ema_validation_loss"] != row["validation_loss"][-1]
    told = json.loads(cli("eval", folder / "last.pt", "--json").out)
    assert told["exits"][-1] == "moving average"
    assert told["loss"][-1] == pytest.approx(row["ema_validation_loss"], rel=1e-5)
    saved = torch.load(folder / "best.pt", weights_only=True)["trainer"]["ema"]
    exported = safetensors.torch.load_file(folder / "model.safetensors")
    assert all(torch.equal(exported[name], saved[name]) for name in exported)


def test_a_terminal_gets_a_progress_bar(cli: Command, flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    trained = cli("train", *flags(epochs=1, log_interval=1))
    assert trained.code == 0, trained.err
    assert "epoch 1/1" in trained.out


def test_an_image_folder_of_large_images_trains(cli: Command, flags: Flags, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 256, (70, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    trained = cli(
        *("train", *flags(data=f"folder:{tmp_path / 'images'}", epochs=1, batch_size=4, workers=1)),
        *("--model-kwargs", "img_size=32", "patch_size=8", "embed_dim=16", "depth=4", "num_heads=2"),
    )
    assert trained.code == 0, trained.err
    assert "8 + 8 images, 32 pixels" in trained.out


def _tiny_model() -> dict[str, Any]:
    return {"patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -u -c 'from fastlocal.train.cli import main; raise SystemExit(main([]))'"
    shell = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, cwd="/"
    )
    assert (shell.returncode, shell.stderr) == (0, "")


def test_host_memory_that_cannot_hold_the_idle_modules_is_refused_before_it_is_filled(
    cli: Command, flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastlocal.train.build.host_available", lambda: 2**10)
    told = cli("train", *flags(residency="module"))
    assert told.code == 2
    assert "error: --residency module keeps" in told.err
    assert "the host than the weights, which has 0.00 MiB free" in told.err.replace("\n", " ")
    assert cli("train", *flags(epochs=1)).code == 0  # nothing is kept there with --residency all


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_without_units_for_bfloat16_computes_in_float32(
    has: bool, cli: Command, flags: Flags, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Emulated, it would take ten times as long; said, and --amp-dtype has it all the same."""
    monkeypatch.setattr("fastlocal.train.build.has_bfloat16", lambda: has)
    given = TrainConfig.of(amp=True)
    assert amp_dtype(given, torch.device("cpu")) == (torch.bfloat16 if has else None)
    assert amp_dtype(given.changed(amp_dtype="bfloat16"), torch.device("cpu")) == torch.bfloat16
    assert amp_dtype(given, None) == torch.bfloat16  # a plan for a card that is not here
    told = cli("train", *flags(epochs=1), "--amp", "--output", tmp_path)
    assert told.code == 0
    assert ("--amp computes in float32: this CPU has no units for bfloat16" in told.out) != has
    if not has:
        low = cli("train", *flags(epochs=1), "--amp", "--residency", "module", "--weights", "low")
        assert low.code == 2
        assert "--weights low has nothing to cast to" in low.err
