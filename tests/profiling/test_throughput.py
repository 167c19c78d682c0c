"""Throughput and caps: what is compared is what the names say, the arithmetic of pairs, and the search for a size."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlocal.profiling import results
from fastlocal.profiling.card import caps, throughput
from fastlocal.profiling.card.campaign import Campaign
from fastlocal.profiling.card.throughput import Setup, Training, baseline
from fastlocal.profiling.cli import bench

CPU = torch.device("cpu")


# --- Set-ups ----------------------------------------------------------------------------------------------------------


def test_every_setup_has_a_name_of_its_own() -> None:
    setups = [*throughput.rivals("swin_tiny", 8), *throughput.ours([2, 4], 8, [("triton", False), ("triton", True)])]
    assert len({setup.label for setup in setups}) == len(setups) == len(set(setups))
    assert setups[0] == baseline()


def test_rivals_have_their_best_settings() -> None:
    swin, vit = throughput.rivals("swin_tiny", 8), throughput.rivals("vit_base", 8)
    assert {setup.fused_attention for setup in swin} == {1, 2}
    assert {setup.fused_attention for setup in vit} == {0, 1}
    for setups in (swin, vit):
        for attention in {setup.fused_attention for setup in setups}:
            ways = {(s.recompute, s.micro_batch, s.compile) for s in setups if s.fused_attention == attention}
            assert ways >= {
                (False, None, True),
                (True, None, False),
                (False, 8, False),
                (True, 8, False),
                (True, 8, True),
            }


def test_attention_path_and_fast_norm_are_the_models_own() -> None:
    from timm.layers import config, fast_norm

    before = config._USE_FUSED_ATTN, fast_norm.is_fast_norm()
    paths = {}
    for value in (0, 1, 2):
        model: Any = throughput.create_model("test_vit", replace(baseline(), fused_attention=value))
        paths[value] = model.blocks[0].attn.fused_attn
        assert model.blocks[0].norm1._fast_norm
    assert paths == {0: False, 1: True, 2: True}
    assert (config._USE_FUSED_ATTN, fast_norm.is_fast_norm()) == before


def whole(parameter: Any) -> torch.Tensor:
    return parameter.detach().to_local() if hasattr(parameter, "to_local") else parameter.detach()


@pytest.mark.parametrize(
    "setup",
    [
        Setup("rival", 2, True),
        Setup("local", 2, True, 2, "feature", "linear", "module"),
        Setup("exact", 2, True, 2, residency="all"),
        *(Setup("rival", 2, True, method=name) for name in ("fsdp", "fsdp bf16", "fsdp bf16 saved")),
    ],
    ids=lambda setup: setup.label,
)
def test_a_step_trains_and_its_peak_is_metered(setup: Setup) -> None:
    with contextlib.closing(Training("test_vit", setup, 3, CPU)) as training:
        before = {name: whole(value).clone() for name, value in training.model.named_parameters()}
        training.step()
        moved = [
            name for name, value in training.model.named_parameters() if not torch.equal(whole(value), before[name])
        ]
        assert len(moved) == len(before)
        peak = throughput.measure_peak(training)
        assert peak["peak_by"] == "meter"
    parameters = sum(value.nbytes for value in before.values())
    assert (
        peak["peak_mib"] * 2**20 > (0.5 if setup.residency == "module" else 3) * parameters
    )  # + gradients, Adam states


def test_parts_of_a_rival_add_up_to_the_whole_batch() -> None:
    """Weights after one step of SGD-like size agree, whatever the size of the parts."""
    after = []
    for micro in (None, 2):
        training = Training("test_vit", Setup("rival", micro, False), 4, CPU)
        training.images, training.labels = (
            torch.arange(4 * 3 * 160 * 160).reshape(4, 3, 160, 160) % 251,
            torch.arange(4),
        )
        training.images = training.images.to(torch.uint8)
        gradients: list[torch.Tensor] = []
        training.state[1].register_step_pre_hook(
            lambda optimizer, *_, kept=gradients: kept.extend(
                p.grad.clone() for p in optimizer.param_groups[0]["params"]
            )
        )
        training.step()
        after.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    assert (after[0] - after[1]).norm() / after[0].norm() < 0.02  # bfloat16


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def test_turns_alternate_and_ratios_are_of_pairs() -> None:
    order: list[str] = []
    drift = iter([1.0, 1.0, 2.0, 2.0, 4.0, 4.0])  # the machine slows down; both feel it

    def run(name: str, factor: float) -> Any:
        def seconds() -> float:
            order.append(name)
            return factor * next(drift)

        return seconds

    pairs = throughput.take_turns(run("E2E", 1.0), run("ours", 0.5), rounds=3)
    assert order == ["E2E", "ours", "ours", "E2E", "E2E", "ours"]
    figures = throughput.summary(pairs, batch_size=8)
    assert figures == {"images_per_s": 8.0, "speed": 2.0, "speed_low": 2.0, "speed_high": 2.0}


def test_one_pair_is_a_summary_too() -> None:
    assert throughput.summary([(3.0, 1.5)], 6) == {
        "images_per_s": 4.0,
        "speed": 2.0,
        "speed_low": 2.0,
        "speed_high": 2.0,
    }


def test_share_of_copies_behind_kernels() -> None:
    def event(category: str, name: str, start: float, end: float) -> dict[str, Any]:
        return {"cat": category, "name": name, "ts": start, "dur": end - start}

    events = [
        event("kernel", "gemm", 0, 10),
        event("kernel", "softmax", 8, 12),  # overlaps the first: counted once
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 6, 16),
        event("gpu_memcpy", "Memcpy DtoD", 0, 100),  # does not cross the bus
        event("cpu_op", "aten::mm", 12, 16),
        {"ph": "M", "name": "process_name"},
    ]
    assert throughput.hidden_share(events) == {"copies_ms": 0.01, "hidden_share": 0.6}
    assert throughput.hidden_share(events[:2])["hidden_share"] is None


@pytest.mark.parametrize("fits", [0, 1, 2, 3, 5, 6, 7, 8, 31, 32, 63, 64, 100])
def test_the_largest_size_that_trains(fits: int) -> None:
    tried: list[int] = []

    def trains(size: int) -> bool:
        tried.append(size)
        return size <= fits

    found = caps.largest(trains, 64)
    assert found <= min(fits, 64)
    assert found >= 0.8 * min(fits, 64)  # two bisections leave a quarter of an octave
    assert len(tried) == len(set(tried)) <= 9
    assert sum(size > fits for size in tried) <= 3  # each of those costs a rebuild


def test_the_limit_need_not_be_a_power_of_two() -> None:
    assert caps.largest(lambda size: True, 12) == 12
    assert caps.largest(lambda size: size < 12, 12) >= 10


# --- Sessions ---------------------------------------------------------------------------------------------------------


def test_a_campaign_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jobs = [({"job": n, "cuts": (n, n)}, n) for n in range(4)]
    first = Campaign(path)
    for n in first.todo(jobs):
        first.add({"job": n, "cuts": (n, n)})
        if n == 1:
            break
    assert list(Campaign(path).todo(jobs)) == [2, 3]
    stale = [{**row, "commit": "another"} for row in results.read_rows(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in stale))
    assert list(Campaign(path).todo(jobs)) == [0, 1, 2, 3]


def test_a_campaign_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fastlocal.profiling.card.campaign.time.perf_counter", lambda: now[0])
    campaign = Campaign(tmp_path / "rows.jsonl", budget=25)
    done = []
    for n in campaign.todo([({"job": n}, n) for n in range(5)]):
        now[0] += 10
        done.append(n)
    assert done == [0, 1]  # a third would end at 30
    assert campaign.left == 3


def test_a_failure_of_ours_is_a_row_and_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(model: str, setup: Setup, *_: Any) -> dict[str, Any]:
        if setup.family == "exact":
            raise RuntimeError("no such kernel\nand more")
        if setup.recompute:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return {
            "images_per_s": 1.0,
            "speed": 1.0,
            "speed_low": 1.0,
            "speed_high": 1.0,
            "peak_mib": 2.0,
            "reserved_mib": None,
        }

    monkeypatch.setattr(throughput, "measure", measure)
    command = [
        "throughput",
        "--model",
        "test_vit",
        "--output",
        str(tmp_path),
        "--batch-size",
        "4",
        "--micro-batch",
        "2",
    ]
    assert bench([*command, "--only", "E2E"]) == 0  # a rival that does not fit is no failure
    assert bench(command) == 1
    rows = results.read_rows(next(tmp_path.glob("*/throughput.jsonl")))
    errors = {row["family"]: row["error"] for row in rows if row["recompute"]}
    assert errors == {"rival": "out of memory", "local": "out of memory", "exact": "no such kernel"}
    assert len({row["name"] for row in rows}) == len(rows)  # the second call went on after the first


def test_the_command_measures_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "test_vit", "--batch-size", "2", "--micro-batch", "1", "--modules", "2", "--rounds", "1"]
    only = ["--only", "local, feature, K=2, reference kernels, parts of 1, recompute, residency module"]
    assert bench(["throughput", *options, *only, "--output", str(tmp_path)]) == 0
    plain, ours = results.read_rows(next(tmp_path.glob("*/throughput.jsonl")))
    assert plain["name"] == "E2E"
    assert plain["speed"] == 1
    assert ours["images_per_s"] > 0
    assert 0 < ours["peak_mib"] < plain["peak_mib"]
    assert {"card", "driver", "torch", "triton", "commit", "date"} <= ours.keys()
    assert "memory, of E2E" in capsys.readouterr().out


# --- Caps -------------------------------------------------------------------------------------------------------------


def test_caps_without_a_card_are_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    class Metered:
        def __init__(self, peak: int) -> None:
            self.peak = peak

    def meter_step(_: Any, setup: Setup, batch: int) -> Metered:
        asked.append(setup)
        return Metered(3 * 2**20 if setup.family == "local" else 2**20 * (1 + 2 * batch))

    monkeypatch.setattr(caps.memory, "meter_step", meter_step)
    command = [
        "throughput",
        "--model",
        "test_vit",
        "--batch-size",
        "4",
        "--output",
        str(tmp_path),
        "--cap",
        "4MiB, 2MiB",
    ]
    assert bench(command) == 0
    rows = {(row["name"], row["cap_text"]): row for row in results.read_rows(next(tmp_path.glob("*/caps.jsonl")))}
    assert rows["E2E", "4MiB"]["largest"] == 1
    assert not rows["E2E", "2MiB"]["trains"]
    local = next(name for name, _ in rows if name.startswith("local"))
    assert rows[local, "4MiB"]["largest"] == 4
    assert not any(row["measured"] for row in rows.values())
    tried_below = len([setup for setup in asked if setup.family == "exact"])
    assert tried_below == 1  # what does not train at 4 MiB is not tried at 2
    assert "predicted by a dry run" in capsys.readouterr().out


def test_a_point_that_dies_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    point = {"model": "test_vit", "cap": 2**30, "batch_size": 2, "image_size": None, "setup": asdict(baseline())}
    monkeypatch.setattr(caps.sys, "executable", "/bin/false")
    assert caps._in_own_process(point, 60) == {"error": "the process died without a word"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "swan"], "--model must be a timm model, got 'swan'"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--only", "nothing like it"], "--only: no set-up has 'nothing like it' in its name"),
        (["--modules", "99"], "--modules must be 1 to 6, the blocks of VisionTransformer, got 99"),
        (["--trace"], "--trace needs --only TEXT"),
        (["--trace", "--only", "E2E", "--rounds", "3"], "--rounds would do nothing with --trace; leave it out."),
        (["--cap", "all", "--modules=3"], "--modules would do nothing with --cap; leave it out."),
        (
            ["--cap", "4 apples"],
            "--cap must be sizes such as 4GiB, or all on a card, separated by commas; got '4 apples'",
        ),
    ],
)
def test_a_mistake_gets_a_sentence(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(["throughput", "--model", "test_vit", "--output", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_trace_writes_a_chrome_trace(tmp_path: Path) -> None:
    training = Training("test_vit", baseline(), 1, CPU)
    assert throughput.trace(training, tmp_path / "traces" / "plain") == {"copies_ms": 0.0, "hidden_share": None}
    names = {event["name"] for event in json.loads((tmp_path / "traces" / "plain.json").read_text())["traceEvents"]}
    assert any("addmm" in name for name in names)
