"""The training loop: epochs of `LocalTrainer.step`, validation of every exit, saving and resuming.

`RunFolder` says what a run folder holds. "Best" is the validation accuracy of the last exit, which is the accuracy of the
timm model itself, or that of its moving average if there is one.

Whatever ends the loop between two steps (a signal, an image that cannot be read, workers that are gone), the state is saved
first; what ends it within a step leaves the last save.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import shlex
import time
from collections.abc import Generator, Iterator
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
from fastlocal.train.build import (
    NO_BFLOAT16,
    amp_dtype,
    build_device,
    build_model,
    build_trainer,
    follow_plan,
    input_arguments,
    pixels,
    pretrained_configuration,
)
from fastlocal.train.config import TrainConfig, to_yaml
from fastlocal.train.curves import DRAWN, Curves
from fastlocal.train.data import differences, read, refuse_unasked, training_indices
from fastlocal.train.errors import UserError
from fastlocal.train.evaluation import Measured, validate
from fastlocal.train.export import local_dir_configuration
from fastlocal.train.logs import check_log
from fastlocal.train.losses import training_loss
from fastlocal.train.options.values import flag
from fastlocal.train.ranks import AnyReport, Crew, Silence, first_process, joined
from fastlocal.train.report import Report, device_name, forget_peak, peak_memory
from fastlocal.train.run_folder import RunFolder, SaveError, default_name
from fastlocal.train.sheet import contact_sheet
from fastlocal.train.signals import StopRequest
from fastlocal.train.start import fitted, read_start

CHECK_EVERY = 50  # steps between looks at the losses, which make the host wait for the device
SEARCH = 50  # steps that float16's loss scaling may skip while it looks for its scale

# What may change when a run goes on: how long it goes (the schedule is stretched to its new end) and how it ends, where data
# and arithmetic live and what is said, nothing else that the result hangs on (beyond rounding, for where the arithmetic lives).
RESUMABLE = {
    "epochs",
    "exact_epochs",
    "exact_every",
    "data",
    "data_dir",
    "download",
    "workers",
    "log_interval",
    "recovery_interval",
    "save_retry",
    "log",
} | {
    *("device", "kernels", "micro_batch", "recompute", "residency", "boundaries", "weights", "prefetch"),
    *("parallel", "data_parallel", "rank_cuts", "queue", "timeout"),
}


@dataclass(frozen=True)
class Summary:
    """What a run came to; accuracies are shares from 0 to 1, one per exit, of the last validation (empty if none)."""

    folder: Path
    images: tuple[int, int]  # to train on and to validate on
    exits: tuple[str, ...]
    epochs: int
    accuracy: tuple[float, ...]
    best_accuracy: float
    interrupted: bool
    exit_code: int  # of the command line: 0, or which kind of signal stopped it


@dataclass
class Progress:
    """Where a run stands. Saved with every checkpoint."""

    epoch: int = 0  # epochs completed
    position: int = 0  # steps done in the epoch that is under way
    best_accuracy: float = -1.0
    best_epoch: int = 0
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
    with joined(config) as crew:
        return _Run(config, crew).train()


PREVIEWED = 36  # training images of a preview


def preview(config: TrainConfig, file: str | Path) -> None:
    """Write a contact sheet of training images, augmented as in the first epoch, to ``file``; nothing is trained.

    Raises:
        UserError: a mistake in ``config``, or the file cannot be written.
    """
    start = read_start(config.model.initial_checkpoint) if config.model.initial_checkpoint else None
    data = read(config, {**pretrained_configuration(config.model.name), **(start.preprocessing if start else {})})
    random.seed(config.optimization.seed)
    np.random.seed(config.optimization.seed % 2**32)
    order = training_indices(len(data.training), min(PREVIEWED, len(data.training)), config.optimization.seed, 0)[:1]
    with contextlib.closing(data.training.batches(order, 0)) as batches:
        images, labels = next(batches)
    captions = [data.classes[label] for label in labels.tolist()]
    mixup = _mixup(config, len(data.classes))
    if mixup is not None:
        images, soft = mix_batch(mixup, images, labels)
        pairs = zip(*soft.topk(2), strict=True)
        captions = [
            " + ".join(
                f"{data.classes[i]} {share:.2f}" for share, i in zip(shares.tolist(), places.tolist(), strict=True)
            )
            for shares, places in pairs
        ]
    try:
        contact_sheet(list(images), captions).save(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--preview {file} cannot be written: {error}.") from None


def resume(folder: str | Path, **changes: Any) -> Summary:
    """Go on with the run in ``folder``; on a CPU it ends bit for bit where it would have without the break.

    Args:
        changes: new values for options in `RESUMABLE`.

    Raises:
        UserError: there is no whole checkpoint in ``folder``, another process is at it, what the run relies on has changed,
            or an option cannot be changed.
    """
    last = Path(folder) / "last.pt"
    if not last.exists():
        raise UserError(f"there is no checkpoint at {last}.")
    opened = RunFolder(Path(folder)) if first_process() else None
    try:
        if opened is not None:
            RunFolder.sweep(opened.path.parent)
        saved = _load_last(last)
        kept = {**saved["config"], "download": False}  # a file must not have anything fetched
        config = TrainConfig.of(**{**kept, **changes})
        missing = [name for name in config.to_dict() if name not in kept]
        if missing:
            raise UserError(f"{last} is of another version of fastlocal, without the options {', '.join(missing)}.")
        for name in changes:
            if name not in RESUMABLE and config.get(name) != TrainConfig.of(**kept).get(name):
                raise UserError(f"{flag(name)} cannot change on --resume; start a new run to change it.")
        refuse_unasked(config, changes)
        with joined(config) as crew:
            return _Run(config, crew, opened, saved).train()
    finally:
        if opened is not None:
            opened.close()  # what was refused leaves the folder to others


def _load_last(last: Path) -> dict[str, Any]:
    try:
        return checkpoints.load(last)
    except UserError as error:
        previous = last.with_name("previous.pt")
        if not previous.exists():
            raise
        raise UserError(
            f"{error} The state before it is in {previous}: copy it over last.pt to go on from there."
        ) from None


class DivergedError(UserError):
    """Training has come to where it cannot go on from; nothing of it is saved."""


class _Run:
    def __init__(
        self, config: TrainConfig, crew: Crew, folder: RunFolder | None = None, saved: dict[str, Any] | None = None
    ) -> None:
        check_log(config.reports.log)
        self.config, self.device, self.progress, self.crew = config, build_device(config), Progress(), crew
        forget_peak(self.device)
        start = (
            read_start(config.model.initial_checkpoint) if config.model.initial_checkpoint and saved is None else None
        )
        known = {**pretrained_configuration(config.model.name), **(start.preprocessing if start else {})}
        if config.data.download and not crew.alone:
            crew.done_by_first(lambda: read(config, known, saved))
        self.data = read(config, known, saved)
        self.training, self.validation, self.classes = self.data.training, self.data.validation, self.data.classes
        self.preprocessing = self.data.preprocessing
        self.steps = max(len(self.training) // config.optimization.batch_size, 1)
        every, total = config.learning.exact_every, self.steps * config.optimization.epochs
        if every > total:
            raise UserError(f"--exact-every {every} would do nothing: the run has {total} steps.")
        crew.check_batch(min(config.optimization.batch_size, len(self.training)))

        random.seed(config.optimization.seed)
        np.random.seed(config.optimization.seed % 2**32)
        torch.manual_seed(config.optimization.seed)
        about = (config, len(self.classes), self.preprocessing.image_size)
        self.model = build_model(*about, start=saved is None)
        self.started: str | None = None
        self.stretched: int | None = None  # epochs that were planned before
        if start is not None:
            weights, self.started = fitted(start, self.model, self.classes)
            self.model = build_model(*about, weights=weights)
        if config.memory.budget is not None and saved is None:
            planned = follow_plan(config, self.model, self.device) if crew.first else None
            self.config = config = crew.ranks.broadcast(planned)
        loss = training_loss(config, len(self.classes), self.training.labels)
        about_images = self.preprocessing.normalize
        self.trainer = build_trainer(config, self.model, self.device, about_images, loss, crew.mesh)
        self.mixup = _mixup(config, len(self.classes))
        self.schedules = _schedules(config, self.trainer, self.steps)
        self.fingerprint = self.data.fingerprint()
        self.curves = Curves(f"{config.model.name}, {config.learning.objective}, {config.data.name}")
        self.between_steps = True
        self.lost_rows: list[int] = []  # epochs

        self.folder = folder  # the first process's alone
        if saved is None:
            state = self._state("the weights that the run would start from are of no use")
            self.folder = self._new_folder(state) if crew.first else None
        else:
            before = saved["config"]["epochs"]
            self.stretched = before if before != config.optimization.epochs else None
            self._restore(saved)
        self.path: Path = crew.ranks.broadcast(self.folder.path if self.folder is not None else None)

    def _new_folder(self, state: dict[str, Any]) -> RunFolder:
        """A folder that --resume takes, from the moment that it is seen."""
        config = self.config
        folder = RunFolder.create(Path(config.reports.output))
        try:
            folder.write("config.yaml", lambda file: file.write(to_yaml(config).encode()))
            folder.commit(state)
            name = config.reports.experiment or default_name(config.data.name, config.learning.objective)
            folder.publish(name, unique=bool(config.reports.experiment))
        except BaseException:
            folder.discard()
            raise
        return folder

    def _restore(self, saved: dict[str, Any]) -> None:
        path = Path("last.pt") if self.folder is None else self.folder.path / "last.pt"
        changed = differences(saved["data"], self.fingerprint)
        if changed:
            raise UserError(f"{path} was trained on other data: {checkpoints.listed(changed)}.")
        checkpoints.load_trainer(
            self.trainer, saved.pop("trainer"), path
        )  # nobody holds on to it while training goes on
        self.progress = Progress(**saved["progress"])
        self._check_progress(path)
        totals = {name: total.clone().to(self.device) for name, total in self.progress.totals.items()}
        self.progress.totals = (
            totals if self.crew.first else {name: torch.zeros_like(total) for name, total in totals.items()}
        )
        try:
            checkpoints.restore_random_state(saved["random"])
        except ValueError as error:
            raise UserError(f"{path} is not a whole checkpoint: {error}.") from None
        self.lost_rows = self.folder.keep_rows(self.progress.epoch) if self.folder is not None else []

    def _check_progress(self, path: Path) -> None:
        """Refuse a position that is none of this run's."""
        progress, exits, modules = self.progress, len(self.trainer.exit_names), len(self.trainer.modules)
        shapes = {"samples": (), "loss": (exits,), "regularizer": (exits,), "correct": (exits,)}
        shapes |= {"gradient_norm": (modules,), "skipped": (modules,)}
        found = {name: tuple(total.shape) for name, total in progress.totals.items()}
        if (
            progress.epoch > self.config.optimization.epochs
            or progress.position > self.steps
            or progress.best_epoch > progress.epoch
            or found != (shapes if progress.position else {})
            or len(progress.accuracy) != (exits if progress.epoch else 0)
        ):
            raise UserError(
                f"{path} stands at a place that this run of {self.config.optimization.epochs} epochs never comes to."
            )

    def _commit(self) -> None:
        """Save the state, which all processes make together."""
        state = self._state()
        if self.folder is not None:
            self.folder.commit(state)

    def _state(self, useless: str = "") -> dict[str, Any]:
        """What `--resume` goes on from; on the first process, and nothing on the others.

        Args:
            useless: what to say of weights that nothing has trained yet.
        """
        state, totals = self.trainer.state_dict(), self.crew.totals(self.progress.totals)
        if not self.crew.first:
            return {}
        problem = checkpoints.unusable(state)
        if problem is not None and useless:
            raise UserError(f"{useless}: {problem}.")
        if problem is None and totals and not bool(totals["loss"].isfinite().all()):
            problem = "a loss is not finite"
        if problem is not None:
            raise self._diverged(problem)
        return {
            "config": self.config.to_dict(),
            "classes": list(self.classes),
            "preprocessing": self.preprocessing.to_dict(),
            "data": self.fingerprint,
            "trainer": state,
            "progress": {**vars(self.progress), "totals": totals},
            "random": checkpoints.random_state(),
        }

    def _diverged(self, problem: str) -> DivergedError:
        progress = self.progress
        return DivergedError(
            f"training has diverged: {problem} in epoch {progress.epoch + 1}, step {progress.position}. Lower --lr or set"
            f" --clip-grad and start again; {self.path} holds the last good state and, in previous.pt, the one before."
        )

    def train(self) -> Summary:
        config, progress = self.config, self.progress
        report: AnyReport = Silence()
        if self.crew.first:
            report = Report(config, self.path, self.steps, self.trainer.exit_names, progress.epoch)
        resume = f"fastlocal train --resume {shlex.quote(str(self.path))}"
        with StopRequest() as stop, report:
            if self.folder is not None:
                self.folder.retry_for(config.reports.save_retry, report.say, stop)
            for line in self._header():
                report.say(line)
            try:
                if self.lost_rows:
                    report.say(f"metrics.jsonl has lost its rows of epochs {self.lost_rows}")
                if progress.best_epoch == progress.epoch > 0 and progress.position == 0:
                    state = self._state()  # the process that came this far may have ended before it had
                    if self.folder is not None:
                        self._write_best(self.folder, state)
                while progress.epoch < config.optimization.epochs:
                    measured = self._validate(report, stop) if self._train_epoch(report, stop) else None
                    if measured is None:
                        self._draw_curves()
                        self._commit()
                        report.say(f"stopped; go on with: {resume}")
                        if self.crew.failure is not None:
                            raise self.crew.failure
                        break
                    self._finish_epoch(measured, report)
                else:
                    report.say(f"done: {self.path}")
                self.trainer.close()
            except Exception as error:
                # Of several processes, those that are left cannot tell what the others have.
                if self.crew.alone and self.between_steps and not isinstance(error, SaveError | DivergedError):
                    self._commit()
                    if isinstance(error, UserError):
                        error.args = (f"{error} The state is saved; go on with: {resume}",)
                raise
            finally:
                if self.folder is not None:
                    self.folder.close()
        return Summary(
            folder=self.path,
            images=(len(self.training), len(self.validation)),
            exits=tuple(self.trainer.exit_names),
            epochs=progress.epoch,
            accuracy=tuple(progress.accuracy),
            best_accuracy=progress.best_accuracy,
            interrupted=progress.epoch < config.optimization.epochs,
            exit_code=stop.exit_code if progress.epoch < config.optimization.epochs else 0,
        )

    def _train_epoch(self, report: AnyReport, stop: StopRequest) -> bool:
        """Train the rest of the epoch; False if stopped before its end."""
        config, progress = self.config, self.progress
        order = training_indices(
            len(self.training), config.optimization.batch_size, config.optimization.seed, progress.epoch
        )
        seconds, begun = progress.seconds, time.perf_counter()
        left = order[progress.position :]
        reading = self.training.batches(left, progress.epoch, self.crew.share) if self.crew.reads else _nothing()
        with contextlib.closing(reading) as batches:
            for images, labels in self.crew.until(stop, batches, len(left)):
                self._step(images, labels)
                progress.seconds = seconds + time.perf_counter() - begun
                done = progress.position * config.optimization.batch_size
                report.step(progress.epoch + 1, progress.position, self.last_loss, done / progress.seconds)
                if progress.position % CHECK_EVERY == 0:
                    self._check_losses()
                if config.reports.recovery_interval and progress.position % config.reports.recovery_interval == 0:
                    self._commit()
        if progress.position < self.steps:
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        progress.seconds = seconds + time.perf_counter() - begun
        return True

    def _step(self, images: Tensor | None, labels: Tensor | None) -> None:
        """Train on a batch, or, where there is None, on what another process sends."""
        progress, targets = self.progress, labels
        self.between_steps = False
        if images is not None and labels is not None:
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            targets = labels
            if self.mixup is not None:
                off = self.config.augmentation.mixup_off_epoch
                self.mixup.mixup_enabled = not off or progress.epoch < off
                images, targets = mix_batch(self.mixup, images, labels)
        step = progress.epoch * self.steps + progress.position
        metrics = self.trainer.step(images, targets, exact=self.config.is_exact(progress.epoch, step))
        progress.position += 1
        progress.lr = max(group["lr"] for group in self.trainer.optimizers[-1].param_groups)
        for schedule in self.schedules:
            schedule.step_update(progress.epoch * self.steps + progress.position)
        progress.add(
            samples=torch.tensor(metrics.samples, device="cpu"),
            loss=metrics.loss * metrics.samples,
            regularizer=metrics.regularizer * metrics.samples,
            correct=metrics.correct,
            gradient_norm=metrics.gradient_norm.masked_fill(metrics.skipped, 0.0),
            skipped=metrics.skipped,
        )
        self.last_loss, self.between_steps = metrics.loss, True

    def _check_losses(self) -> None:
        """Raise unless every loss of the epoch so far is finite; waits for the device."""
        for name, loss in zip(self.trainer.exit_names, self.progress.totals["loss"].tolist(), strict=True):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss of {name} is not finite")

    def _skipped(self, skipped: list[int]) -> Iterator[str]:
        """A sentence for each module that skipped steps of the epoch.

        Raises:
            DivergedError: one has skipped all, and not because float16 still looks for its scale.
        """
        for module, count in enumerate(skipped, start=1):
            if count:
                sentence = f"module {module} skipped {count} of {self.steps} steps: its gradients are not finite"
                searching = self.trainer.scaler.is_enabled() and self.trainer.steps <= SEARCH
                if count == self.steps and not (
                    searching and self.progress.epoch + 1 < self.config.optimization.epochs
                ):
                    raise DivergedError(
                        f"{sentence}; lower --lr, set --clip-grad, or with --amp try --amp-dtype bfloat16. What was"
                        f" trained before is in {self.path}."
                    )
                yield sentence

    def _validate(self, report: AnyReport, stop: StopRequest) -> list[Measured] | None:
        """Measure every exit, and the moving average if there is one; None if stopped before the end."""
        measured, total = [], -(-len(self.validation) // self.config.optimization.batch_size)
        for ema in (False, True) if self.config.optimization.model_ema else (False,):
            result = validate(
                *(self.trainer, self.validation, self.config.optimization.batch_size, self.device),
                ema=ema,
                until=lambda batches: report.validating(self.crew.until(stop, batches, total), total),
            )
            if result is None:
                return None
            measured.append(result)
        return measured

    def _finish_epoch(self, measured: list[Measured], report: AnyReport) -> None:
        progress = self.progress
        totals = {name: total.cpu() for name, total in self.crew.totals(progress.totals).items()}
        samples = totals["samples"].item()
        self._check_losses()
        for sentence in self._skipped(totals["skipped"].int().tolist()):
            report.say(sentence)
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
            "device": device_name(self.device),
            "images_per_second": samples / progress.seconds,
            "seconds": progress.seconds,
            "peak_memory_bytes": peak_memory(self.device),
        }
        if self.config.optimization.model_ema:
            row["ema_validation_loss"], row["ema_validation_accuracy"] = measured[1].loss[-1], measured[1].accuracy[-1]
        exported = measured[-1].accuracy[-1]
        if self.folder is not None:
            self.folder.add_row(row)
        if self.curves.due or progress.epoch + 1 == self.config.optimization.epochs:
            self._draw_curves()
        report.epoch(row)
        progress.accuracy = measured[0].accuracy
        progress.next_epoch()
        if exported > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = exported, progress.epoch
        state = self._state()
        if self.folder is not None:
            self.folder.commit(state)
            if progress.best_epoch == progress.epoch:
                self._write_best(self.folder, state)

    def _draw_curves(self) -> None:
        if self.folder is None or not self.curves.possible:
            return
        rows = [row for row in self.folder.rows() if row.keys() >= DRAWN]
        if rows:
            self.folder.write("curves.png", lambda file: self.curves.draw(rows, file))

    def _write_best(self, folder: RunFolder, saved: dict[str, Any]) -> None:
        folder.write("best.pt", lambda file: checkpoints.write(saved, file))
        state = self.trainer.ema_state_dict() or self.model.state_dict()
        metadata = {
            "format": "pt",
            "model": self.config.model.name,
            "model_kwargs": json.dumps(
                {**self.config.to_dict()["model_kwargs"], **input_arguments(self.config, self.preprocessing.image_size)}
            ),
            "classes": json.dumps(list(self.classes)),
            "normalize": json.dumps(self.preprocessing.normalize),
        }
        content = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in state.items()}, metadata)
        folder.write("model.safetensors", lambda file: file.write(content))
        about = local_dir_configuration(self.config, self.preprocessing, self.classes)
        folder.write("config.json", lambda file: file.write(about))

    def _header(self) -> Iterator[str]:
        config, parameters = self.config, sum(p.numel() for p in self.model.parameters())
        size = pixels(self.preprocessing.image_size)
        yield f"data     {config.data.name}: {len(self.training)} + {len(self.validation)} images, {size} pixels"
        for note in self.data.notes:
            yield f"         {note}"
        if config.data.name == "synthetic":
            yield "         random images: only the throughput and the memory mean anything"
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        share = f", {trained / 1e6:.3g} M of them trained" if trained < parameters else ""
        yield f"model    {config.model.name}, {parameters / 1e6:.2f} M parameters{share}"
        if self.started is not None:
            yield f"start    {self.started}"
        decoder = (
            f" with decoder {config.learning.decoder}" if config.learning.objective in ("feature", "image") else ""
        )
        yield f"learning {config.learning.objective}{decoder}, {len(self.trainer.modules)} modules"
        if config.exact_share:
            yield f"         with exact gradients in {config.exact_share:.0%} of the steps"
        elif config.devices.parallel == "modules":
            yield "         without the exact finish of one process, for which nothing is sent back"
        if self.stretched is not None:
            optimization = config.optimization
            yield f"schedule {optimization.sched}, now to the end of epoch {optimization.epochs}, before {self.stretched}"
        yield f"device   {self.device}"
        if config.memory.amp and amp_dtype(config, self.device) is None:
            yield f"         {NO_BFLOAT16}"
        if not self.crew.alone:
            yield f"devices  {self.crew.described(self.trainer.rank_spans)}"
        without = "" if self.curves.possible else " (pip install matplotlib for its curves.png)"
        yield f"run      {self.path}{without}"


def _nothing() -> Generator[tuple[None, None], None, None]:
    """The batches of a process that is sent features."""
    while True:
        yield None, None


def _mixup(config: TrainConfig, classes: int) -> Mixup | None:
    options = config.augmentation
    if not options.mixes:
        return None
    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=cast(Any, options.cutmix_minmax),  # two numbers, or None
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=config.optimization.smoothing,
        num_classes=classes,
    )


def _schedules(config: TrainConfig, trainer: fastlocal.LocalTrainer, steps: int) -> list[Any]:
    """One learning-rate schedule per module, stepped after each training step; none for ``--sched none``."""
    if config.optimization.sched == "none":
        return []
    return [
        create_scheduler_v2(
            optimizer,
            sched=config.optimization.sched,
            num_epochs=config.optimization.epochs,
            warmup_epochs=cast(Any, config.optimization.warmup_epochs),  # timm takes fractions too
            warmup_lr=config.optimization.warmup_lr,
            min_lr=config.optimization.min_lr,
            decay_epochs=config.optimization.decay_epochs,
            decay_rate=config.optimization.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )[0]
        for optimizer in trainer.optimizers
    ]
