"""Checkpoints: written so that a crash at any point leaves the old or the new one whole, read without running code.

What is read is bounded by the file's own size before anything is allocated, and its structure is checked once, here
(`load`), so that what comes after may rely on it.
"""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import random
import secrets
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

import fastlocal
from fastlocal.train.errors import UserError, printable, shown

FORMAT = 3
LARGEST_WEIGHT = 1e7  # no trained transformer comes near; a run that does has diverged
DEEPEST, MOST_NODES, LONGEST_PICKLE = 12, 2_000_000, 2**24  # of a checkpoint's tree; a ViT-G's has 6, 20,000, 2**20


# Writing


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], keep: Path | None = None) -> None:
    """Replace ``path`` by what ``write`` writes: a reader sees the old file or the new one, whole, even after a crash.

    A symlink is followed. Whatever fails, no temporary file is left.

    Args:
        keep: a name for the file that is replaced.

    Raises:
        OSError: the file cannot be written (no permission, disk full).
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            sink = _Sink(file)
            try:
                write(sink)  # type: ignore[arg-type]  # all of IO that torch.save uses
            finally:
                if sink.error is not None:
                    raise sink.error
            file.flush()
            os.fsync(file.fileno())  # the content reaches the disk before the name does
        if keep is not None and path.exists():
            _link(path, keep)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _link(source: Path, target: Path) -> None:
    """Make ``target`` name what ``source`` names now; a copy where the file system has no links."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to the disk, so that they are there after a power failure."""
    if os.name != "posix":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Sink:
    """A file that takes what it is given after an error, too: torch's writer turns some into crashes of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: `write_atomically` flushes at the end."""


def write(checkpoint: Mapping[str, Any], file: IO[bytes]) -> None:
    """Write a tree of plain values and tensors, as `load` reads it."""
    torch.save({"format": FORMAT, **checkpoint}, file)


def unusable(state: Mapping[str, Any]) -> str | None:
    """What is wrong with a trainer's ``state``, or None: a tensor that is not finite, or weights as of a diverged run.

    Waits for each device once.
    """
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, leaf in leaves(state):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            by_device.setdefault(leaf.device, []).append((name, leaf))
    for named in by_device.values():
        largest = torch.stack([torch.linalg.vector_norm(t.detach(), math.inf).double() for _, t in named]).tolist()
        for (name, _), value in zip(named, largest, strict=True):
            if not math.isfinite(value):
                return f"{name} is not finite"
            if value > LARGEST_WEIGHT and not name.startswith("optimizers"):
                return f"{name} has grown to {value:.0e}"
    return None


# Reading


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run's.

    Raises:
        UserError: as of `read_tree`, or it is no checkpoint of ours: every field that is missing, unknown or of another kind
            is named.
    """
    checkpoint = read_tree(path)
    problems = list(_problems(checkpoint, CHECKPOINT))
    if problems:
        raise UserError(f"{path} is not a whole checkpoint: {listed(problems)}.")
    return checkpoint


def read_tree(path: Path) -> dict[str, Any]:
    """Read what `write` wrote onto the CPU. Only plain values and tensors are read; no code in the file ever runs.

    The tensors lie in the file, which stays open as long as one of them lives.

    Raises:
        UserError: the file is missing, unreadable or damaged, holds other objects, would need more memory than it is long,
            or is of another format.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}.")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about forms of pickle that are refused anyway
            # Mapped, not read: a value takes memory when it is copied to where it belongs.
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds Python objects other than tensors and plain values, or is damaged; nothing in it was run."
        ) from None
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise UserError(f"{path} is truncated or is not a checkpoint ({type(error).__name__} while reading).") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if not isinstance(found, int) or found != FORMAT:
        raise UserError(f"{path} is not a fastlocal checkpoint of format {FORMAT}.")
    problems = _problems_of_leaves(tree, path.stat().st_size)
    if problems:
        raise UserError(f"{path} is not a whole checkpoint: {listed(problems)}.")
    return tree


def listed(problems: list[str], most: int = 5) -> str:
    """``problems`` in one sentence; beyond ``most`` they are only counted."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(printable(problem, 200) for problem in problems[:most]) + more


# What torch.save writes for plain values and strided tensors. torch.load knows more, such as bytearray(size).
_NAMES_IN_PICKLE = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(
        f"torch {kind}Storage"
        for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte")
    ),
    *("torch BoolStorage", "torch UntypedStorage", "torch float8_e4m3fn", "torch float8_e5m2"),
}


def _check_archive(path: Path) -> None:
    """Refuse what would run code, or take more memory than the file is long, without allocating it."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = path.stat().st_size
        if sum(entry.file_size for entry in entries) > size or any(entry.compress_type for entry in entries):
            raise UserError(f"{path} is compressed, or its parts overlap; a checkpoint's are not.")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > LONGEST_PICKLE:
            raise zipfile.BadZipFile
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4") or (
                opcode.name == "GLOBAL" and argument not in _NAMES_IN_PICKLE
            ):
                raise pickle.UnpicklingError
        damaged = archive.testzip()  # torch compares no checksums
        if damaged is not None:
            raise UserError(f"{path} is damaged: the checksum of {printable(damaged, 80)} is wrong.")


def leaves(tree: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what a tree of dicts, lists and tuples holds; deeper levels count as one leaf."""
    entries: Any
    if isinstance(tree, Mapping) and depth < DEEPEST:
        entries = tree.items()
    elif isinstance(tree, list | tuple) and depth < DEEPEST:
        entries = enumerate(tree)
    else:
        yield name, tree
        return
    for key, value in entries:
        yield from leaves(value, f"{name}.{key}" if name else str(key), depth + 1)


def _problems_of_leaves(tree: Any, size: int) -> list[str]:
    """Leaves that are neither plain values nor strided tensors with memory of their own."""
    total = 0
    for count, (name, leaf) in enumerate(leaves(tree)):
        if isinstance(leaf, Tensor):
            if leaf.layout != torch.strided or leaf.device.type != "cpu" or leaf.is_quantized:
                return [f"{name} is a tensor of another kind"]
            total += leaf.numel() * leaf.element_size()
        elif isinstance(leaf, float) and not math.isfinite(leaf):
            return [f"{name} is {leaf}"]
        elif not (leaf is None or isinstance(leaf, bool | int | float | str)):
            return [f"{name} is {_kind(leaf)}"]
        if total > size or count > MOST_NODES:
            return [f"{name}: the file is too short for all its values"]
    return []


class Each:
    """A dict with any keys of type ``key`` whose values are of one kind."""

    def __init__(self, kind: Any, key: type = str) -> None:
        self.kind, self.key = kind, key


class Optional:
    """A value of this kind or None."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


def at_least(least: int) -> Callable[[Any], bool]:
    """The kind of whole numbers from ``least`` on."""

    def check(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63

    check.__doc__ = f"a whole number of at least {least}"
    return check


def finite(value: Any) -> bool:
    """a finite number"""
    return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def plain(value: Any) -> bool:
    """a plain value"""
    return not any(isinstance(leaf, Tensor) for _, leaf in leaves(value))


def anything(_: Any) -> bool:
    """anything"""
    return True


def _counted(value: Any) -> bool:
    """a number of images and their digest"""
    return isinstance(value, list) and [type(entry) for entry in value] == [int, str]


# A kind is a type, a test with its words as docstring, [kind] for a list, {name: kind} for a dict, Each or Optional.
CHECKPOINT: dict[str, Any] = {
    "format": int,
    "config": Each(plain),
    "classes": [str],
    "preprocessing": {
        "image_size": [at_least(1)],
        "channels": at_least(1),
        "in_memory": bool,
        "mean": [finite],
        "std": [finite],
        "interpolation": str,
        "crop_pct": finite,
        "crop_mode": str,
    },
    "data": {
        "classes": [str],
        "training images": Each(_counted),
        "validation images": Each(_counted),
        "preprocessing": Each(plain),
    },
    "trainer": {
        "version": int,
        "objective": str,
        "cuts": [at_least(0)],
        "steps": at_least(0),
        "model": Each(Tensor),
        "heads": Each(Tensor),
        "optimizers": [{"state": Each(Each(anything), key=int), "param_groups": [Each(plain)]}],
        "scaler": Each(finite),
        "ema": Optional(Each(Tensor)),
    },
    "progress": {
        "epoch": at_least(0),
        "position": at_least(0),
        "best_accuracy": finite,
        "best_epoch": at_least(0),
        "accuracy": [finite],
        "lr": finite,
        "seconds": finite,
        "totals": Each(Tensor),
    },
    "random": {"python": [anything], "numpy": [anything], "torch": Tensor, "cuda": [Tensor]},
}


def _problems(value: Any, kind: Any, name: str = "") -> Iterator[str]:
    if isinstance(kind, Optional):
        if value is not None:
            yield from _problems(value, kind.kind, name)
    elif isinstance(kind, list):
        if isinstance(value, list):
            for index, entry in enumerate(value):
                yield from _problems(entry, kind[0], f"{name}[{index}]")
        else:
            yield f"{name} is {_kind(value)}, not a list"
    elif isinstance(kind, dict | Each):
        if not isinstance(value, dict):
            yield f"{name} is {_kind(value)}, not a dict"
            return
        fields = kind if isinstance(kind, dict) else dict.fromkeys(value, kind.kind)
        key = str if isinstance(kind, dict) else kind.key
        for entry in fields.keys() | value.keys():
            path = f"{name}.{entry}" if name else str(entry)
            if entry not in value:
                yield f"{path} is missing"
            elif entry not in fields or not isinstance(entry, key):
                yield f"{path} is unknown"
            else:
                yield from _problems(value[entry], fields[entry], path)
    elif not (isinstance(value, kind) if isinstance(kind, type) else kind(value)):
        yield f"{name} is {_kind(value)}, not {kind.__name__ if isinstance(kind, type) else kind.__doc__}"


def _kind(value: Any) -> str:
    return shown(value) if isinstance(value, bool | int | float | str) or value is None else type(value).__name__


def load_trainer(trainer: fastlocal.LocalTrainer, state: dict[str, Any], path: Path) -> None:
    """Load ``state``, read from ``path``, into ``trainer``.

    Raises:
        UserError: it is the state of another model or set-up, every difference named, or no training can go on from it.
    """
    problem = unusable(state)
    if problem is not None:
        raise UserError(f"{path} is of a run that had diverged: {problem}.")
    ours = trainer.state_dict()
    problems = list(_differences(_without_moments(state), _without_moments(ours))) if ours else []
    for index, (optimizer, saved) in enumerate(zip(trainer.optimizers, state["optimizers"], strict=False)):
        problems += _problems_of_moments(saved["state"], optimizer, f"optimizers[{index}].state")
    try:
        if not problems:
            trainer.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        problems = [str(error).rstrip(".")]
    if problems:
        raise UserError(f"{path} is a checkpoint of another model or set-up: {listed(problems)}.")


def _without_moments(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` without what optimizers have only from the first step on."""
    return {**state, "optimizers": [{"param_groups": entry["param_groups"]} for entry in state["optimizers"]]}


def _differences(saved: Any, ours: Any, name: str = "") -> Iterator[str]:
    """Where the tree ``saved`` has other keys, lengths, types, shapes or dtypes than ``ours``."""
    if isinstance(ours, Mapping) and isinstance(saved, Mapping):
        for key in [*ours, *(key for key in saved if key not in ours)]:
            path = f"{name}.{key}" if name else str(key)
            if key in saved and key in ours:
                yield from _differences(saved[key], ours[key], path)
            elif key in ours:
                yield f"{path} is missing"
            elif "param_groups" not in name:  # where schedules leave notes
                yield f"{path} is unknown"
    elif isinstance(ours, Tensor) and isinstance(saved, Tensor):
        if saved.shape != ours.shape or saved.dtype != ours.dtype:
            theirs, own = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (saved, ours))
            yield f"{name} is {theirs}, not {own}"
    elif isinstance(ours, list | tuple) and isinstance(saved, list | tuple):
        if len(saved) != len(ours):
            yield f"{name} has {len(saved)} entries, not {len(ours)}"
        else:
            for index, (entry, own) in enumerate(zip(saved, ours, strict=True)):
                yield from _differences(entry, own, f"{name}[{index}]")
    elif type(saved) is not type(ours) and not (finite(saved) and finite(ours)):
        yield f"{name} is {_kind(saved)}, not {_kind(ours)}"


def _problems_of_moments(state: dict[int, dict[str, Any]], optimizer: torch.optim.Optimizer, name: str) -> list[str]:
    """What of an optimizer's saved moments cannot be those of its parameters; they all have the same names and kinds."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kinds = [{key: type(value) for key, value in entry.items()} for entry in state.values()]
    if any(entry != kinds[0] for entry in kinds):
        return [f"{name} differs from parameter to parameter"]
    for index, entry in state.items():
        if not 0 <= index < len(parameters):
            return [f"{name}.{index} is of no parameter"]
        for key, value in entry.items():
            shape = parameters[index].shape
            if isinstance(value, Tensor) and value.ndim and value.shape != shape and value.numel() >= shape.numel():
                return [f"{name}.{index}.{key} is {list(value.shape)}, for a parameter of {list(shape)}"]
    return []


# Random generators


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
    """Undo everything drawn since `random_state` gave ``state``; CUDA generators as far as the device count agrees.

    Raises:
        ValueError: ``state`` is of no generator.
    """
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        if not 0 <= position <= 624:  # numpy reads there without looking
            raise ValueError
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
    except (ValueError, TypeError, RuntimeError, OverflowError, AttributeError) as error:
        raise ValueError(f"the state of a random generator is damaged ({printable(str(error), 100)})") from None
