"""Listing pictures and their classes: folders, and what timm's own readers open. No file is passed over without a word."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from timm.utils.misc import natural_key
from torch import Tensor

from fastlocal.train.augment import generator_for
from fastlocal.train.data.picture import Header, Source, read_header, read_picture
from fastlocal.train.errors import UserError, printable

TRAINING_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
SUBSET_SEED = 0  # --train-limit, --val-limit and --val-split take the same images whatever the run's seed
# What systems and programs leave in folders; names that begin with a dot or end with a tilde are skipped, too.
_SYSTEM = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle", "$recycle.bin"}
_SYSTEM |= {"system volume information", "lost+found", "__pycache__", "found.000", "picasa.ini"}
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # which Pillow opens without reading them itself


class Pictures(Protocol):
    """Files, or what stands in for them in an archive."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Source: ...
    def name(self, index: int) -> str:
        """A name for the fingerprint: relative to the data set, with forward slashes."""

    def where(self, index: int) -> str:
        """A name for people."""

    def size(self, index: int) -> int:
        """Bytes."""


@dataclass(frozen=True)
class PictureFiles:
    """Files below ``root``, by their names relative to it."""

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Source:
        return self.root / self.names[index]

    def name(self, index: int) -> str:
        return self.names[index]

    def where(self, index: int) -> str:
        return str(self.root / self.names[index])

    def size(self, index: int) -> int:
        return (self.root / self.names[index]).stat().st_size


class Member(NamedTuple):
    """One file of an archive: where its ``size`` bytes begin in the file ``archive``."""

    archive: str
    name: str
    offset: int
    size: int

    @classmethod
    def of(cls, archive: str, info: tarfile.TarInfo, within: tarfile.TarInfo | None = None) -> Member:
        """What `tarfile` found in ``archive``, or in the archive ``within`` it.

        Raises:
            ValueError: its bytes do not lie in one piece.
        """
        if info.issparse() or (within and within.issparse()):
            raise ValueError(f"{info.name} is stored with holes (a sparse file)")
        return cls(archive, info.name, info.offset_data + (within.offset_data if within else 0), info.size)


@dataclass(frozen=True)
class PicturesInArchives:
    """Members of tar archives. Each is read through a handle of its own: one that threads or forked processes share has one
    position for all of them, and gives one reader the bytes of another's picture."""

    members: tuple[Member, ...]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Source:
        member = self.members[index]
        with open(member.archive, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    def name(self, index: int) -> str:
        return self.members[index].name

    def where(self, index: int) -> str:
        return f"{self.members[index].name} in {self.members[index].archive}"

    def size(self, index: int) -> int:
        return self.members[index].size


@dataclass(frozen=True)
class PicturesOfHub:
    """Rows of a Hugging Face data set, by timm's reader: memory-mapped, so threads and processes share no position."""

    reader: Any

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> bytes:
        with self.reader[index][0] as file:
            return bytes(file.read())

    def name(self, index: int) -> str:
        return str(self.reader.filename(index) or index)

    def where(self, index: int) -> str:
        return self.name(index)

    def size(self, index: int) -> int:
        return len(self[index])


@dataclass(frozen=True)
class Listing:
    """The pictures of one split and the name of each one's class; ``kept`` are the places of those that are used.

    Attributes:
        left_out: files that are none, by ending.
        headers: of the kept pictures, once they were checked.
        broken: pictures that could not be read, where the run goes on without them.
    """

    pictures: Pictures
    labels: tuple[str, ...]
    kept: tuple[int, ...]
    left_out: Counter[str]
    headers: tuple[Header, ...] = ()
    broken: int = 0

    @classmethod
    def of(cls, pictures: Pictures, labels: tuple[str, ...], left_out: Counter[str] | None = None) -> Listing:
        return cls(pictures, labels, tuple(range(len(labels))), left_out or Counter())

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def classes(self) -> list[str]:
        """In the order of timm's folder reader: digits as numbers, capitals as small letters."""
        return sorted({self.labels[i] for i in self.kept}, key=lambda name: (natural_key(name), name))

    def limited(self, count: int | None) -> Listing:
        """A random subset of ``count``, always the same."""
        return replace(self, kept=tuple(self.kept[i] for i in subset(len(self.kept), count).tolist()))

    def parted(self, share: float) -> tuple[Listing, Listing]:
        """A training and a validation part, the latter with this ``share`` of each class, at least one picture."""
        validation: set[int] = set()
        for number, name in enumerate(self.classes):
            members = [i for i in self.kept if self.labels[i] == name]
            if len(members) < 2:
                raise UserError(f"--val-split needs two images of each class, and class {name!r} has one.")
            count = min(max(round(share * len(members)), 1), len(members) - 1)
            order = torch.randperm(len(members), generator=generator_for(SUBSET_SEED, number), device="cpu")
            validation.update(members[i] for i in order[:count].tolist())
        rest = tuple(i for i in self.kept if i not in validation)
        return replace(self, kept=rest), replace(self, kept=tuple(sorted(validation)), left_out=Counter())

    def checked(self, skip_broken: bool) -> Listing:
        """With headers. ``skip_broken`` also decodes every picture, since a file may be broken anywhere.

        Raises:
            UserError: some cannot be read, which are named, or none is left.
        """

        def look(index: int) -> Header | UserError:
            try:
                header = read_header(self.pictures[index], self.pictures.where(index))
                if skip_broken:
                    read_picture(self.pictures[index], name=self.pictures.where(index))
                return header
            except UserError as error:
                return error
            except OSError as error:
                return UserError(f"image file {self.pictures.where(index)} cannot be read: {error.strerror}.")

        with ThreadPoolExecutor(
            min(8, 2 * (os.cpu_count() or 1))
        ) as threads:  # files are waited for, Pillow has no GIL
            found = list(threads.map(look, self.kept))
        errors = [entry for entry in found if isinstance(entry, UserError)]
        if errors and not skip_broken:
            names = [self.pictures.name(i) for i, e in zip(self.kept, found, strict=True) if isinstance(e, UserError)]
            more = f" {len(errors)} files cannot be read: {listed(names)}." if len(errors) > 1 else ""
            raise UserError(f"{errors[0]}{more} Mend or remove what is broken, or add --skip-broken.")
        good = [(i, h) for i, h in zip(self.kept, found, strict=True) if isinstance(h, Header)]
        if not good:
            raise UserError(f"none of the {len(self)} images can be read; the first: {errors[0]}")
        kept, headers = zip(*good, strict=True)
        return replace(self, kept=kept, headers=headers, broken=len(errors))


def subset(total: int, count: int | None) -> Tensor:
    """``count`` of ``total`` places, in order; all for None."""
    if count is None or count >= total:
        return torch.arange(total, device="cpu")
    return torch.randperm(total, generator=generator_for(SUBSET_SEED), device="cpu")[:count].sort().values


def listed(names: list[str], most: int = 20) -> str:
    """``names`` for a sentence; beyond ``most`` they are only counted."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name, 100) for name in names[:most]) + more


def list_folder(root: Path, what: str) -> Listing:
    """``root/CLASS/**``: every picture in a class folder or below it.

    Args:
        what: the option and its value, for sentences.

    Raises:
        UserError: there is no class, or a class without pictures.
    """
    endings, left_out = picture_endings(), Counter[str]()
    names: list[str] = []
    labels: list[str] = []
    empty: list[str] = []
    for entry in _entries(root):
        if not entry.is_dir():
            left_out[_ending(entry.name) if _ending(entry.name) not in endings else "beside the class folders"] += 1
            continue
        before = len(names)
        for path in _files(Path(entry.path), (os.path.realpath(root),)):
            if _ending(path.name) in endings:
                names.append(path.relative_to(root).as_posix())
                labels.append(entry.name)
            else:
                left_out[_ending(path.name)] += 1
        if len(names) == before:
            empty.append(entry.name)
    others = f" (left out: {told(left_out)})" if left_out else ""
    if not names:
        raise UserError(f"{what} is not usable: {root} holds no class folder with images{others}.")
    if empty:
        raise UserError(f"{what} is not usable: there is no image in {root} for class {listed(empty)}{others}.")
    return Listing.of(PictureFiles(root, tuple(names)), tuple(labels), left_out)


def list_pictures(root: Path) -> tuple[list[Path], Counter[str]]:
    """Every picture in the folder ``root`` or below it, and what was left out; no classes."""
    endings, left_out = picture_endings(), Counter[str]()
    found = []
    for path in _files(root):
        if _ending(path.name) in endings:
            found.append(path)
        else:
            left_out[_ending(path.name)] += 1
    return found, left_out


def told(left_out: Counter[str]) -> str:
    """Such as ``12 .xyz, 4 .heic``."""
    return ", ".join(f"{count} {printable(ending, 30)}" for ending, count in left_out.most_common())


def split_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the folders ``names`` in ``root``, in whatever case: "Train" is no class either."""
    found = {entry.name.lower(): Path(entry.path) for entry in _entries(root) if entry.is_dir()}
    return next((found[name] for name in names if name in found), None)


def picture_endings() -> set[str]:
    """Of the files that this Pillow reads."""
    formats = Image.registered_extensions()  # which loads the readers
    known = {*Image.OPEN, "MPO"} - _NO_PICTURES  # Pillow lists no reader of MPO, for it is that of JPEG
    return {ending for ending, format in formats.items() if format in known}


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "(no ending)"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = [e for e in entries if not _skipped(e.name)]
    except OSError as error:
        raise UserError(f"{printable(str(folder))} cannot be listed: {error.strerror}.") from None
    return sorted(found, key=lambda e: (natural_key(e.name), e.name))


def _skipped(name: str) -> bool:
    return name.startswith(".") or name.endswith("~") or name.lower() in _SYSTEM


def _files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it is in
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files(Path(entry.path), (*above, real))
        else:
            yield Path(entry.path)
