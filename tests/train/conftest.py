"""A configuration that trains in a second, and the command line called in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

TINY_MODEL = {"patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Options of a run on 64 digits, 4 steps per epoch, in ``tmp_path/runs``; keyword arguments override them."""

    def options(**changes: Any) -> dict[str, Any]:
        return {
            "data": "digits",
            "model": "vit_tiny_patch16_224",
            "model_kwargs": TINY_MODEL,
            "epochs": 2,
            "batch_size": 16,
            "train_limit": 64,
            "val_limit": 40,
            "output": str(tmp_path / "runs"),
            "experiment": "tiny",
            **changes,
        }

    return options


class _RunsCode:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.flag),))


@pytest.fixture
def runs_code() -> Callable[[Path], object]:
    """``runs_code(flag)``: an object whose pickle makes the folder ``flag`` when it is read carelessly."""
    return _RunsCode


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``fastlocal`` with these arguments: exit code, stdout and stderr."""
    from fastlocal.train.cli import main

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse, after --help
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def flags(tiny: Callable[..., dict[str, Any]]) -> Callable[..., list[str]]:
    """The options of `tiny` as flags."""

    def listed(**changes: Any) -> list[str]:
        arguments = []
        for name, value in tiny(**changes).items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, dict):
                arguments += [flag, *(f"{key}={entry}" for key, entry in value.items())]
            elif isinstance(value, bool):
                arguments.append(flag if value else flag.replace("--", "--no-"))
            else:
                arguments += [flag, str(value)]
        return arguments

    return listed
