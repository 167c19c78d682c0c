"""The losses of training are what they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlocal.profiling import trace
from fastlocal.profiling.cli import bench
from fastlocal.train.options.learning import OBJECTIVES

RECORDED = Path(__file__).parents[2] / "profiling" / "results" / "trace" / "trace.json"


@pytest.mark.parametrize("family", trace.FAMILIES)
def test_losses_are_what_was_recorded(family: str) -> None:
    recorded = json.loads(RECORDED.read_text())
    found = [
        line
        for objective in OBJECTIVES
        for line in trace.differences(recorded, f"{family} {objective}", trace.trace(family, objective))
    ]
    assert not found, f"{found}: if this is meant, run `fastlocal bench trace --record`"


def test_a_changed_number_is_seen() -> None:
    now = trace.trace("vit", "feature")
    recorded = {"origin": trace.origin(), "traces": {"vit feature": now}}
    assert not list(trace.differences(recorded, "vit feature", trace.trace("vit", "feature")))
    changed = [*now[:-1], [now[-1][0], now[-1][1] + 1e-7]]
    assert list(trace.differences(recorded, "vit feature", changed)) == [
        f"vit feature: step 50 was {now[-1]} and is {changed[-1]}"
    ]
    elsewhere = {**recorded, "origin": {}}
    assert not list(trace.differences(elsewhere, "vit feature", changed))
    assert list(trace.differences(elsewhere, "vit feature", [[x + 0.1 for x in step] for step in now]))
    other_masks = [[now[0][0], now[0][1] + 1e-5], *now[1:]]
    assert list(trace.differences(elsewhere, "vit feature", other_masks))


def test_nothing_recorded_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["trace", "--file", str(tmp_path / "none.json")]) == 2
    assert "run once with --record" in capsys.readouterr().err
