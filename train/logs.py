"""Where epochs are logged beside ``metrics.jsonl``: thin adapters of other people's loggers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fastlocal.train.config import TrainConfig
from fastlocal.train.errors import UserError

LOGS = ("none", "tensorboard", "wandb", "trackio")


class Log(Protocol):
    def write(self, values: Mapping[str, float], epoch: int) -> None: ...
    def close(self) -> None: ...


def check_log(name: str) -> None:
    """Refuse a logger that is not installed, before there is a run folder.

    Raises:
        UserError: the package is missing.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"--log {name} needs a package that is not installed: pip install {name}.")


def open_log(config: TrainConfig, folder: Path, epoch: int) -> Log | None:
    """The log that ``config`` asks for, of the run in ``folder``, of which ``epoch`` epochs are done."""
    name = config.reports.log
    if name == "tensorboard":
        return _TensorBoard(folder, epoch)
    return None if name == "none" else _Service(name, config, folder)


class _TensorBoard:
    def __init__(self, folder: Path, epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch + 1)

    def write(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        self._writer.close()


class _Service:
    """Weights & Biases, or trackio, which has its interface. The folder's name tells a run that goes on again."""

    def __init__(self, package: str, config: TrainConfig, folder: Path) -> None:
        module: Any = importlib.import_module(package)
        options: dict[str, Any] = {"name": folder.name, "config": config.to_dict(), "resume": "allow"}
        if package == "wandb":
            options |= {"id": os.environ.get("WANDB_RUN_ID", folder.name), "dir": str(folder)}
        project = os.environ.get(f"{package.upper()}_PROJECT", "fastlocal")
        self._module, self._run = module, module.init(project=project, **options)

    def write(self, values: Mapping[str, float], epoch: int) -> None:
        # Both keep the name "step" for themselves, which is the epoch here.
        self._module.log({"steps" if name == "step" else name: value for name, value in values.items()}, step=epoch)

    def close(self) -> None:
        self._module.finish()


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of ``metrics.jsonl``; lists, which have a number per classifier or module, as ``name/1``, …"""
    return dict(_flat(row))


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, int | float):
            yield name, value
        elif isinstance(value, list) and name != "exits":
            yield from ((f"{name}/{place}", entry) for place, entry in enumerate(value, start=1))
