"""The report: every row reaches a table, the latest counts, cards never mix."""

from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from fastlocal.profiling import plots, report, results
from fastlocal.profiling.card.throughput import Setup, baseline
from fastlocal.profiling.cli import bench

ORIGIN = {"card": "NVIDIA H100", "driver": "600.1", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc"}
ORIGIN["date"] = "2026-11-22T10:00:00+00:00"
CHECK = {"bench": "correctness", "op": "attention", "shape": "ViT-B/16", "dtype": "float16"}
LOCAL = Setup("local", 8, True, 4, "feature", "linear", "module", kernels="triton")


def _write(folder: Path, name: str, *rows: dict[str, Any], **origin: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **ORIGIN, **origin}) + "\n")


def _throughput(setup: Setup, **figures: Any) -> dict[str, Any]:
    place = {"bench": "throughput", "model": "swin", "image_size": None, "batch_size": 64, "name": setup.label}
    speeds = {"images_per_s": 900.0, "speed": 1.0, "speed_low": 0.9, "speed_high": 1.1, "reserved_mib": 5000.0}
    return {**place, **asdict(setup), "error": None, "peak_mib": 4185.0, **speeds, **figures}


def _kernels(op: str, shape: str, **figures: Any) -> dict[str, Any]:
    place = {"bench": "kernels", "op": op, "shape": shape, "dtype": "bfloat16", "provider": "fastlocal", "batch": 64}
    times = {"p50_ms": 0.1, "gb_per_s": 1500.0, "of_copy_bandwidth": 0.5, "peak_mib": 10.0, "error": None}
    return {**place, "direction": "forward", **times, **figures}


def test_a_row_bears_the_time_it_was_written_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        times = iter(range(3))

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls(2026, 11, 27, hour=next(cls.times), tzinfo=tz)

    monkeypatch.setattr(results.datetime, "datetime", Clock)
    written = [results.append_row(tmp_path / "rows.jsonl", row) for row in ({}, {"card": "another"}, {"commit": "b"})]
    assert [row["date"][11:13] for row in written] == ["00", "01", "02"]
    assert written[1]["card"] == "another"  # what a row tells itself is not its process's
    assert written[2]["commit"] == "b"
    assert results.read_rows(tmp_path / "rows.jsonl") == written


@pytest.fixture
def card(tmp_path: Path) -> Path:
    folder = tmp_path / "nvidia-h100"
    _write(folder, "throughput", _throughput(baseline()), _throughput(LOCAL, images_per_s=1000.0, peak_mib=300.0))
    _write(folder, "kernels", _kernels("window_attention", "Swin-T stage 1"))
    right = {"provider": "fastlocal", "direction": "check", "error": None}
    _write(folder, "kernels", {**CHECK, "bench": "kernels", **right})
    _write(folder, "correctness", {**CHECK, "implementation": "triton", "error": "the output is off"})
    cap = {"bench": "caps", "model": "swin", "image_size": None, "batch_size": 64, "name": "E2E", "error": None}
    fits = {"cap": 2**32, "cap_text": "4GiB", "trains": True, "largest": 48, "images_per_s": 812.0, "measured": True}
    fails = {"cap": 2**31, "cap_text": "2GiB", "trains": False, "largest": 0, "measured": True}
    _write(folder, "caps", {**cap, **fits}, {**cap, **fails})
    meter = {"bench": "meter", "model": "swin", "batch_size": 64, "name": "E2E", "predicted_mib": 4185.0}
    true = {"metered_mib": 4190.0, "allocated_mib": 4200.0, "reserved_mib": 4400.0, "within": True, "error": None}
    _write(folder, "meter", {**meter, **true, "predicted_of_true": 0.996, "metered_of_true": 0.998})
    run = {"bench": "train", "data": "digits", "objective": "feature", "modules": 4, "kernels": "triton", "epochs": 15}
    _write(folder, "train", {**run, "error": None, "best_accuracy": 0.987, "seconds": 12.5})
    trace = {
        "bench": "trace",
        "model": "swin",
        "batch_size": 64,
        "name": "local",
        "copies_ms": 3.0,
        "hidden_share": 0.9,
    }
    _write(folder, "traces", trace)
    return folder


def test_every_benchmark_has_its_table(card: Path) -> None:
    assert bench(["report", "--output", str(card.parent)]) == 0
    text = (card.parent / "README.md").read_text()
    for name in ("Correctness", "Kernels", "Meter", "Throughput", "Trace", "Caps", "Train"):
        assert f"### {name}" in text
    for figure in ("1,000", "the output is off", "812 (48)", "4,400", "0.987", "NVIDIA H100", "torch 2.11.0", "abc"):
        assert figure in text
    for plot in ("roofline.png", "pareto-swin.png"):
        assert f"](nvidia-h100/{plot})" in text
        assert (card / plot).stat().st_size > 10_000


def test_a_machine_without_matplotlib_gets_the_tables(
    card: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert bench(["report", "--output", str(card.parent)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert "![" not in (card.parent / "README.md").read_text()


def test_the_latest_row_counts_and_keeps_its_commit(card: Path) -> None:
    _write(card, "throughput", _throughput(LOCAL, images_per_s=1234.0), commit="def")
    rows = [row for row in report.read_card(card) if row["bench"] == "throughput"]
    assert [row["images_per_s"] for row in rows] == [900.0, 1234.0]
    text = report.section(card, rows, [])
    assert "- at commit abc: E2E\n" in text
    assert f"- at commit def: {LOCAL.label}" in text


def test_two_cards_in_one_folder_are_refused(card: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(card, "train", {"bench": "train", "data": "cifar10"}, card="NVIDIA T4")
    assert bench(["report", "--output", str(card.parent)]) == 2
    assert "has rows of NVIDIA H100 and of NVIDIA T4" in capsys.readouterr().err
    assert not (card.parent / "README.md").exists()


def test_cards_have_sections_of_their_own_and_a_cpu_says_so(card: Path) -> None:
    _write(card.parent / "cpu", "throughput", _throughput(baseline()), card="CPU")
    assert bench(["report", "--output", str(card.parent)]) == 0
    text = (card.parent / "README.md").read_text()
    assert text.index("## CPU (no card") < text.index("## NVIDIA H100")


def test_no_rows_and_broken_rows_get_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["report", "--output", str(tmp_path)]) == 2
    assert "no result rows" in capsys.readouterr().err
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "rows.jsonl").write_text('{"bench": "tr')
    assert bench(["report", "--output", str(tmp_path)]) == 2
    assert "a line that is not JSON" in capsys.readouterr().err


def test_flops_of_the_known_shapes() -> None:
    def of(op: str, shape: str, direction: str = "forward") -> float | None:
        return report.flops(_kernels(op, shape, direction=direction))

    # Two products of [49, 32] and [32, 49] for each of 64 windows × 64 images × 3 heads.
    assert of("window_attention", "Swin-T stage 1") == 64 * 64 * 3 * 2 * (2 * 49 * 49 * 32)
    assert of("window_attention", "Swin-T stage 4", "both") == 3 * 64 * 24 * 2 * (2 * 49 * 49 * 32)
    # Stage 1 gives 4 × 4 pixels of 3 colours per token; stage 2, 2 × 2 tokens of 96 channels.
    assert of("reconstruction_loss", "Swin-T stage 1", "backward") == 2 * 2 * 64 * 56 * 56 * 96 * 48
    assert of("reconstruction_loss", "Swin-T stage 2") == 2 * 64 * 28 * 28 * 192 * 384
    assert of("attention", "a new one") is None


def test_the_front_keeps_what_nothing_beats() -> None:
    assert plots.front([(3, 5), (1, 1), (2, 4), (2, 3), (4, 4)]) == [(1, 1), (2, 4), (3, 5)]


def test_what_is_committed_is_reported_without_a_card(tmp_path: Path) -> None:
    committed = Path(report.__file__).resolve().with_name("results")
    output = tmp_path / "results"
    shutil.copytree(committed, output)
    for folder in output.iterdir():  # whatever was measured on cards
        if folder.name not in ("memory", "traffic", "compile"):
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    assert bench(["report", "--output", str(output)]) == 0
    text = (output / "README.md").read_text()
    assert "## Memory: swin_tiny_patch4_window7_224, batch 64" in text
    assert "4,682" in text  # plain training, MiB
    assert "](memory/swin_tiny_patch4_window7_224-64-timeline.png)" in text
    assert "## Traffic of the kernels" in text
    assert "## What the kernels compile to" in text
    assert "commit" in text


def test_labels_cover_neither_each_other_nor_marks_nor_the_legend() -> None:
    pyplot = plots.pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    points = [(x, 100 + 3 * x) for x in range(8)] + [(0.1, 100.5), (0.2, 101)]
    axes.scatter(*zip(*points, strict=True), label="set-ups")
    axes.legend()
    plots.label(figure, axes, [(x, y, f"a rather long name, K={x}", "black") for x, y in points], points)
    renderer = figure.canvas.get_renderer()
    for note in axes.texts:
        note.update_positions(renderer)
    boxes = [Text.get_window_extent(note, renderer) for note in axes.texts]
    assert len(boxes) >= 8
    boxes.append(axes.get_legend().get_window_extent(renderer))
    boxes += [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in axes.transData.transform(points)]
    texts = len(axes.texts)
    for i, box in enumerate(boxes[:texts]):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
    pyplot.close(figure)


def test_a_table_wider_than_the_terminal_is_shown_row_by_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = results.markdown_table([{"set-up": "local, feature", **{f"column {i}": 1000 * i for i in range(12)}}] * 2)
    monkeypatch.delenv("COLUMNS", raising=False)
    results.show(wide)
    assert capsys.readouterr().out == f"{wide}\n"  # nobody looks: as it goes into files
    monkeypatch.setenv("COLUMNS", "80")
    results.show(f"A legend of many words {'and more ' * 20}\n\n{wide}")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines.count("local, feature") == 2
    joined = "\n".join(lines)
    assert all(joined.count(f"column {i} {1000 * i:,}") == 2 for i in range(12))
    narrow = results.markdown_table([{"a": 1, "b": 2}])
    results.show(narrow)
    assert capsys.readouterr().out == f"{narrow}\n"
