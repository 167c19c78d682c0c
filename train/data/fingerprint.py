"""What tells a data set from another: classes, names and lengths of the files or the pixels themselves, normalization.

It does not tell where the data lies, so a run may move with its data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from fastlocal.train.data.preprocessing import Preprocessing
from fastlocal.train.data.splits import FileSplit, MemorySplit, Split


def fingerprint(training: Split, validation: Split, preprocessing: Preprocessing) -> dict[str, Any]:
    """A plain tree for a checkpoint. Per split and class: how many images, and a digest of them."""
    return {
        "classes": list(training.classes),
        "training images": _of_split(training),
        "validation images": _of_split(validation),
        "preprocessing": preprocessing.to_dict(),
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, a clause each; empty if nothing does."""
    return list(_differences(saved, now))


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if any(not isinstance(saved.get(name), type(value)) for name, value in now.items()):
        yield "nothing is known of what it was trained on"
        return
    gone = [name for name in saved["classes"] if name not in now["classes"]]
    new = [name for name in now["classes"] if name not in saved["classes"]]
    yield from (f"class {name!r} is gone" for name in gone)
    yield from (f"class {name!r} is new" for name in new)
    for split in ("training images", "validation images"):
        before, after = saved[split], now[split]
        for name in [*before, *(name for name in after if name not in before)]:
            if name in gone or name in new:
                continue
            old, found = before.get(name, [0, ""]), after.get(name, [0, ""])
            if old[0] != found[0]:
                yield f"class {name!r} has {found[0]} {split} and had {old[0]}"
            elif old != found:
                yield f"the {split} of class {name!r} are others or were renamed"
    kept = saved["preprocessing"]
    for name, value in now["preprocessing"].items():
        if kept.get(name) != value:
            yield f"{name} is {value} and was {kept.get(name)}"


def _of_split(split: Split) -> dict[str, list[Any]]:
    hashes = {label: hashlib.sha256() for label in range(len(split.classes))}
    counts = dict.fromkeys(hashes, 0)
    if isinstance(split, MemorySplit):
        for label, found in hashes.items():
            members = split.images[split.labels == label]
            counts[label] = len(members)
            found.update(members.contiguous().numpy().tobytes())
    else:
        assert isinstance(split, FileSplit)
        for index, label in enumerate(split.labels):
            counts[label] += 1
            place = split.kept[index]
            hashes[label].update(
                f"{split.pictures.name(place)}\0{split.pictures.size(place)}\n".encode(errors="replace")
            )
    return {
        name: [counts[label], hashes[label].hexdigest()[:32]]
        for label, name in enumerate(split.classes)
        if counts[label]
    }
