"""Checkpoints: written so that a crash at any point leaves the old or the new one whole, read without running code."""

from __future__ import annotations

import os
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from fastlocal.train.config import UserError

FORMAT = 1


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace ``path`` by what ``write`` writes: a reader sees the old file or the new one, whole, even after a crash.

    Raises:
        UserError: the file cannot be written (no permission, disk full).
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the content reaches the disk before the name does
        os.replace(temporary, path)
        if os.name == "posix":  # Windows opens no folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # and the name is there after a power failure
            finally:
                os.close(folder)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a tree of plain values and tensors to ``path``, atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **checkpoint}, file))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save`'s onto the CPU. Only plain values and tensors are read; no code in it ever runs.

    Raises:
        UserError: the file is missing, truncated, holds other objects, or is no checkpoint of ours.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about forms of pickle that are refused anyway
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds Python objects other than tensors and plain values, or is damaged; nothing in it was run."
        ) from None
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise UserError(f"{path} is truncated or is not a checkpoint ({type(error).__name__} while reading).") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a fastlocal checkpoint of format {FORMAT}.")
    return checkpoint


def random_state() -> dict[str, Any]:
    """The state of every global random generator, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since `random_state` gave ``state``; CUDA generators as far as the device count agrees."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
