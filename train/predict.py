"""``fastlocal predict``: labels with probabilities for pictures, by the trained model or by an early exit."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlocal.train.data.listing import list_pictures, told
from fastlocal.train.data.picture import read_picture
from fastlocal.train.errors import UserError, printable
from fastlocal.train.evaluation import Saved, open_saved

CONFIDENCE = 0.9  # probability at which ``exit="auto"`` goes no deeper


@dataclass(frozen=True)
class Prediction:
    """Labels, the likeliest first, with probabilities; ``exit`` of ``exits`` classifiers, from 1, answered."""

    path: Path
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    exit: int
    exits: int


def predict(
    run: str | Path,
    images: Sequence[str | Path],
    *,
    top_k: int = 5,
    exit: int | str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
) -> Iterator[Prediction]:
    """Predictions for image files, and for all in folders.

    Args:
        run: a run folder, or a checkpoint of one.
        exit: which classifier answers, counted from 1; ``"auto"``: for each image the first that gives a class a
            probability of at least `CONFIDENCE`. Default: the model itself (its moving average, if the run keeps one).

    Raises:
        UserError: a picture cannot be read, there is none, or the run has no such exit.
    """
    saved = open_saved(run, **{"batch_size": batch_size or 32, **({"device": device} if device else {})})
    exits = len(_early(saved))
    if isinstance(exit, int) and not 1 <= exit <= exits:
        raise UserError(f"--exit must be auto or from 1 to {exits} for this run, got {exit}.")
    paths = list(_paths(images))
    for start in range(0, len(paths), saved.config.optimization.batch_size):
        part = paths[start : start + saved.config.optimization.batch_size]
        yield from _answers(saved, part, _chosen(saved, _read(saved, part), exit), min(top_k, len(saved.classes)))


def _paths(images: Sequence[str | Path]) -> Iterator[Path]:
    for image in map(Path, images):
        if image.is_dir():
            found, left_out = list_pictures(image)
            if left_out:
                print(f"{image}: left out: {told(left_out)}", file=sys.stderr)
            if not found:
                raise UserError(f"there is no image in {image}.")
            yield from found
        elif image.exists():
            yield image
        else:
            raise UserError(f"there is no image {printable(str(image), 200)}.")


def _read(saved: Saved, paths: Sequence[Path]) -> Tensor:
    transform, channels = saved.preprocessing.transform(), saved.preprocessing.channels
    with torch.device("cpu"):
        return torch.stack([torch.as_tensor(transform(read_picture(path, channels))) for path in paths])


def _chosen(saved: Saved, images: Tensor, exit: int | str | None) -> tuple[Tensor, Tensor]:
    """Probabilities [B, classes] and the exits [B] that gave them."""
    if exit == "auto":
        logits, places = saved.infer_early(images, CONFIDENCE)
        return logits.softmax(-1), places + 1
    probabilities, names = saved.infer(images).softmax(-1), _early(saved)
    if exit is None:
        places = torch.full((len(images),), len(probabilities) - 1, device="cpu")
    else:
        places = torch.full((len(images),), int(exit) - 1, device="cpu")
    return probabilities[places, torch.arange(len(images), device="cpu")], places.clamp(max=len(names) - 1) + 1


def _early(saved: Saved) -> list[str]:
    """The exits of the model itself, without its moving average."""
    return [name for name in saved.exits if name != "moving average"]


def _answers(saved: Saved, paths: Sequence[Path], chosen: tuple[Tensor, Tensor], top_k: int) -> Iterator[Prediction]:
    values, places = chosen[0].topk(top_k)
    for path, row, indices, exit in zip(paths, values.tolist(), places.tolist(), chosen[1].tolist(), strict=True):
        yield Prediction(path, tuple(saved.classes[i] for i in indices), tuple(row), exit, len(_early(saved)))


def show(predictions: Iterator[Prediction], depth: bool, table: str | None) -> None:
    """Print a line for each prediction, write them to the CSV file ``table``, and print the average ``depth`` used."""
    exits, rows = [], []
    for prediction in predictions:
        pairs = list(zip(prediction.labels, prediction.probabilities, strict=True))
        answer = "  ".join(f"{printable(label, 80)} {100 * share:.1f} %" for label, share in pairs)
        print(f"{printable(str(prediction.path))}: {answer}")
        exits.append(prediction.exit)
        flat: list[Any] = [value for label, share in pairs for value in (label, f"{share:.6f}")]
        rows.append([str(prediction.path), prediction.exit, *flat])
    if depth:
        print(f"average depth: exit {sum(exits) / len(exits):.2f} of {prediction.exits}")
    if table is not None:
        _write(rows, table)


def _write(rows: list[list[Any]], table: str) -> None:
    try:
        with open(table, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            columns = [f"{name}_{i + 1}" for i in range((len(rows[0]) - 2) // 2) for name in ("label", "probability")]
            writer.writerow(["path", "exit", *columns])
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--csv {table} cannot be written: {error.strerror}.") from None
