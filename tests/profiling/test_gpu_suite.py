"""The suite: its parts judge what they measure and go on where they stopped; the script says what is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlocal.memory import cublas_workspaces, dry_run
from fastlocal.planner.cards import card_named
from fastlocal.planner.search import _cuts
from fastlocal.profiling import memory, results
from fastlocal.profiling.card import suite
from fastlocal.profiling.card.throughput import Setup, baseline, create_model
from fastlocal.profiling.kernels import timing, workloads
from fastlocal.profiling.kernels.workloads import OURS, Provider, Workload

SCRIPT = Path(suite.__file__).resolve().parents[1] / "gpu_suite.sh"
LOSS = Workload("reconstruction_loss", "Swin-T stage 4", workloads._reconstruction_loss(4, 16, 2, 8))

H100 = Path(__file__).parents[2] / results.RESULTS / "nvidia-h100-80gb-hbm3"


def _rows(output: Path, name: str) -> list[dict[str, Any]]:
    return results.read_rows(next(output.glob(f"*/{name}.jsonl")))


def _run(output: Path, *parts: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT": str(output), "CUDA_VISIBLE_DEVICES": "", **more}
    return subprocess.run(["bash", str(SCRIPT), *parts], capture_output=True, text=True, env=environment, timeout=300)


def test_the_script_knows_every_part() -> None:
    assert f'known="{" ".join(suite.PARTS)}"' in SCRIPT.read_text()


def test_an_unknown_part_gets_a_sentence(tmp_path: Path) -> None:
    done = _run(tmp_path, "kernels", "everything")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_suite: there is no part 'everything'; there are: correctness kernels")
    assert not done.stdout


def test_without_a_card_the_script_says_what_is_missing(tmp_path: Path) -> None:
    done = _run(tmp_path, "kernels")
    assert done.returncode == 0, done.stderr
    assert "Missing without a card: the timing of every fused op" in done.stdout
    assert "| kernels     | ok " in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_too_old_is_told(tmp_path: Path) -> None:
    metadata = tmp_path / "site" / "timm-0.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.9\n")
    done = _run(tmp_path / "rows", "kernels", PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^gpu_suite: fastlocal .*timm>=.*, but you have timm 0\.9", done.stderr, re.MULTILINE)


def test_correctness_is_checked_once_per_commit_and_a_wrong_op_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workloads, "workloads", lambda: [LOSS])
    assert suite.correctness(tmp_path, None) == 0
    assert [(row["dtype"], row["error"]) for row in _rows(tmp_path, "correctness")] == [
        ("float32", None),
        ("bfloat16", None),
    ]

    def off(*arguments: Any) -> workloads.Problem:
        problem = LOSS.problem(*arguments)
        right = problem.providers[OURS]
        wrong = Provider(lambda: right.run() * 1.1, right.leaves) if arguments[1] != torch.float64 else right
        return replace(problem, providers={**problem.providers, OURS: wrong})

    monkeypatch.setattr(workloads, "workloads", lambda: [replace(LOSS, problem=off)])
    assert suite.correctness(tmp_path, None) == 0  # all there already
    assert len(_rows(tmp_path, "correctness")) == 2
    assert suite.correctness(tmp_path / "again", None) == 1
    assert all("relative error" in row["error"] for row in _rows(tmp_path / "again", "correctness"))
    assert "2 wrong" in capsys.readouterr().out


def test_kernels_are_timed_a_workload_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def time_kernels(bench: object, chosen: list[Workload], path: Path) -> None:
        timed.extend(chosen)
        row = {"bench": "kernels", "op": chosen[0].op, "shape": chosen[0].shape, "dtype": "bfloat16", "provider": OURS}
        results.append_row(path, {**row, "direction": "check", "error": "off" if chosen[0] is LOSS else None})

    other = replace(LOSS, shape="another")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results, "origin", lambda: dict.fromkeys(("card", "torch", "triton", "commit"), "a"))
    monkeypatch.setattr(timing, "cuda_bench", object)
    monkeypatch.setattr(timing, "time_kernels", time_kernels)
    monkeypatch.setattr(workloads, "workloads", lambda: [other])
    assert suite.kernels(tmp_path, None) == 0
    monkeypatch.setattr(workloads, "workloads", lambda: [other, LOSS])
    assert suite.kernels(tmp_path, None) == 1  # LOSS is off
    assert timed == [other, LOSS]


def test_the_dry_run_and_the_meter_agree(tmp_path: Path) -> None:
    assert suite.meter(tmp_path, None) == 0
    rows = _rows(tmp_path, "meter")
    assert {row["setup"]["family"] for row in rows} == {"rival", "local", "exact"}
    assert all(abs(row["predicted_of_true"] - 1) < 0.05 for row in rows)
    assert len({round(row["metered_mib"], 2) for row in rows}) == len(rows)


def test_training_is_judged_by_its_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastlocal.train import loop

    configs = []

    def run(config: Any) -> Any:
        configs.append(config)
        best = 0.9 if config.learning.objective == "feature" else 0.1
        return SimpleNamespace(accuracy=(0.5, best), best_accuracy=best)

    monkeypatch.setattr(loop, "run", run)
    assert suite.train(tmp_path, None) == 1  # a tenth is chance
    assert [config.learning.objective for config in configs] == ["feature", "end-to-end"]
    assert not any(Path(config.reports.output).exists() for config in configs)
    assert "0.9" in capsys.readouterr().out


def test_training_without_its_packages_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = suite.importlib.util.find_spec
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None if name == "yaml" else find(name))
    assert suite.train(tmp_path, None) == 0
    assert "training needs yaml, which this machine does not have" in capsys.readouterr().out


def test_the_planned_set_up_is_the_one_that_the_plan_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step in a dry run needs what the planner says."""
    monkeypatch.setattr(suite, "PLANNED", "200MiB")
    with torch.device("meta"):
        model = create_model("swin_tiny_patch4_window7_224", baseline())
    like = Setup("local", 8, True, 4, "feature", "linear", "module")
    setup, peak = suite.planned(model, like, 8)
    assert setup != like
    assert memory.meter_step(model, setup, 8).peak + cublas_workspaces("cuda") == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(
    "row",
    [row for row in results.read_rows(H100 / "meter.jsonl") if "planner" not in row["name"]],
    ids=lambda row: row["name"],
)
def test_dry_runs_foretell_what_an_h100_allocated(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed rows were taken before sums were counted: their own predictions are lower."""
    h100 = SimpleNamespace(max_threads_per_multi_processor=2048, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    with torch.device("meta"):
        model = create_model(row["model"], baseline())
    peak = memory.meter_step(model, Setup(**row["setup"]), row["batch_size"], torch.device("cuda", 0)).peak
    assert (peak + cublas_workspaces("cuda")) / suite.MIB == pytest.approx(row["allocated_mib"], rel=suite.TOLERANCE)


def test_the_planner_ranks_by_what_an_h100_took() -> None:
    """Seconds of a step, estimated without a card, are within a third of what the committed rows of eager set-ups say."""
    rows = [row for row in results.read_rows(H100 / "throughput.jsonl") if not row["compile"]]
    with torch.device("meta"):
        model = create_model(rows[0]["model"], baseline())
    for objective in ("end-to-end", "feature"):
        with dry_run():
            cuts = list(_cuts(model, 64, objective, True, {"amp_dtype": torch.bfloat16}, lambda _: None))
        for row in (row for row in rows if row["objective"] == objective):
            (cut,) = (cut for cut, _ in cuts if len(cut.spans) == row["modules"])
            recompute = "block" if row["recompute"] else "none"
            way = cut.plan(
                row["micro_batch"] or 64, recompute, row["residency"], "device", "full", True, card_named(row["card"])
            )
            assert way.seconds == pytest.approx(row["batch_size"] / row["images_per_s"], rel=0.33), row["name"]
