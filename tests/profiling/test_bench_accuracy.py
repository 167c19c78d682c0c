"""``fastlocal bench accuracy`` trains each run once, goes on with what was stopped, and reports side by side."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlocal import LocalTrainer
from fastlocal.profiling import results
from fastlocal.profiling.accuracy import plots, recipe, study, table
from fastlocal.profiling.accuracy.cost import flops_ratio
from fastlocal.profiling.cli import bench
from fastlocal.train.config import TrainConfig

ROOT = Path(__file__).parents[2]
TINY = [
    *("--model", "vit_tiny_patch16_224", "--model-kwargs", "patch_size=2", "embed_dim=16", "depth=3", "num_heads=2"),
    *("--modules", "3", "--epochs", "2", "--batch-size", "16", "--train-limit", "64", "--val-limit", "40"),
]
# Accuracies in the README's sentences.
QUOTED = {
    "digits": [("cross-entropy", "85.19 ± 4.32"), ("feature", "98.24 ± 0.16"), ("end-to-end", "96.67 ± 1.11")],
    "finetune": [("feature", "71.41 ± 1.20")],
}
VIT = {"model": "vit_tiny_patch16_224", "model_kwargs": {"patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}}
STUDY = recipe.Recipe(
    base={**VIT, "modules": 2, "epochs": 2, "exact_epochs": 0, "batch_size": 16, "train_limit": 64, "val_limit": 40},
    tasks={"digits": {"data": "digits"}},
    variants={
        "end-to-end": {"objective": "end-to-end"},
        "feature": {"objective": "feature"},
        "finish": {"objective": "feature", "exact_epochs": recipe.OfEpochs(0.5)},
    },
    seeds=(7,),
    published={("digits", "feature"): 99.25},
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def arguments() -> list[str]:
    return ["accuracy", *TINY, "--results", "rows", "--objectives", "feature", "end-to-end"]


def test_each_objective_is_trained_once(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # into a pipe: as it is
    assert bench(arguments) == 0
    first = capsys.readouterr().out
    assert "| module 1 % | module 2 % | accuracy % |" in first

    monkeypatch.setattr(LocalTrainer, "step", None)  # what is done is read, not trained again
    assert bench(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == first.splitlines()[-4:]
    rows = results.read_rows(Path("rows/accuracy/objectives.jsonl"))
    assert [row["objective"] for row in rows] == ["feature", "end-to-end"]
    assert [len(row["accuracy"]) for row in rows] == [3, 1]


def test_a_stopped_campaign_goes_on(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    step = LocalTrainer.step
    steps = 0

    def counted(self: LocalTrainer, *batch: torch.Tensor, **options: Any) -> object:
        nonlocal steps
        steps += 1
        if steps == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *batch, **options)

    monkeypatch.setattr("fastlocal.profiling.accuracy.cost.flops_ratio", lambda *_: 1.0)  # it runs steps too, dry ones
    monkeypatch.setattr(LocalTrainer, "step", counted)
    assert bench(arguments) == 130
    assert bench(arguments) == 0
    assert steps == 2 * 2 * 4  # two objectives, two epochs, four steps: none is done twice


def test_speed_and_memory_are_those_of_the_machine_that_a_run_ended_on(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LocalTrainer.step

    def stopping(self: LocalTrainer, *batch: torch.Tensor, **options: Any) -> object:
        if Path("runs").exists() and any(Path("runs").glob("*/metrics.jsonl")):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *batch, **options)

    monkeypatch.setattr("fastlocal.profiling.accuracy.cost.flops_ratio", lambda *_: 1.0)
    monkeypatch.setattr(LocalTrainer, "step", stopping)
    assert bench([*arguments[:-2], "feature"]) == 130
    (metrics,) = Path("runs").glob("*/metrics.jsonl")
    first = json.loads(metrics.read_text())
    assert first["device"] == "CPU"
    first |= {"device": "NVIDIA H100", "images_per_second": 1e9, "peak_memory_bytes": 2**60}
    metrics.write_text(json.dumps(first) + "\n")

    monkeypatch.setattr(LocalTrainer, "step", step)
    monkeypatch.setattr(results, "origin", lambda: {"card": "a card beside", "commit": "", "date": "", "torch": ""})
    assert bench([*arguments[:-2], "feature"]) == 0
    (row,) = results.read_rows(Path("rows/accuracy/objectives.jsonl"))
    assert row["card"] == "CPU"
    assert len(row["curve"]) == 2
    assert row["images_per_second"] < 1e8
    assert row["peak_bytes"] < 2**50


def test_runs_side_by_side_write_the_rows_of_runs_in_turn(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench([*arguments, "--results", "in-turn", "--output", "in-turn"]) == 0
    capsys.readouterr()
    assert bench([*arguments, "--jobs", "2"]) == 0
    assert re.search(r"^2/2  runs/objectives-digits-", capsys.readouterr().out, re.MULTILINE)
    found, expected = (
        {
            row["variant"]: (row["curve"], row["flops_ratio"])
            for row in results.read_rows(Path(folder, "accuracy/objectives.jsonl"))
        }
        for folder in ("rows", "in-turn")
    )
    assert found == expected
    assert len(list(Path("runs").glob("*.log"))) == 2

    # One fails and the other is done; the sentence is the run's own.
    Path("rows/accuracy/objectives.jsonl").unlink()
    (folder,) = Path("runs").glob("*-feature-*-seed-*/last.pt")
    folder.write_bytes(b"no checkpoint")
    assert bench([*arguments, "--jobs", "2"]) == 2
    sentence = capsys.readouterr().err
    assert "1 of 2 runs failed; runs/objectives-digits-feature" in sentence
    assert "last.pt" in sentence.partition("ends with: ")[2]
    assert [row["variant"] for row in results.read_rows(Path("rows/accuracy/objectives.jsonl"))] == ["end-to-end"]

    for wrong, sentence in (
        (["--jobs", "0"], "--jobs must be 1 or more, got 0."),
        (["--jobs", "2", "--output", "rows/accuracy/objectives.jsonl"], "cannot be written: File exists."),
    ):
        assert bench([*arguments, *wrong]) == 2
        assert sentence in capsys.readouterr().err


def test_a_signal_saves_all_runs_that_are_side_by_side(arguments: list[str]) -> None:
    """They say nothing to the terminal and stop together, each with a state to go on from."""
    command = [sys.executable, "-m", "fastlocal", "bench", *arguments, "--epochs", "300", "--jobs", "2"]
    process = subprocess.Popen(command, cwd=Path.cwd(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(Path("runs").glob("*/metrics.jsonl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (143, b"")
    assert len(list(Path("runs").glob("*/last.pt"))) == 2
    assert not Path("rows/accuracy/objectives.jsonl").exists()


def test_runs_with_other_options_are_not_mixed_in(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(arguments) == 0
    for wrong, sentence in (
        (["--lr", "0.1"], "is a run with other options"),
        (["--objective", "image"], "--objectives says what is compared"),
        (["--objectives", "featur"], "invalid choice: 'featur'"),
        (["--recipe", "papier"], "did you mean 'paper'?"),
        (["--recipe", "paper"], "--variants says what is compared"),
    ):
        assert bench([*arguments, *wrong]) == 2
        assert sentence in capsys.readouterr().err
    for wrong, sentence in (
        (["--tasks", "SVNH"], "did you mean 'SVHN'?"),
        (["--variants", "feature"], "'feature' is not one of"),
        (["--seed", "1"], "--seeds says which"),
    ):
        assert bench(["accuracy", "--recipe", "paper", *wrong]) == 2
        assert sentence in capsys.readouterr().err


def test_a_study_has_a_row_per_run_and_tells_price_and_gap(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "load", lambda name: STUDY)
    monkeypatch.setattr(recipe, "names", lambda: ["tiny"])
    assert bench(["accuracy", "--recipe", "tiny", "--results", "rows"]) == 0
    path = Path("rows/accuracy/tiny.jsonl")
    rows = results.read_rows(path)
    assert [(row["seed"], row["variant"]) for row in rows] == [(7, variant) for variant in STUDY.variants]
    exact, feature, finish = rows[:3]
    assert finish["options"]["exact_epochs"] == 1
    assert finish["curve"][0] == feature["curve"][0]  # the same run up to the finish
    assert finish["flops_ratio"] == pytest.approx((feature["flops_ratio"] + exact["flops_ratio"]) / 2, rel=0.02)
    assert (exact["train_images"], exact["validation_images"]) == (64, 40)
    assert exact["peak_bytes"] > 0

    text = Path("rows/accuracy/tiny.md").read_text()
    assert "99.25" in text
    drawn = re.findall(r"\]\((.+?)\)", text)
    assert drawn == ["tiny-digits-2-curves.png", "tiny-digits-2-gap.png"]
    assert all((path.parent / name).stat().st_size > 10_000 for name in drawn)

    # A row counts at any commit, and goes on counting when options are added later.
    for row in rows:
        del row["options"]["cutmix"]
        row["commit"] = "old"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(LocalTrainer, "step", None)
    assert bench(["accuracy", "--recipe", "tiny", "--results", "rows"]) == 0
    assert len(results.read_rows(path)) == len(rows)


def test_exact_steps_cost_one_more_forward_of_all_modules_but_the_last() -> None:
    config = TrainConfig.of(**VIT, modules=4, objective="cross-entropy", epochs=4, exact_epochs=0)
    exact = flops_ratio(config.changed(objective="end-to-end"), 10, (8, 8), 10)
    assert exact == pytest.approx(1 + 3 / 4 / 3, rel=0.02)  # a forward is a third of a step
    assert flops_ratio(config.changed(exact_epochs=1), 10, (8, 8), 10) == pytest.approx(1 + (exact - 1) / 4, abs=0.02)


def test_frozen_parts_cost_less_than_training_the_whole_model() -> None:
    whole = TrainConfig.of(**VIT, modules=2, objective="cross-entropy", epochs=4, exact_epochs=0)
    for partly in (
        {"freeze": ("patch_embed", "pos_embed", "cls_token", "blocks.0", "blocks.1")},
        {"train": ("blocks.2", "blocks.3")},
    ):
        ratio = flops_ratio(whole.changed(**partly), 10, (8, 8), 10)
        assert ratio == pytest.approx(1 / 6 + 1 / 2, rel=0.05)  # a third of one half, all of the other


def _row(variant: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    cost = {
        "flops_ratio": 1.1,
        "images_per_second": 100.0,
        "peak_bytes": 2**20,
        "modules": 2,
        "options": {},
        "card": "CPU",
    }
    images = {
        "train_images": 64,
        "validation_images": 40,
        "curve": [[0.1, accuracy]],
        "exits": ["module 1", "module 2"],
    }
    place = {"task": "digits", "epochs": 2, "variant": variant, "seed": seed}
    return {**place, **images, **cost, "accuracy": [0.2, accuracy], **more}


def test_gaps_are_taken_seed_by_seed() -> None:
    rows = [_row("end-to-end", seed, 0.5 + seed / 10) for seed in (0, 1, 2)]
    rows += [_row("feature", seed, 0.49 + seed / 10) for seed in (1, 2, 7)]
    exact, feature = table.groups([*rows, _row("feature", 7, 0.3)])  # the later row of a seed counts
    assert feature.accuracies[7] == pytest.approx(30)
    assert feature.gap(exact) == pytest.approx([1, 1])
    text = table.markdown(STUDY, rows)
    assert "| 60.00 ± 10.00" in text
    assert "| +1.00 ± 0.00" in text
    assert "0, 1, 2" in text
    assert table.spread([50.0]) == "50.00"  # one seed has no spread


def test_a_claim_has_a_table_of_its_own() -> None:
    """Seeds that a choice was made on say less than those that it was not."""
    rows = [_row(variant, seed, 0.5 + seed / 100) for variant in ("end-to-end", "feature") for seed in (0, 1, 4)]
    choice, claim = table.markdown(replace(STUDY, seeds=(0, 1)), rows).split("\n\ndigits")
    assert "50.50 ± 0.71" in choice
    assert claim.startswith(", 64 + 40 images, 2 epochs, seeds that nothing was chosen on; ")
    assert "| 54.00 " in claim


def test_a_claim_has_pictures_of_its_own(tmp_path: Path) -> None:
    """The mean that a choice was made on must not move when others are added."""
    rows = [{**_row(variant, seed, 0.5), "model": "swin"} for variant in ("end-to-end", "feature") for seed in (7, 8)]
    drawn = [path.name for path in plots.draw("tiny", STUDY, rows, tmp_path)]
    assert drawn == [f"tiny-digits-2{seeds}-{plot}.png" for seeds in ("", "-claims") for plot in ("curves", "gap")]
    before = (tmp_path / drawn[1]).read_bytes()
    plots.draw("tiny", STUDY, [*rows, {**_row("feature", 9, 0.1), "model": "swin"}], tmp_path)
    assert (tmp_path / drawn[1]).read_bytes() == before


def test_pictures_tell_many_variants_apart_and_show_k_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda path, title, figure: figures.append(figure))
    names = ["end-to-end", *(f"variant {i}" for i in range(11))]
    rows = [_row(name, 0, 0.5, model="swin", modules=4, exits=["module 4"]) for name in names]
    plots.draw("tiny", replace(STUDY, seeds=(0,)), rows, Path())
    curves, gaps = figures
    looks = {(line.get_color(), line.get_linestyle()) for line in curves.axes[0].lines}
    assert len(looks) == len(names)
    markers = {(line.get_color(), line.get_marker()) for line in gaps.axes[1].lines if line.get_marker() in "os^"}
    assert len(markers) == len(names)
    assert list(gaps.axes[0].get_xticks()) == [4]  # a frozen module has no exit, and is one of the four


def test_speed_and_memory_are_of_one_card() -> None:
    rows = [_row("end-to-end", 0, 0.5, images_per_second=3000.0, card="H100") for _ in range(2)]
    rows += [_row("end-to-end", 1, 0.6), *(_row("feature", seed, 0.5, card="H100") for seed in (0, 1))]
    rows += [_row("image", 0, 0.4)]
    exact, _, image = table.markdown(STUDY, rows).splitlines()[-3:]
    assert "55.00 ± 7.07" in exact, "both cards' accuracies count"
    assert "3,000" in exact
    assert image.split("|")[-3].strip() == "", "not timed on that card"
    unknown = table.markdown(STUDY, [_row("end-to-end", 0, 0.5, peak_bytes=None)]).splitlines()[-1]
    assert unknown.split("|")[-2].strip() == "", "a system may not tell its peak"


def test_no_matplotlib_no_plots(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert plots.draw("tiny", STUDY, [_row("end-to-end", 0, 0.5), _row("feature", 0, 0.4)], Path()) == []
    assert "matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_is_sound(name: str) -> None:
    chosen = recipe.load(name)
    assert chosen.reference in chosen.variants
    assert {variant for _, variant in chosen.published} <= set(chosen.variants)
    found = list(recipe.jobs(name, chosen, {"epochs": 100}, list(chosen.tasks), list(chosen.variants)))
    assert len({job.config.reports.experiment for job in found}) == len(found)
    assert len({json.dumps(job.key, sort_keys=True) for job in found}) == len(found)
    documentation = (Path(recipe.recipes.__path__[0]) / f"{name}.py").read_text().split('"""')[1]
    for promise in ("Result", "Time", "Command", f"--recipe {name}"):
        assert promise in documentation


def test_options_given_override_and_other_data_gets_its_own_name() -> None:
    chosen = recipe.on(recipe.load("paper"), "folder:elsewhere")
    given = {"epochs": 3, "seeds": [5], "model_kwargs": {"window_size": 2}}
    (job,) = recipe.jobs("paper", chosen, given, ["folder:elsewhere"], ["end-to-end"])
    assert (job.config.optimization.epochs, job.config.optimization.seed) == (3, 5)
    assert job.config.model.model_kwargs == {"window_size": 2}
    assert job.task == "folder:elsewhere"
    assert study.find(job, [_row("end-to-end", 5, 0.5)]) is None


@pytest.mark.parametrize(
    "path", sorted((ROOT / results.RESULTS / "accuracy").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_what_is_shown_is_what_the_rows_say(path: Path) -> None:
    rows = results.read_rows(path)
    text = table.markdown(recipe.load(path.stem), rows)
    assert path.with_suffix(".md").read_text().startswith(text)
    if path.stem == "swin_cifar":  # the README's
        _note, _heading, shown, *_ = text.split("\n\n")
        assert shown in (ROOT / "README.md").read_text()
        quoted = re.findall(r"\d\d\.\d\d ± \d\.\d\d", " ".join((LocalTrainer.__doc__ or "").split()))
        fine_tuned = path.with_name("finetune.md").read_text()
        assert len(quoted) == 7
        assert all(f"| {number} |" in shown + fine_tuned for number in quoted)
    readme = " ".join((ROOT / "README.md").read_text().split())
    for variant, number in QUOTED.get(path.stem, []):
        assert number in readme
        assert re.search(rf"\| {variant} +\|.*\| {number} +\|", text)
    for row in rows:
        assert {"commit", "date", "torch", "curve", "flops_ratio", "peak_bytes", "images_per_second"} <= row.keys()


def test_the_readmes_table_of_claims_is_what_the_rows_say() -> None:
    measured = {
        (table.spread(list(group.accuracies.values())), f"{group.mean('flops_ratio'):.2f}")
        for path in (ROOT / results.RESULTS / "accuracy").glob("*.jsonl")
        for tier in table.tiers(recipe.load(path.stem), results.read_rows(path))
        for group in tier.groups
        if tier.claims
    }
    readme = (ROOT / "README.md").read_text().replace("**", "")
    told = re.findall(r"(\d\d\.\d\d ± \d\.\d\d), (\d\.\d\d) ×", readme)
    assert len(told) == 11
    assert set(told) <= measured


@pytest.mark.parametrize("task", recipe.load("paper").tasks)
def test_the_papers_table_runs_on_every_data_set(
    task: str, torchvision_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = recipe.load("paper")
    Path("data").mkdir()
    torchvision_files(Path("data"), paper.tasks[task]["data"])
    monkeypatch.setattr("fastlocal.profiling.accuracy.cost.flops_ratio", lambda *_: 1.0)
    small = [
        "--model-kwargs",
        "embed_dim=24",
        "depths=1,1,1,1",
        "num_heads=1,2,4,8",
        "--epochs",
        "2",
        "--batch-size",
        "4",
    ]
    variants = ["end-to-end", "feature, conv, K=4", "image, conv, K=2"]
    assert bench(["accuracy", "--recipe", "paper", "--tasks", task, "--variants", *variants, *small]) == 0
    text = Path("profiling/results/accuracy/paper.md").read_text()
    for variant in variants:
        assert f"| {variant} " in text
        if (task, variant) in paper.published:
            assert f"| {paper.published[task, variant]:.2f} " in text
    rows = results.read_rows(Path("profiling/results/accuracy/paper.jsonl"))
    assert [len(row["curve"]) for row in rows] == [2, 2, 2]
    assert {row["options"]["model_kwargs"]["patch_size"] for row in rows} == {4}
