"""The model of several devices: its limits are what arithmetic says, and its bytes are what a run sends."""

from __future__ import annotations

import pytest

from fastlocal.planner.scaling import ModuleCost, scaling

EVEN = [ModuleCost(seconds=1.0, sent=(999_936,), weights=4e6)] * 8


def by_way(devices: int, bandwidth: float, **options: int) -> dict[str, float]:
    """Speed-up of each way but "both"."""
    return {one.way: one.speed_up for one in scaling(EVEN, devices, bandwidth, **options) if one.way != "both"}


def test_even_modules_on_fast_links_scale_with_the_devices_and_a_pipeline_has_its_bubble() -> None:
    for devices in (2, 4, 8):
        found = by_way(devices, 1e15, parts=8)
        assert found["modules"] == pytest.approx(devices)
        assert found["data"] == pytest.approx(devices, rel=1e-6)
        assert found["pipeline"] == pytest.approx(devices * 8 / (8 + devices - 1))


def test_slow_links_hold_back_what_sends_most() -> None:
    found = by_way(8, 2e6)  # gradients, 2 · 7/8 · 32 MB, take 28 s, a boundary half a second
    assert found["modules"] == pytest.approx(8)
    assert found["data"] < 0.3
    (best, *_) = scaling(EVEN, 8, 2e6)
    assert best.way == "modules"
    assert best.bytes_sent == 999_936 + 512


def test_more_devices_than_modules_take_both() -> None:
    found = scaling(EVEN, 16, 1e15)
    assert [one.way for one in found if one.grid[1] > 1] == ["both"] * 3
    assert {one.grid for one in found} == {(16, 1), (8, 2), (4, 4), (2, 8)}


def test_uneven_modules_are_balanced_as_far_as_they_go() -> None:
    uneven = [ModuleCost(seconds, (1.0,), 1.0) for seconds in (3.0, 1.0, 1.0, 1.0)]
    (found,) = [one for one in scaling(uneven, 2, 1e12) if one.way == "modules"]
    assert found.speed_up == pytest.approx(2)
    assert found.balance == 1


def test_speed_ups_are_over_the_step_that_is_given() -> None:
    ways = {one.way: one for one in scaling(EVEN, 4, 1e15, alone=6.0)}
    assert ways["modules"].speed_up == pytest.approx(3)  # a local step takes 8 s on one device
    assert ways["pipeline"].speed_up == pytest.approx(4 * 8 / 11)  # its own step is the one that takes 6 s


def test_one_device_gains_nothing() -> None:
    assert [(one.way, one.speed_up) for one in scaling(EVEN, 1, 1.0)] == [("data", 1.0)]
    with pytest.raises(ValueError, match="devices must be at least 1"):
        scaling(EVEN, 0, 1.0)
