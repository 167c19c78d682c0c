"""Mutated files, one after the other in one process: each must be read, or refused in one sentence.

A target is a whole file and what reads it. Whatever else comes out of the reader than a value or a `UserError` of one short
line is a traceback; more than `SLOWEST` seconds of computing a hang; more than `LARGEST` bytes of memory beyond what the
process had a blow-up.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import tarfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastlocal.train import checkpoint, data, loop
from fastlocal.train.build import build_model, pretrained_configuration
from fastlocal.train.config import TrainConfig, to_yaml
from fastlocal.train.errors import UserError
from fastlocal.train.options.files import read_file
from fastlocal.train.ranks import joined
from fastlocal.train.start import fitted, read_start

SLOWEST, LARGEST = 10, 2**30
TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2},
    "modules": 2,
    "epochs": 2,
    "batch_size": 8,
    "train_limit": 16,
    "val_limit": 8,
    "workers": 0,
}


@dataclass
class Target:
    """Something that is read from a file.

    Attributes:
        name: what it is.
        path: where ``read`` looks for it.
        mutate: writes a mutant to ``path``.
        share: of the mutants, relative to other targets': less for what takes longer.
    """

    name: str
    path: Path
    mutate: Callable[[random.Random], None]
    read: Callable[[], object]
    share: float = 1.0


@dataclass
class Tally:
    """What came of the mutants: how many were read, refused, or ended otherwise, and the first few of the latter."""

    outcomes: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


class _TooSlowError(BaseException):
    pass


def try_mutants(target: Target, count: int, seed: int) -> Tally:
    """Read ``count`` mutants of ``target``."""

    def too_slow(_: int, __: FrameType | None) -> None:
        raise _TooSlowError

    tally, before = Tally(), signal.signal(signal.SIGPROF, too_slow)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + LARGEST, limits[1]))
    try:
        for index in range(count):
            target.mutate(random.Random(f"{target.name} {seed} {index}"))
            outcome, detail = _try(target)
            tally.outcomes[outcome] += 1
            if outcome not in ("read", "refused") and len(tally.examples) < 5:
                tally.examples.append(f"{target.name} {seed} {index}: {outcome} {detail}")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)
    return tally


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


def _try(target: Target) -> tuple[str, str]:
    signal.setitimer(signal.ITIMER_PROF, SLOWEST)  # of computing: the machine may be busy with other things
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read()
        return "read", ""
    except UserError as error:
        return (
            ("refused", "")
            if len(str(error)) < 3000 and "\n" not in str(error)
            else ("traceback", f"sentence of {len(str(error))} characters: {str(error)[:100]}")
        )
    except _TooSlowError:
        return "hang", ""
    except MemoryError:
        return "blow-up", ""
    except Exception as error:
        kind, place = (
            "blow-up" if "memory" in str(error) else "traceback",
            traceback.extract_tb(error.__traceback__)[-1],
        )
        return kind, f"{type(error).__name__} at {place.filename}:{place.lineno}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


# Mutators


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, overwrite, cut, insert, repeat or swap a few stretches."""
    mutant = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        start = draw.randrange(len(mutant) + 1)
        stretch = slice(start, start + draw.choice((1, 1, 2, 4, 8, 64, 1024)))
        match draw.randrange(7):
            case 0 if start < len(mutant):
                mutant[start] ^= 1 << draw.randrange(8)
            case 1:
                mutant[stretch] = draw.randbytes(len(mutant[stretch]))
            case 2:
                del mutant[stretch]
            case 3:
                mutant[start:start] = draw.choice((b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", draw.randbytes(16)))
            case 4:
                mutant[start:start] = mutant[stretch]
            case 5:
                del mutant[start:]
            case 6:
                mutant[stretch] = draw.choice((b"\xff", b"\0", b"\x80")) * len(mutant[stretch])
    return bytes(mutant)


_JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63 - 1, -(2**63), 2**64, 10**400, 0.0, -0.5, 1e9, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "\x1b[31m",
        "é\ud800",
        "../x",
        "a" * 10_000,
        "nan",
        "1e999",
        "0x10",
        "1_0",
        "-",
    ),
    *([], [0], [[]], {}, {"x": 1}, {1: 2}, (), (1, 2), "http://localhost/x", "file:///etc/passwd"),
)


def mutate_tree(tree: Any, draw: random.Random, tensors: bool = True) -> Any:
    """A copy of a tree in which one node is replaced, removed, doubled or renamed."""
    container, key = _a_node(tree, draw)
    junk: Any = draw.choice(_JUNK)
    if tensors and draw.random() < 0.4:
        junk = draw.choice(
            (
                torch.zeros(()),
                torch.ones(3, 5),
                torch.full((4,), float("nan")),
                torch.zeros(1).expand(2**31),
                torch.zeros(0),
                torch.tensor([2**62]),
                torch.sparse_coo_tensor(size=(3, 3)),
                torch.zeros(2, 3, dtype=torch.complex64),
            )
        )
    action = draw.randrange(4)

    def copy(node: Any) -> Any:
        if isinstance(node, dict):
            changed = {
                k: junk if (node is container and k == key and action == 0) else copy(v) for k, v in node.items()
            }
            if node is container and action == 1:
                changed.pop(key)
            if node is container and action >= 2:
                changed[draw.choice((f"{key}x", 5, None, "epoch", ""))] = changed.pop(key) if action == 2 else junk
            return changed
        if isinstance(node, list | tuple):
            changed_list = [
                junk if (node is container and i == key and action == 0) else copy(v) for i, v in enumerate(node)
            ]
            if node is container and action == 1:
                changed_list.pop(key)
            if node is container and action >= 2:
                changed_list.insert(key, junk if action == 2 else changed_list[key])
            return type(node)(changed_list)
        return node

    return copy(tree)


def _a_node(tree: Any, draw: random.Random) -> tuple[Any, Any]:
    """A container in the tree and the key of one of its entries; each level is as likely as the next."""
    container = tree
    while True:
        key = draw.choice(list(container) if isinstance(container, dict) else range(len(container)))
        if not isinstance(container[key], dict | list | tuple) or not container[key] or draw.random() < 0.3:
            return container, key
        container = container[key]


# Targets


def targets(folder: Path) -> Iterator[Target]:
    """Every kind of file that fastlocal reads; ``folder`` is theirs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = TrainConfig.of(**TINY, data="digits", output=str(folder), experiment="run")
    with joined(config) as crew:
        home = loop._Run(config, crew)  # what --resume builds before it reads the state
        run = home.train().folder
    yield from _checkpoints(folder, run, home)
    yield _safetensors(folder, run)
    yield from _configurations(folder)
    yield from _images(folder)
    yield from _data_sets(folder)


def _of_bytes(name: str, path: Path, read: Callable[[], object]) -> Target:
    whole = path.read_bytes()
    return Target(name, path, lambda draw: _overwrite(path, mutate_bytes(whole, draw)), read)


def _overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _checkpoints(folder: Path, run: Path, home: Any) -> Iterator[Target]:
    path, whole = folder / "mutant.pt", (run / "last.pt").read_bytes()
    tree = torch.load(run / "last.pt", weights_only=True)

    def read() -> None:
        saved = checkpoint.load(path)
        TrainConfig.of(**saved["config"])
        try:
            home._restore(saved)
        finally:  # else what one mutant brings, such as another name in a group of parameters, all later ones would lack
            home.trainer.load_state_dict(tree["trainer"])

    path.write_bytes(whole)
    yield _of_bytes("checkpoint, bytes", path, read)

    def mutate_nodes(draw: random.Random) -> None:
        torch.save(mutate_tree(tree, draw), path)

    yield Target("checkpoint, nodes", path, mutate_nodes, read, share=0.3)


def _safetensors(folder: Path, run: Path) -> Target:
    path, whole = folder / "mutant.safetensors", (run / "model.safetensors").read_bytes()
    config, classes = TrainConfig.of(**TINY, data="digits"), tuple("0123456789")
    length = struct.unpack("<Q", whole[:8])[0]
    header, content = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def mutate(draw: random.Random) -> None:
        if draw.random() < 0.5:
            path.write_bytes(mutate_bytes(whole, draw))
        else:
            text = json.dumps(mutate_tree(header, draw, tensors=False)).encode("utf-8", "replace")
            path.write_bytes(struct.pack("<Q", len(text)) + text + content)

    def read() -> None:
        weights, _ = fitted(read_start(str(path)), build_model(config, 10, (8, 8)), classes)
        build_model(config, 10, (8, 8), weights=weights)

    return Target("safetensors", path, mutate, read)


BOMBS = (
    "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(f"{c}: &{c} [{f'*{b},' * 9}]\n" for b, c in pairwise("abcdefghi")),
    "lr: " + "[" * 500 + "]" * 500,
    "epochs: " + "9" * 5000,
    "epochs: " + "1:" * 20000 + "1",
    "model_kwargs: {depth: " + "-" * 50000 + "1}",
    "? " * 10000,
    "- " * 10000,
    "{" * 10000,
    "lr: !!python/object/apply:os.system ['true']",
    "lr: !!timestamp 2001-99-99",
    "lr: !!binary '%%%'",
    "<<: 1",
    "x" * 600_000 + ": 1",
    "lr: 1\nlr: 2\n",
)


def _configurations(folder: Path) -> Iterator[Target]:
    path, config = folder / "mutant.yaml", TrainConfig.of(data="cifar10", modules=(1, 2), regularizer_weight=(0.5, 1.0))
    whole, tree = to_yaml(config).encode(), config.to_dict()

    def mutate(draw: random.Random) -> None:
        content = draw.choice(BOMBS).encode() if draw.random() < 0.05 else whole
        path.write_bytes(mutate_bytes(content, draw) if draw.random() < 0.9 else content)

    yield Target("YAML", path, mutate, lambda: TrainConfig.of(**read_file(path)))

    mutant: dict[Any, Any] = {}

    def mutate_options(draw: random.Random) -> None:
        mutant.clear()
        mutant.update({str(name): value for name, value in mutate_tree(tree, draw, tensors=False).items()})

    yield Target("options", path, mutate_options, lambda: TrainConfig.of(**mutant))


ENCODINGS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO")


def _images(folder: Path) -> Iterator[Target]:
    from fastlocal.train.data.picture import read_picture

    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    for encoding in ENCODINGS:
        path = folder / f"mutant.{encoding.lower()}"
        Image.fromarray(pixels).save(path, encoding)
        yield _of_bytes(f"image, {encoding}", path, lambda path=path: read_picture(path))


def _data_sets(folder: Path) -> Iterator[Target]:
    """A training set in each format but folders, whose pictures `_images` has; torchvision compares the others' MD5."""
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 256, (8, 28, 28), dtype=np.uint8), np.arange(8, dtype=np.uint8) % 4

    raw = folder / "torchvision" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, len(labels)) + labels.tobytes())
    for name in ("images-idx3", "labels-idx1"):
        config = TrainConfig.of(**{**TINY, "data": "fashion-mnist", "data_dir": str(raw.parents[1])})
        yield _of_data(f"Fashion-MNIST, {name}", raw / f"train-{name}-ubyte", config)

    shards, encoded = folder / "shards", io.BytesIO()
    shards.mkdir()
    Image.fromarray(pixels[0]).save(encoded, "PNG")
    for split in ("train", "val"):
        entries = {f"{i:04}.png": encoded.getvalue() for i in range(len(labels))}
        entries |= {f"{i:04}.cls": str(label).encode() for i, label in enumerate(labels)}
        _write_tar(shards / f"{split}-0.tar", entries)
    config = TrainConfig.of(**{**TINY, "data": f"wds/{shards}"})
    yield _of_data("WebDataset", shards / "train-0.tar", config)

    archive = folder / "archive.tar"
    _write_tar(archive, {f"class {label}/{i}.png": encoded.getvalue() for i, label in enumerate(labels)})
    config = TrainConfig.of(**{**TINY, "data": str(archive), "val_split": 0.5})
    yield _of_data("archive", archive, config)


def _write_tar(path: Path, entries: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in sorted(entries.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _of_data(name: str, path: Path, config: TrainConfig) -> Target:
    source = pretrained_configuration(config.model.name)

    def read() -> None:
        split = data.read(config, source).training
        for _ in split.batches(list(torch.arange(len(split)).split(4)), None):
            pass

    return _of_bytes(name, path, read)
