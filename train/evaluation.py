"""Validation of every exit, during a run and of a saved one."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlocal
from fastlocal.distributed import Ranks
from fastlocal.train import checkpoint as checkpoints
from fastlocal.train.build import build_device, build_model, build_trainer
from fastlocal.train.config import TrainConfig
from fastlocal.train.data import Preprocessing, Split, read_validation, refuse_unasked
from fastlocal.train.errors import UserError, printable
from fastlocal.train.export import load_run
from fastlocal.train.sheet import contact_sheet


@dataclass(frozen=True)
class Measured:
    """Cross-entropy and accuracy (0 to 1) of every exit."""

    loss: list[float]
    accuracy: list[float]


def validate(
    trainer: fastlocal.LocalTrainer,
    split: Split,
    batch_size: int,
    device: torch.device,
    *,
    ema: bool = False,
    until: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> Measured | None:
    """Measure every exit of ``trainer`` on ``split``; None if ``until`` ends the reading before its end.

    The processes of a mesh measure their shares of each batch, each the exits that it has, and all get the sums.
    """
    ranks, exits = trainer.ranks, 1 if ema else len(trainer.exit_names)
    own = slice(0, int(trainer.own_exits.stop == len(trainer.exit_names))) if ema else trainer.own_exits
    loss, correct = torch.zeros(exits, device=device), torch.zeros(exits, device=device)
    indices = list(torch.arange(len(split), device="cpu").split(batch_size))
    read = 0
    for images, labels in until(_shares(split, indices, ranks)):
        read += 1
        if not len(labels):
            continue
        labels = labels.to(device, non_blocking=True)
        given = images.to(device, non_blocking=True) if images is not None else None
        logits = trainer.predict(given, ema=ema)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.repeat(len(logits)), reduction="none")
        loss[own] += losses.view(len(logits), len(labels)).sum(1)
        correct[own] += (logits.argmax(2) == labels).sum(1)
    if read < len(indices):
        return None
    loss, correct = ranks.sum(loss), ranks.sum(correct)
    return Measured((loss / len(split)).tolist(), (correct / len(split)).tolist())


def _shares(split: Split, indices: Sequence[Tensor], ranks: Ranks) -> Iterator[tuple[Tensor | None, Tensor]]:
    """This process's images and labels of each batch; it reads no images if another process sends it features."""
    shares = [chosen.tensor_split(ranks.data.size)[ranks.data.rank] for chosen in indices]
    if ranks.modules.rank:
        labels = torch.as_tensor(split.labels, device="cpu")
        for chosen in shares:
            yield None, labels[chosen]
        return
    batches = split.batches([chosen for chosen in shares if len(chosen)], None)
    with contextlib.closing(batches):
        for chosen in shares:
            yield next(batches) if len(chosen) else (None, torch.empty(0, dtype=torch.int64, device="cpu"))


@dataclass(frozen=True)
class Saved:
    """A trained model with what it takes to use it.

    Attributes:
        path: the file or folder that it came from.
        exits: names of its classifiers; the last is the model itself, or its moving average if the run keeps one.
        infer: from uint8 images [B, C, H, W] to logits [exits, B, classes] on the CPU.
        infer_early: from the same and a confidence to the logits [B, classes] of the first exit that is so sure, and those
            exits [B], from 0.
    """

    path: Path
    config: TrainConfig
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    exits: tuple[str, ...]
    infer: Callable[[Tensor], Tensor]
    infer_early: Callable[[Tensor, float], tuple[Tensor, Tensor]]


def open_saved(path: str | Path, **changes: Any) -> Saved:
    """The best checkpoint of a run folder, the checkpoint file at ``path``, or a folder that timm loads as a local-dir.

    Args:
        changes: new values for options of the run, such as ``data`` or ``batch_size``.

    Raises:
        UserError: there is no whole checkpoint.
    """
    path = Path(path)
    if path.is_dir() and not (path / "last.pt").exists() and (path / "config.json").exists():
        return _open_plain(path, changes)
    if path.is_dir():
        path = path / ("best.pt" if (path / "best.pt").exists() else "last.pt")
    saved = checkpoints.load(path)
    settings, classes = Preprocessing.of(saved["preprocessing"]), tuple(saved["classes"])
    # What a checkpoint may not ask for: that something is fetched, or opened beside the images.
    kept = {**saved["config"], "download": False, "pretrained": False, "initial_checkpoint": None}
    kept["img_size"] = list(settings.image_size)
    if changes.get("data", kept["data"]) != kept["data"]:
        kept |= {"val_split": 0.0, "val_limit": None}  # they were about the data that the run was trained on
    config = TrainConfig.of(**{**kept, **changes})
    device = build_device(config)
    trainer = build_trainer(config, build_model(config, len(classes), settings.image_size), device, settings.normalize)
    checkpoints.load_trainer(trainer, saved["trainer"], path)

    def infer(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True)
        logits = [
            trainer.predict(images, ema=ema).float()
            for ema in ((False, True) if config.optimization.model_ema else (False,))
        ]
        return torch.cat(logits).cpu()

    def infer_early(images: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
        logits, places = trainer.predict_early(images.to(device, non_blocking=True), confidence)
        return logits.cpu(), places.cpu()

    exits = (*trainer.exit_names, *(["moving average"] if config.optimization.model_ema else []))
    return Saved(path, config, settings, classes, exits, infer, infer_early)


def _open_plain(path: Path, changes: Mapping[str, Any]) -> Saved:
    model, settings, classes = load_run(path)
    config = TrainConfig.of(**changes)
    device = build_device(config)
    model.to(device)
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) * 255 for values in settings.normalize)

    @torch.inference_mode()
    def infer(images: Tensor) -> Tensor:
        return model((images.to(device).float() - mean) / std).float().cpu()[None]

    def infer_early(images: Tensor, _: float) -> tuple[Tensor, Tensor]:
        return infer(images)[0], torch.zeros(len(images), dtype=torch.int64, device="cpu")

    return Saved(path, config, settings, classes, ("model",), infer, infer_early)


def evaluate_saved(path: str | Path, report: str | Path | None = None, **changes: Any) -> dict[str, Any]:
    """Measure every exit of what `open_saved` opens.

    Args:
        report: a folder for ``per_class.csv``, ``confusion.csv``, ``confusion.png`` and ``mistakes.png`` (the surest
            mistakes), all of the last exit.
        changes: new values for options of the run, such as ``data`` or ``batch_size``.

    Returns:
        ``checkpoint``, ``data``, ``images``, and lists over the exits: ``exits``, ``accuracy`` (0 to 1),
        ``top5_accuracy``, ``loss``; ``per_class``: name, images, accuracy and precision of each class at the last exit;
        ``notes`` on the images, a sentence each.

    Raises:
        UserError: there is no whole checkpoint, the data's classes are not the model's, or a package is missing.
    """
    if report is not None:
        _check_plots("--report")
    saved = open_saved(path, **changes)
    refuse_unasked(saved.config, changes)
    settings = {"preprocessing": saved.preprocessing.to_dict(), "classes": list(saved.classes)}
    split, notes = read_validation(saved.config, settings)
    loss, correct, top5 = (torch.zeros(len(saved.exits), dtype=torch.float64, device="cpu") for _ in range(3))
    last, labels = [], []
    for images, targets in split.batches(
        list(torch.arange(len(split), device="cpu").split(saved.config.optimization.batch_size)), None
    ):
        logits = saved.infer(images)
        for k, of_exit in enumerate(logits):
            loss[k] += F.cross_entropy(of_exit, targets, reduction="sum")
            best = of_exit.topk(min(5, len(saved.classes))).indices == targets[:, None]
            correct[k] += best[:, 0].sum()
            top5[k] += best.sum()
        last.append(logits[-1].softmax(-1))
        labels.append(targets)
    probabilities, truth = torch.cat(last), torch.cat(labels)
    confusion = torch.zeros(len(saved.classes), len(saved.classes), dtype=torch.long, device="cpu")
    confusion.index_put_((truth, probabilities.argmax(1)), torch.ones_like(truth), accumulate=True)
    per_class = [
        {
            "name": name,
            "images": int(confusion[i].sum()),
            "accuracy": float(confusion[i, i] / confusion[i].sum().clamp(min=1)),
            "precision": float(confusion[i, i] / confusion[:, i].sum().clamp(min=1)),
        }
        for i, name in enumerate(saved.classes)
    ]
    if report is not None:
        _write_report(Path(report), saved, split, per_class, confusion, probabilities, truth)
    return {
        "checkpoint": str(saved.path),
        "data": saved.config.data.name,
        "images": len(split),
        "exits": list(saved.exits),
        "accuracy": (correct / len(split)).tolist(),
        "top5_accuracy": (top5 / len(split)).tolist(),
        "loss": (loss / len(split)).tolist(),
        "per_class": per_class,
        "notes": list(notes),
    }


def _check_plots(flag: str) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(f"{flag} draws plots and needs matplotlib: pip install matplotlib.") from None


MISTAKES = 25  # on the contact sheet


def _write_report(
    folder: Path,
    saved: Saved,
    split: Split,
    per_class: list[dict[str, Any]],
    confusion: Tensor,
    probabilities: Tensor,
    truth: Tensor,
) -> None:
    from matplotlib.figure import Figure

    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(folder / "per_class.csv", [list(per_class[0]), *(list(row.values()) for row in per_class)])
        rows = [[name, *row] for name, row in zip(saved.classes, confusion.tolist(), strict=True)]
        _write_csv(folder / "confusion.csv", [["labelled as", *saved.classes], *rows])
        side = min(4 + 0.25 * len(saved.classes), 40)
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.add_subplot(xlabel="predicted", ylabel="labelled")
        shown = [printable(name, 30).replace("$", r"\$") for name in saved.classes]
        image = axes.imshow(confusion / confusion.sum(1, keepdim=True).clamp(min=1), cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, label="share of the labelled")
        axes.set_xticks(range(len(shown)), shown, rotation=90)
        axes.set_yticks(range(len(shown)), shown)
        figure.savefig(folder / "confusion.png")
        _mistakes(saved, split, probabilities, truth).save(folder / "mistakes.png")
    except OSError as error:
        raise UserError(f"--report {folder} cannot be written: {error.strerror or error}.") from None


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8", newline="")


def _mistakes(saved: Saved, split: Split, probabilities: Tensor, truth: Tensor) -> Any:
    """The wrong answers that the model is surest of, as it sees the images."""
    sure, answer = probabilities.max(1)
    order = torch.where(answer != truth, sure, -1).argsort(descending=True)[: int((answer != truth).sum())][:MISTAKES]
    if not len(order):
        return contact_sheet([], [])
    images = [
        image
        for batch, _ in split.batches(list(order.split(saved.config.optimization.batch_size)), None)
        for image in batch
    ]
    captions = [f"{saved.classes[truth[i]]}: {saved.classes[answer[i]]} {100 * sure[i]:.0f} %" for i in order.tolist()]
    return contact_sheet(images, captions)
