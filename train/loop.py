"""The training loop: epochs of `LocalTrainer.step`, validation of every exit, saving and resuming.

A run folder holds ``config.yaml``, ``metrics.jsonl`` (one row per epoch), the checkpoints ``last.pt`` and ``best.pt``,
and ``model.safetensors``: the best model so far, as plain timm loads it. "Best" is the validation accuracy of the last
exit, which is the accuracy of the timm model itself, or that of its moving average if there is one.
"""

from __future__ import annotations

import json
import math
import random
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from timm.data import Mixup
from timm.scheduler import create_scheduler_v2
from torch import Tensor

import fastlocal
from fastlocal.train import checkpoint as checkpoints
from fastlocal.train.augment import mix_batch
from fastlocal.train.build import Normalization, build_device, build_model, build_trainer, designed_size, follow_plan
from fastlocal.train.config import TrainConfig, UserError, write_file
from fastlocal.train.data import MemorySplit, Split, check_same_classes, read, training_indices
from fastlocal.train.evaluation import Measured, load_trainer, validate
from fastlocal.train.report import Report, keep_rows, peak_memory

# What may change when a run goes on: where data and arithmetic live and what is said, nothing that the result hangs on
# (beyond rounding, for the second line).
RESUMABLE = {"data_dir", "download", "workers", "log_interval", "recovery_interval", "log"} | {
    *("device", "kernels", "micro_batch", "recompute", "residency")
}


@dataclass(frozen=True)
class Summary:
    """What a run came to; accuracies are shares from 0 to 1, one per exit, of the last validation (empty if none)."""

    folder: Path
    exits: tuple[str, ...]
    epochs: int
    accuracy: tuple[float, ...]
    best_accuracy: float
    interrupted: bool


@dataclass
class Progress:
    """Where a run stands. Saved with every checkpoint."""

    epoch: int = 0  # epochs completed
    position: int = 0  # steps done in the epoch that is under way
    best_accuracy: float = -1.0
    accuracy: list[float] = field(default_factory=list)  # of the last validation, one per exit
    lr: float = 0.0  # of the last step
    seconds: float = 0.0  # training time and sums of the epoch that is under way
    totals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, **amounts: Tensor) -> None:
        for name, amount in amounts.items():
            amount = amount.detach().double()
            self.totals[name] = self.totals[name] + amount if name in self.totals else amount

    def next_epoch(self) -> None:
        self.epoch, self.position, self.seconds, self.totals = self.epoch + 1, 0, 0.0, {}


def run(config: TrainConfig) -> Summary:
    """Train from the start, in a new run folder.

    Raises:
        UserError: a mistake in ``config``, or the run folder exists or cannot be written.
        ValueError: what the engine refuses.
    """
    return _Run(config).train()


def resume(folder: str | Path, **changes: Any) -> Summary:
    """Go on with the run in ``folder``; on a CPU it ends bit for bit where it would have without the break.

    Args:
        changes: new values for options in `RESUMABLE`.

    Raises:
        UserError: there is no whole checkpoint in ``folder``, its data set has changed, or an option cannot be changed.
    """
    folder = Path(folder)
    saved = checkpoints.load(folder / "last.pt")
    kept = saved["config"]
    config = TrainConfig.of(**{**kept, **changes})
    for name in changes:
        if name not in RESUMABLE and getattr(config, name) != getattr(TrainConfig.of(**kept), name):
            raise UserError(f"--{name.replace('_', '-')} cannot change on --resume; start a new run to change it.")
    return _Run(config, folder, saved).train()


class _Run:
    def __init__(self, config: TrainConfig, folder: Path | None = None, saved: dict[str, Any] | None = None) -> None:
        self.config, self.device, self.progress = config, build_device(config), Progress()
        size = designed_size(config.model)
        self.training, self.validation = read(config, "train", size), read(config, "validation", size)
        check_same_classes(self.training.classes, self.validation.classes, "the validation images")
        self.steps = max(len(self.training) // config.batch_size, 1)

        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.normalize = None if config.pretrained else normalization(self.training)
        self.model = build_model(config, len(self.training.classes), self.training.image_size, start=saved is None)
        if config.memory is not None and saved is None:
            self.config = config = follow_plan(config, self.model, self.device)
        self.trainer = build_trainer(config, self.model, self.device, self.normalize)
        self.mixup = _mixup(config, len(self.training.classes))
        self.schedules = _schedules(config, self.trainer, self.steps)

        if saved is None:
            self.folder = _new_folder(config)
            write_file(config, self.folder / "config.yaml")
            self.save("last.pt")  # whatever happens from here on, --resume works
        else:
            assert folder is not None
            self.folder = folder
            self._restore(saved)

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["training_images"] != len(self.training):
            raise UserError(
                f"--data {self.config.data} has {len(self.training)} training images now, and had"
                f" {saved['training_images']} when this run was saved."
            )
        load_trainer(self.trainer, saved["trainer"], self.folder / "last.pt")
        self.progress = Progress(**saved["progress"])
        self.progress.totals = {name: total.to(self.device) for name, total in self.progress.totals.items()}
        keep_rows(self.folder / "metrics.jsonl", self.progress.epoch)
        checkpoints.restore_random_state(saved["random"])

    def save(self, *names: str) -> None:
        saved = {
            "config": self.config.to_dict(),
            "classes": list(self.training.classes),
            "image_size": self.training.image_size,
            "normalize": self.normalize and [list(values) for values in self.normalize],
            "training_images": len(self.training),
            "trainer": self.trainer.state_dict(),
            "progress": vars(self.progress),
            "random": checkpoints.random_state(),
        }
        for name in names:
            checkpoints.save(self.folder / name, saved)

    def train(self) -> Summary:
        config, progress = self.config, self.progress
        report = Report(config, self.folder, self.trainer.exit_names, self.steps)
        with StopRequest() as stop, report:
            for line in self._header():
                report.say(line)
            while progress.epoch < config.epochs:
                measured = self._validate(stop) if self._train_epoch(report, stop) else None
                if measured is None:
                    self.save("last.pt")
                    report.say(f"stopped; go on with: fastlocal train --resume {shlex.quote(str(self.folder))}")
                    break
                self._finish_epoch(measured, report)
            else:
                report.say(f"done: {self.folder}")
        return Summary(
            folder=self.folder,
            exits=tuple(self.trainer.exit_names),
            epochs=progress.epoch,
            accuracy=tuple(progress.accuracy),
            best_accuracy=progress.best_accuracy,
            interrupted=progress.epoch < config.epochs,
        )

    def _train_epoch(self, report: Report, stop: StopRequest) -> bool:
        """Train the rest of the epoch; False if stopped before its end."""
        config, progress = self.config, self.progress
        order = training_indices(len(self.training), config.batch_size, config.seed, progress.epoch)
        seconds, begun = progress.seconds, time.perf_counter()
        for images, labels in self.training.batches(order[progress.position :], progress.epoch):
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            targets = labels
            if self.mixup is not None:
                images, targets = mix_batch(self.mixup, images, labels)
            metrics = self.trainer.step(images, targets)
            progress.position += 1
            progress.lr = self.trainer.optimizers[-1].param_groups[0]["lr"]
            for schedule in self.schedules:
                schedule.step_update(progress.epoch * self.steps + progress.position)
            progress.add(
                samples=torch.tensor(metrics.samples),
                loss=metrics.loss * metrics.samples,
                regularizer=metrics.regularizer * metrics.samples,
                correct=metrics.correct,
                gradient_norm=metrics.gradient_norm.masked_fill(metrics.skipped, 0.0),
                skipped=metrics.skipped,
            )
            progress.seconds = seconds + time.perf_counter() - begun
            done = progress.position * config.batch_size
            report.step(progress.epoch + 1, progress.position, metrics.loss, done / progress.seconds)
            if stop.requested:
                return False
            if config.recovery_interval and progress.position % config.recovery_interval == 0:
                self.save("last.pt")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        progress.seconds = seconds + time.perf_counter() - begun
        return True

    def _validate(self, stop: StopRequest) -> list[Measured] | None:
        """Measure every exit, and the moving average if there is one; None if stopped before the end."""
        measured = []
        for ema in (False, True) if self.config.model_ema else (False,):
            result = validate(
                *(self.trainer, self.validation, self.config.batch_size, self.device),
                ema=ema,
                stopped=lambda: stop.requested,
            )
            if result is None:
                return None
            measured.append(result)
        return measured

    def _finish_epoch(self, measured: list[Measured], report: Report) -> None:
        progress, totals = self.progress, {name: total.cpu() for name, total in self.progress.totals.items()}
        samples = totals["samples"].item()
        for name, loss in zip(self.trainer.exit_names, totals["loss"].tolist(), strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of {name} is not finite in epoch {progress.epoch + 1}: lower --lr or set --clip-grad;"
                    f" the last good state is in {self.folder}."
                )
        row = {
            "epoch": progress.epoch + 1,
            "step": (progress.epoch + 1) * self.steps,
            "exits": list(self.trainer.exit_names),
            "loss": (totals["loss"] / samples).tolist(),
            "regularizer": (totals["regularizer"] / samples).tolist(),
            "accuracy": (totals["correct"] / samples).tolist(),
            "gradient_norm": (totals["gradient_norm"] / (self.steps - totals["skipped"]).clamp(min=1)).tolist(),
            "skipped_steps": totals["skipped"].int().tolist(),
            "validation_loss": measured[0].loss,
            "validation_accuracy": measured[0].accuracy,
            "lr": progress.lr,
            "images_per_second": samples / progress.seconds,
            "seconds": progress.seconds,
            "peak_memory_bytes": peak_memory(self.device),
        }
        if self.config.model_ema:
            row["ema_validation_loss"], row["ema_validation_accuracy"] = measured[1].loss[-1], measured[1].accuracy[-1]
        report.epoch(row)
        exported = measured[-1].accuracy[-1]
        best = exported > progress.best_accuracy
        progress.accuracy, progress.best_accuracy = measured[0].accuracy, max(exported, progress.best_accuracy)
        progress.next_epoch()
        self.save("last.pt", *(["best.pt"] if best else []))
        if best:
            self._export()

    def _export(self) -> None:
        state = self.trainer.ema_state_dict() or self.model.state_dict()
        metadata = {
            "format": "pt",
            "model": self.config.model,
            "model_kwargs": json.dumps({"img_size": self.training.image_size, **self.config.to_dict()["model_kwargs"]}),
            "classes": json.dumps(list(self.training.classes)),
            "normalize": json.dumps(self.normalize),
        }
        content = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in state.items()}, metadata)
        checkpoints.write_atomically(self.folder / "model.safetensors", lambda file: file.write(content))

    def _header(self) -> Iterator[str]:
        config, parameters = self.config, sum(p.numel() for p in self.model.parameters())
        size = self.training.image_size
        yield f"data     {config.data}: {len(self.training)} + {len(self.validation)} images, {size} pixels"
        if config.data == "synthetic":
            yield "         random images: only the throughput and the memory mean anything"
        yield f"model    {config.model}, {parameters / 1e6:.2f} M parameters"
        decoder = f" with decoder {config.decoder}" if config.objective in ("feature", "image") else ""
        yield f"learning {config.objective}{decoder}, {len(self.trainer.modules)} modules"
        yield f"device   {self.device}"
        yield f"run      {self.folder}"


def normalization(training: Split) -> Normalization | None:
    """Mean and standard deviation to normalize with: of the data, if it is in memory, else the model's own (None)."""
    return training.mean_and_std() if isinstance(training, MemorySplit) else None


class StopRequest:
    """While active, the first SIGINT or SIGTERM only sets ``requested``; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, *_: object) -> None:
        self.requested = True
        self.__exit__()


def _mixup(config: TrainConfig, classes: int) -> Mixup | None:
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, label_smoothing=config.smoothing, num_classes=classes
    )


def _schedules(config: TrainConfig, trainer: fastlocal.LocalTrainer, steps: int) -> list[Any]:
    """One learning-rate schedule per module, stepped after each training step; none for ``--sched none``."""
    if config.sched == "none":
        return []
    return [
        create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=cast(Any, config.warmup_epochs),  # timm takes fractions too
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            decay_epochs=config.decay_epochs,
            decay_rate=config.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )[0]
        for optimizer in trainer.optimizers
    ]


def _new_folder(config: TrainConfig) -> Path:
    name = config.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{config.data.split(':')[0]}-{config.objective}"
    folder = Path(config.output) / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if folder.is_dir():
            raise UserError(
                f"run folder {folder} exists already: choose another --experiment, or continue with --resume {folder}."
            ) from None
        raise UserError(f"run folder {folder} cannot be made: a file of that name is in the way.") from None
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be made: {error.strerror}; choose another --output.") from None
    return folder
