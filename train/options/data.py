"""Which images are read, and how."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastlocal.train.errors import UserError, nearest, printable
from fastlocal.train.options import values
from fastlocal.train.options.values import Options, option

DOWNLOADED = ("cifar10", "cifar100", "stl10", "svhn", "fashion-mnist")
ARRAYS = ("digits", *DOWNLOADED, "synthetic")
DATA = (*ARRAYS, "FOLDER (or folder:FOLDER)", "FILE.tar", "hfds/NAME", "wds/FOLDER")


@dataclass(frozen=True)
class DataOptions(Options):
    """Which images are read, and how."""

    name: str = option("digits", f"what to train on: {', '.join(DATA)}", flag="data")
    val_split: float = option(
        0.0,
        "set this share of the training images apart, where there are none to validate on",
        values.number,
        at_least=0,
        below=1,
    )
    class_map: str | None = option(
        None, "archives and shards: file with a class name per line, in the order of the labels"
    )
    skip_broken: bool = option(
        False, "go on without images that cannot be read; decodes each once to find them", values.switch
    )
    data_dir: str = option("data", "where torchvision's data sets lie, or are downloaded to")
    download: bool = option(False, "fetch the data set if it is not in --data-dir", values.switch)
    train_limit: int | None = option(None, "train on a random subset of this many images", values.whole, at_least=1)
    val_limit: int | None = option(None, "validate on a random subset of this many images", values.whole, at_least=1)
    workers: int = option(
        2, "processes that read and augment large images (small ones need none)", values.whole, at_least=0, at_most=1024
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        data = self.name
        if data not in ARRAYS and not data.startswith("folder:") and os.path.isdir(data):
            object.__setattr__(self, "name", f"folder:{data}")
        elif not (
            data in ARRAYS
            or (data.startswith("folder:") and data != "folder:")
            or (data.startswith("hfds/") and data != "hfds/")
            or (data.startswith("wds/") and os.path.isdir(data.removeprefix("wds/")))
            or (data.endswith(".tar") and os.path.isfile(data))
        ):
            if os.path.isfile(data):
                raise UserError(
                    f"--data {printable(data, 80)} is a file; of files, only archives that end in .tar are read."
                )
            what = "no folder or file, and " if os.sep in data else ""
            raise UserError(
                f"--data {printable(data, 80)} is {what}not one of {', '.join(DATA)}{nearest(data, (*ARRAYS, 'folder:'))}"
            )
