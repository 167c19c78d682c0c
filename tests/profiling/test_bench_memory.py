"""The memory benchmark: its rivals are the known ones, its short cut is exact, and it writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from fastlocal.profiling import memory
from fastlocal.profiling.cli import bench
from fastlocal.profiling.memory import MIB, Setup, count_flops, measure, meter_step, step, table
from fastlocal.profiling.memory.setups import METHODS


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    with torch.device("meta"):
        model = SwinTransformer(
            img_size=32, patch_size=2, window_size=4, embed_dim=32, depths=(1, 2), num_heads=(2, 4), num_classes=10
        )
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


@pytest.mark.parametrize(
    "setup",
    [
        Setup("rival", 2, recompute=False, tuned=False),
        Setup("rival", 2, recompute=True),
        Setup("local", 2, True, 2, "feature", "linear", "module"),
        Setup("local", 2, False, 2, "image", "conv", "all"),
        Setup("exact", 2, True, 2, residency="module"),
        Setup("exact", 3, True, 2, residency="optimizer"),  # the last part is smaller
        Setup("rival", 2, True, method="fsdp"),
    ],
    ids=lambda setup: setup.name,
)
def test_three_parts_have_the_peak_of_all(swin: nn.Module, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    short = meter_step(swin, setup, batch_size=11)
    monkeypatch.setattr(step, "representative", lambda parts: parts)
    whole = meter_step(swin, setup, batch_size=11)
    assert short.peak == whole.peak
    assert short.peak_by_kind == whole.peak_by_kind
    assert short.peak_by_device == whole.peak_by_device
    assert len(short.timeline()) < len(whole.timeline())


def test_compute_is_counted(swin: nn.Module) -> None:
    setups = {
        "plain": Setup("rival", None, recompute=False),
        "checkpointed": Setup("rival", None, recompute=True),
        "one": Setup("exact", None, False, 1),
        "two": Setup("exact", None, False, 2),
    }
    flops = {name: count_flops(swin, setup, 4) for name, setup in setups.items()}
    forward = flops["plain"] / 3
    assert flops["checkpointed"] == pytest.approx(flops["plain"] + forward, rel=0.05)
    assert flops["one"] == flops["plain"]  # one module with exact gradients is plain training
    assert flops["plain"] < flops["two"] < flops["plain"] + forward  # one more forward, of all but the last module


def test_each_method_moves_and_keeps_what_it_must(swin: nn.Module) -> None:
    """Bytes over the bus and on the host in multiples of the fp32 weights, in two parts of two samples or in one of four."""
    weights = sum(4 * p.numel() for p in swin.parameters())
    plain = meter_step(swin, Setup("rival", 2, True), 4)
    known = {  # bus, host: per part FSDP2 brings the blocks in twice and takes the gradients out
        "in-backward": (0, 0),
        "torchao": (2, 4),
        "8-bit": (0, 0),
        "lora": (0, 0),
        "badam": (0, 0),
        "fsdp": (6, 4),
        "fsdp bf16": (6, 4),
    }
    for name, (bus, host) in known.items():
        meter = meter_step(swin, Setup("rival", None if bus == 2 else 2, True, method=name), 4)
        assert meter.traffic / weights == pytest.approx(bus, rel=0.15), name
        assert meter.peak_by_device.get("host", 0) / weights == pytest.approx(host, rel=0.15), name
        assert meter.peak < plain.peak or name == "in-backward", name
    assert set(METHODS) == {*known, "fsdp saved", "fsdp bf16 saved"}
    assert all(method.lines >= 1 for method in METHODS.values())


def test_each_method_computes_what_it_must(swin: nn.Module) -> None:
    """FLOPs in forwards: one, one again for checkpointing, one for the gradients of activations, one for those of weights."""
    forward = count_flops(swin, Setup("rival", None, False, tuned=False), 4) / 3
    for name in METHODS.keys() - {"lora", "badam"}:
        assert count_flops(swin, Setup("rival", None, True, method=name), 4) / forward == pytest.approx(4, rel=0.05), (
            name
        )
    # No gradients of weights, and some for the adapters, which this Swin is small beside; frozen layers alone would be one.
    assert 3 < count_flops(swin, Setup("rival", None, True, method="lora"), 4) / forward < 6


def test_what_moves_with_the_parts_is_counted_for_all_of_them(swin: nn.Module) -> None:
    saved = measure(swin, Setup("rival", 2, True, method="fsdp saved"), 6)
    assert saved.traffic == meter_step(swin, saved.setup, 6).traffic  # three parts, all of which are run
    ours = Setup("exact", 2, True, 2, residency="module", boundaries="host", weights="low")
    assert measure(swin, ours, 6).traffic == meter_step(swin, ours, 6).traffic > 0


def test_the_known_rivals_of_swin_tiny() -> None:
    """Peaks in MiB at batch 64, with the 36.75 MiB of fp32 images."""
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10)
    known = {(8, False): 1050, (8, True): 615, (1, False): 586}
    for setup in memory.rivals(64, 8):
        if not setup.tuned and (expected := known.pop((setup.micro_batch, setup.recompute), None)) is not None:
            assert meter_step(model, setup, 64).peak / MIB == pytest.approx(expected, rel=0.002)
    assert not known


def test_the_command_writes_rows_a_table_and_its_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [Setup("rival", None, recompute, tuned=False) for recompute in (False, True)]
    monkeypatch.setattr(table, "rivals", lambda batch, part, methods: few)
    monkeypatch.setattr(
        table,
        "ours",
        lambda counts, *_: [
            Setup(f, 2, True, counts[-1], o) for f, o in (("local", "feature"), ("exact", "end-to-end"))
        ],
    )
    options = ["--model", "test_vit", "--batch-size", "4", "--micro-batch", "2", "--modules", "2"]
    options += ["--objectives", "feature", "--decoders", "linear", "--methods", "torchao", "--output", str(tmp_path)]
    assert bench(["memory", *options]) == 0
    folder = tmp_path / "memory"
    written = {path.name.removeprefix("test_vit-4") for path in folder.iterdir()}
    assert written == {
        ".jsonl",
        ".md",
    } | {f"-{plot}.{suffix}" for plot in ("timeline", "pareto", "bus") for suffix in ("png", "svg")}
    rows = [json.loads(line) for line in (folder / "test_vit-4.jsonl").read_text().splitlines()]
    assert {row["modules"] for row in rows} == {1, 2}  # a rival has one
    assert {row["family"] for row in rows} == {"rival", "local", "exact"}
    assert all(sum(row["peak_by_kind"].values()) == row["peak_bytes"] > 0 and row["flops"] > 0 for row in rows)
    assert (folder / "test_vit-4.md").read_text().count("\n|") == len(rows) + 2
    assert "E2E + checkpointing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "swan"], "--model must be a timm model, got 'swan'"),
        (["--model", "resnet18"], "resnet is not supported"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (
            ["--model", "test_vit", "--modules", "2", "99"],
            "--modules must be 1 to 6, the blocks of VisionTransformer, got 99",
        ),
        (["--model", "test_vit", "--modules", "0"], "--modules must be 1 to 6, the blocks of VisionTransformer, got 0"),
        (
            ["--model", "convnext_atto", "--image-size", "64"],
            "--image-size: timm builds no convnext_atto for 64 pixels: ",
        ),
        (["--model", "test_vit", "--micro", "2"], "unrecognized arguments: --micro 2"),
    ],
)
def test_a_mistake_gets_a_sentence(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["memory", *options]) == 2
    error = capsys.readouterr().err
    assert sentence.lower() in error.lower()
    assert error.count("\n") == 1
