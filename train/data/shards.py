"""WebDataset's shards: tar archives in which ``KEY.jpg`` and ``KEY.cls`` are one sample.

timm's reader of them has no random access and passes over what it cannot read; here a sample is a picture like any other, and
one that lacks its label or its picture is told.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

from fastlocal.train.data.listing import Listing, Member, PicturesInArchives, listed
from fastlocal.train.errors import UserError, printable

IMAGES = ("jpg", "jpeg", "png", "webp")


def list_shards(root: Path, splits: tuple[str, ...], what: str, class_map: str | None) -> Listing:
    """The samples of ``root/SPLIT*.tar`` for the first of ``splits`` that has any.

    Args:
        what: the option and its value, for sentences.
        class_map: a file with a class name per line, in the order of the labels in ``.cls``; else those are the names.

    Raises:
        UserError: there are no such shards, one cannot be read, or a sample is incomplete.
    """
    shards = next((found for split in splits if (found := sorted(root.glob(f"{split}*.tar")))), [])
    if not shards:
        raise UserError(f"{what} is not usable: {root} holds no shards {' or '.join(f'{s}*.tar' for s in splits)}.")
    names = Path(class_map).read_text(encoding="utf-8").split("\n") if class_map else []
    members: list[Member] = []
    labels: list[str] = []
    incomplete: list[str] = []
    for shard in shards:
        pictures, classes = _samples(shard, what)
        incomplete += [f"{key} in {shard.name}" for key in sorted(pictures.keys() ^ classes.keys())]
        for key in sorted(pictures.keys() & classes.keys()):
            members.append(pictures[key])
            labels.append(_name(classes[key], names, f"{key} in {shard.name}", what))
    if incomplete:
        raise UserError(f"{what} is not usable: picture or label is missing in {listed(incomplete, 5)}.")
    return Listing.of(PicturesInArchives(tuple(members)), tuple(labels))


def _samples(shard: Path, what: str) -> tuple[dict[str, Member], dict[str, str]]:
    pictures: dict[str, Member] = {}
    classes: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                folder, _, file = info.name.rpartition("/")
                stem, _, ending = file.partition(".")  # as webdataset: all after the first dot
                key = f"{folder}/{stem}" if folder else stem
                if info.isfile() and ending.lower() in IMAGES:
                    pictures[key] = Member.of(str(shard), info)
                elif info.isfile() and ending == "cls":
                    content = archive.extractfile(info)
                    classes[key] = content.read(100).decode("utf-8").strip() if content is not None else ""
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        raise UserError(f"{what} is not usable: {shard} cannot be read: {printable(str(error), 200)}.") from None
    return pictures, classes


def _name(label: str, names: list[str], where: str, what: str) -> str:
    if not label.isdecimal():
        raise UserError(f"{what} is not usable: the label of {where} must be a number, got {printable(label, 40)!r}.")
    if not names:
        return str(int(label))
    if int(label) >= len(names) or not names[int(label)]:
        raise UserError(f"--class-map has no line for label {label} of {where}.")
    return names[int(label)].strip()
