"""Where the tests run, and the data sets that torchvision reads, in tiny files of their own formats.

On a CPU, Triton must run in its interpreter in every test process: it reads this variable when it is first imported. The
ops interpret kernels only where a test asks for ``use_kernels("triton")``; elsewhere a CPU takes the reference.

``FASTLOCAL_TEST_DEVICE=cuda`` compiles the kernels, and puts on a card whatever a test makes without naming a device.
"""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

DEVICE = os.environ.get("FASTLOCAL_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Whatever a test makes without naming a device is on the one that is tested."""
    if DEVICE == "cpu":
        yield
        return
    import torch

    with torch.device(DEVICE):
        yield


@pytest.fixture
def interpreter() -> None:
    """For a test that looks into Triton's interpreter, where a CPU runs the kernels; a card runs them compiled."""
    if DEVICE != "cpu":
        pytest.skip("it looks into Triton's interpreter, and a card compiles kernels")


def _some_images(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(count + size)
    return generator.integers(0, 256, (count, 3, size, size), dtype=np.uint8), generator.integers(0, 10, count)


def _write_cifar(root: Path, kind: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    ten = kind == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir()
    training, test = ([f"data_batch_{i}" for i in range(1, 6)], "test_batch") if ten else (["train"], "test")
    written = {}
    for index, name in enumerate([*training, test]):
        images, labels = _some_images(4 + index, 32)
        entry = {"data": images.reshape(len(images), -1), ("labels" if ten else "fine_labels"): labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
        written[name] = (images, labels)
    key, meta = ("label_names", "batches.meta") if ten else ("fine_label_names", "meta")
    names = [f"class {i}" for i in range(10 if ten else 100)]
    (folder / meta).write_bytes(pickle.dumps({key: names}))
    joined = tuple(np.concatenate([written[name][part] for name in training]) for part in (0, 1))
    return {"train": (joined[0], joined[1]), "validation": written[test]}


def _write_stl10(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder = root / "stl10_binary"
    folder.mkdir()
    written = {}
    for split, name in (("train", "train"), ("validation", "test")):
        images, labels = _some_images(3, 96)
        images.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")  # column-major pixels
        (labels + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
        written[split] = (images, labels)
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    for name in ("unlabeled_X.bin", "fold_indices.txt"):
        (folder / name).touch()
    return written


def _write_svhn(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from scipy.io import savemat

    written = {}
    for split, name, count in (("train", "train", 5), ("validation", "test", 3)):
        images, labels = _some_images(count, 32)
        stored = np.where(labels == 0, 10, labels)[:, None]
        savemat(root / f"{name}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": stored.astype(np.uint8)})
        written[split] = (images, labels)
    return written


def _write_fashion_mnist(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    written = {}
    for split, name, count in (("train", "train", 5), ("validation", "t10k", 3)):
        images, labels = _some_images(count, 28)
        grey = images[:, 0]
        for kind, header, content in (
            ("images-idx3", struct.pack(">IIII", 0x803, count, 28, 28), grey),
            ("labels-idx1", struct.pack(">II", 0x801, count), labels.astype(np.uint8)),
        ):
            data = header + content.tobytes()
            (folder / f"{name}-{kind}-ubyte").write_bytes(data)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))
        written[split] = (np.repeat(grey[:, None], 3, axis=1), labels)
    return written


WRITERS: dict[str, Callable[[Path], dict[str, tuple[np.ndarray, np.ndarray]]]] = {
    "cifar10": lambda root: _write_cifar(root, "cifar10"),
    "cifar100": lambda root: _write_cifar(root, "cifar100"),
    "stl10": _write_stl10,
    "svhn": _write_svhn,
    "fashion-mnist": _write_fashion_mnist,
}


@pytest.fixture
def torchvision_files(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Path, str], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """``torchvision_files(folder, "cifar10")`` writes a few images as torchvision expects them; returns them by split.

    torchvision checks the MD5 of its files, which these cannot have; that they exist is still checked.
    """
    from torchvision.datasets import cifar, stl10, svhn

    for module in (cifar, stl10, svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())
    return lambda folder, data: WRITERS[data](folder)
