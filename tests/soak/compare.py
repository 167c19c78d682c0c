"""Whether two runs left the same, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

TIMES = ("images_per_second", "seconds", "peak_memory_bytes")


def result(folder: Path) -> dict[str, Any]:
    """Everything a run leaves, less its times and its own name."""
    left: dict[str, Any] = {"model": safetensors.torch.load_file(folder / "model.safetensors")}
    for name in ("last.pt", "best.pt"):
        saved = torch.load(folder / name, weights_only=True)
        del saved["config"]["experiment"], saved["config"]["recovery_interval"]
        del saved["progress"]["seconds"]
        left[name] = saved
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left["rows"] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return left


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """Raise AssertionError, naming the place, unless two trees are equal to the bit."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    else:
        assert one == other, path
