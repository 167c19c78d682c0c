"""`bench scaling`: a run of two processes at its smallest, the simulated table, and what the suite says with one card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastlocal.planner.devices import sharings
from fastlocal.profiling import cli, results
from fastlocal.profiling.card import suite
from fastlocal.profiling.scaling import simulated


def test_two_processes_are_measured_against_one_and_a_pipeline(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the suite's part, which goes on where it stopped."""
    assert suite.scaling(tmp_path, None) == 0
    out = capfd.readouterr().out
    (path,) = tmp_path.glob("*/scaling.jsonl")
    rows = results.read_rows(path)
    *ours, rival = [row["name"] for row in rows]
    assert ours == ["one process", "modules", "data", "data, end-to-end"]
    assert rival.startswith("pipelining, ")
    assert all(len(row["images_per_second"]) == 1 and row["images_per_second"][0] > 0 for row in rows)
    assert rows[0]["speed_up"] == 1
    assert all(name in out for name in ours)
    assert suite.scaling(tmp_path, None) == 0
    assert len(results.read_rows(path)) == len(rows)


def test_one_card_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert suite.scaling(tmp_path, None) == 0
    assert "Missing with one card: what several gain" in capsys.readouterr().out
    assert cli.bench(["scaling", "--output", str(tmp_path)]) == 0
    assert "has one card, and scaling takes two; nothing was measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [["--processes", "5"], ["--batch-size", "12"], ["--steps", "1"], ["--rounds", "0"]])
def test_what_the_rival_cannot_do_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.bench(["scaling", *wrong]) == 2
    err = capsys.readouterr().err
    assert "it takes 2 to 4 processes" in err
    assert err.count("\n") == 1


def test_a_simulation_has_no_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.bench(["scaling", "--simulate", "--rounds", "3"]) == 2
    assert "--rounds would do nothing with --simulate; leave it out." in capsys.readouterr().err


def test_the_simulated_table_says_what_the_planner_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    monkeypatch.delenv("COLUMNS", raising=False)  # into a pipe: as it is
    name = "vit_tiny_patch16_224"
    assert simulated.simulate(tmp_path, 16, models=[name], devices=(2, 4)) == 0
    text = (tmp_path / "simulated.md").read_text()
    assert "simulated" in text
    assert text in capsys.readouterr().out
    rows = results.read_rows(tmp_path / "simulated.jsonl")
    assert [(row["link"], row["devices"]) for row in rows] == [(link, n) for link in simulated.LINKS for n in (2, 4)]
    assert all(row["commit"] for row in rows)
    (row,) = [row for row in rows if row["link"] == "10 Gbit/s" and row["devices"] == 4]
    with torch.device("meta"):
        model = timm.create_model(name)
    planned: dict[str, Any] = {}
    found, _ = sharings(model, devices=4, bandwidth=simulated.LINKS["10 Gbit/s"], batch_size=16)
    for one in found:
        if one.scaling.grid != (1, 1):
            planned.setdefault(one.scaling.way, one)
    assert set(row["ways"]) == set(planned) == {"modules", "data", "both", "pipeline"}
    for way, figures in row["ways"].items():
        one = planned[way]
        assert figures["speed_up"] == pytest.approx(one.scaling.speed_up, abs=1e-3)
        assert figures["bytes_sent"] == round(one.scaling.bytes_sent)
        if way != "pipeline":
            assert figures["peak_bytes"] == one.peak
