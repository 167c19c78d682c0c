"""The compile report: what it measures is right, what it refuses is right, and every shipped kernel passes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlocal.kernels.cases import CompileCase
from fastlocal.profiling.cli import bench
from fastlocal.profiling.kernels import compile_report
from fastlocal.profiling.kernels.compile_report import ARCHITECTURES, Measurement

COMMITTED = Path(__file__).parents[2] / "profiling/results/compile/report.json"

GOOD = Measurement(
    case="product, bfloat16",
    architecture="sm_90",
    dtype="bfloat16",
    has_dot=True,
    warps=4,
    registers=100,
    spill_bytes=0,
    shared_bytes=16384,
    shared_limit=ARCHITECTURES["sm_90"].shared_bytes_per_block,
    tensor_core_instructions=4,
    blocks_per_multiprocessor=5,
    occupancy=0.3,
    error=None,
    key="0123",
)


@pytest.mark.parametrize("architecture", ["sm_86", "sm_90"])  # the least shared memory, and other tensor cores
def test_shipped_kernels(architecture: str, tmp_path: Path) -> None:
    """No spills, shared memory within the limit, tensor cores. What the committed report knows is not redone."""
    report = tmp_path / "report.json"
    if COMMITTED.exists():
        shutil.copy(COMMITTED, report)
    measurements = compile_report.compile_report(report, [architecture], only="bfloat16")
    assert {m.case.split()[0].split(",")[0] for m in measurements} >= {
        "attention",
        "reconstruction_loss",
        "window_attention",
    }
    assert {f"{m.case} on {m.architecture}": m.problems for m in measurements if m.problems} == {}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes per thread"),
        ({"shared_bytes": 300_000}, "needs 300000 bytes of shared memory, the limit is 232448"),
        ({"tensor_core_instructions": 0}, "has no tensor-core instructions"),
        ({"error": "out of luck"}, "does not compile: out of luck"),
    ],
)
def test_problems(change: dict[str, Any], problem: str) -> None:
    assert GOOD.problems == []
    assert replace(GOOD, **change).problems == [problem]


@pytest.mark.parametrize(
    ("dtype", "has_dot", "lowest"),
    [
        (torch.bfloat16, True, "sm_80"),
        (torch.float16, True, "sm_80"),
        (torch.float32, True, None),
        (torch.float32, False, "sm_75"),
        (torch.bfloat16, False, "sm_80"),
    ],
)
def test_where_a_kernel_is_reported(dtype: torch.dtype, has_dot: bool, lowest: str | None) -> None:
    case = CompileCase("", None, {}, {}, 4, 1, dtype, has_dot)
    names = compile_report._architectures_of(case)
    assert (names or [None])[0] == lowest
    assert ("gfx942" in names) == (dtype != torch.float16 and lowest is not None)


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared", "blocks"),
    [
        ("sm_80", 4, 64, 0, 8),  # 65536 registers / (64 · 32 · 4)
        ("sm_80", 4, 65, 0, 7),  # 65 round up to 72
        ("sm_80", 1, 16, 0, 32),  # the limit on blocks
        ("sm_86", 8, 32, 0, 6),  # 48 warps
        ("sm_86", 4, 32, 32 * 1024, 3),  # 100 KiB, and 1 KiB of each block's 33 is the system's
        ("sm_90", 4, 255, 0, 2),
        ("gfx942", 4, 128, 0, 4),  # 4 SIMDs of 512 registers: 4 wavefronts each
        ("gfx942", 4, 257, 0, 1),  # 257 round up to 264
        ("gfx1100", 4, 256, 0, 2),  # 2 SIMDs of 1536: 5 wavefronts each by 264
        ("gfx1201", 4, 64, 32 * 1024, 2),
    ],
)
def test_resident_blocks(architecture: str, warps: int, registers: int, shared: int, blocks: int) -> None:
    assert compile_report.resident_blocks(ARCHITECTURES[architecture], warps, registers, shared) == blocks


def _function(name: str, source: str, **names: Any) -> Any:
    """As much of a JIT function as the key looks at; in this process they are interpreted and have no source."""
    return SimpleNamespace(__name__=name, src=source, fn=SimpleNamespace(__globals__=names))


def test_the_readme_counts_the_committed_spills() -> None:
    rows = compile_report.read_report(COMMITTED)
    spilled = {a: [m for m in rows if m.architecture == a and m.spill_bytes] for a in ARCHITECTURES}
    assert {a for a, found in spilled.items() if found} == {"sm_120", "gfx1201", "gfx1100"}
    (cosine,) = spilled["sm_120"]
    assert "window 8" in cosine.case
    assert "cosine" in cosine.case
    readme = " ".join((COMMITTED.parents[3] / "README.md").read_text().split())
    assert f"One does on sm_120 ({cosine.spill_bytes} bytes: the backward" in readme
    for architecture in ("gfx1201", "gfx1100"):
        known = sum(m.architecture == architecture for m in rows)
        assert f"{len(spilled[architecture])} of {known} on {architecture}" in readme


def test_key_follows_the_code_and_not_its_comments() -> None:
    def sources(body: str, helper: str, size: int) -> list[str]:
        names = {"helper": _function("helper", helper), "SIZE": SimpleNamespace(value=size)}
        return compile_report._sources(_function("kernel", f"def kernel(x):\n{body}", **names), set())

    plain = sources("    return helper() + SIZE", "def helper():\n    return 1", 3)
    assert sources("    # why\n    return helper() + SIZE", "def helper():\n    return 1", 3) == plain
    assert sources("    return helper() + SIZE", "def helper():\n    return 2", 3) != plain
    assert sources("    return helper() + SIZE", "def helper():\n    return 1", 4) != plain


def test_report_file_keeps_its_rows(tmp_path: Path) -> None:
    report = tmp_path / "deep" / "report.json"
    rows = [GOOD, replace(GOOD, architecture="sm_80", error="too large")]
    compile_report._write_report(report, {(row.key, row.architecture): row for row in rows})
    assert compile_report.read_report(report) == rows
    content = json.loads(report.read_text())
    assert content["origin"]["triton"]
    content["rows"][0].pop("occupancy")  # written by another version
    report.write_text(json.dumps(content))
    assert compile_report.read_report(report) == rows[1:]


def test_table_has_one_row_a_case_and_marks_spills() -> None:
    rows = [GOOD, replace(GOOD, architecture="sm_80", spill_bytes=16), replace(GOOD, case="other", error="no")]
    lines = compile_report.table(rows).splitlines()
    assert len(lines) == 2 + 2 + 2
    assert "**16**" in lines[2]
    assert "100 · 0 · 16 · 4 · 30%" in lines[2]
    assert "does not compile" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--architectures", "sm_70"], "--architectures must be among sm_75, "),
        (["--only", "no such kernel"], "--only: no kernel configuration has 'no such kernel' in its name."),
    ],
)
def test_bad_input(arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["kernels", "--compile-report", "--output", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


SCRATCH = """
import json, torch, triton, triton.language as tl
from fastlocal.kernels.cases import CompileCase
from fastlocal.profiling.kernels.compile_report import ARCHITECTURES, measure

@triton.jit
def product(a, b, c, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x, y = tl.load(a + i * SIZE + j), tl.load(b + i * SIZE + j)
    tl.store(c + i * SIZE + j, tl.dot(x, y))

@triton.jit
def normalize(a, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    x = tl.load(a + i * COLUMNS + j)
    tl.store(c + i * COLUMNS + j, x / tl.sum(tl.sum(x, 1), 0))

def row(kernel, signature, constants, warps, dtype, has_dot, architecture):
    case = CompileCase(kernel.__name__, kernel, signature, constants, warps, 1, dtype, has_dot)
    return vars(measure(case, ARCHITECTURES[architecture], ""))

pointers = {"a": "*bf16", "b": "*bf16", "c": "*fp32"}
targets = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100", "gfx1201")
clean = [row(product, pointers, {"SIZE": 64}, 4, torch.bfloat16, True, name) for name in targets]
# 512 registers of values for each thread of one warp, all alive until their sum is known.
sizes, spilling = {"ROWS": 64, "COLUMNS": 256}, ("sm_80", "gfx1100")
spilled = [row(normalize, {"a": "*fp32", "c": "*fp32"}, sizes, 1, torch.float32, False, name) for name in spilling]
print(json.dumps([clean, spilled]))
"""


def test_measures_compiled_code(tmp_path: Path) -> None:
    """A small product is clean on three generations of tensor cores and on AMD's; a tile beyond the registers spills."""
    script = tmp_path / "scratch.py"
    script.write_text(SCRATCH)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    clean, spilled = json.loads(result.stdout)
    for measurement in (Measurement(**row) for row in clean):
        assert measurement.problems == []
        assert measurement.tensor_core_instructions > 0
        assert 16 < measurement.registers <= 255
        assert 0 < measurement.occupancy <= 1
    for huge in (Measurement(**row) for row in spilled):
        assert huge.spill_bytes > 0
        assert huge.problems == [f"spills {huge.spill_bytes} bytes per thread"]
        assert huge.tensor_core_instructions == 0
