"""The public face: a timm model, trained in place, one module at a time.

What a step does is in `fastlocal.steps`; what it has on the device meanwhile, in `fastlocal.residency` and
`fastlocal.boundary`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastlocal import memory
from fastlocal.backbones import Backbone, backbone
from fastlocal.boundary import Home
from fastlocal.bus import Bus
from fastlocal.checks import check_autocast, check_batch_norm, check_choice, check_fit, check_images, check_labels
from fastlocal.decoders import Kind
from fastlocal.distributed import Kind as MessageKind
from fastlocal.distributed import Message, Pipeline, Ranks, Reducer
from fastlocal.distributed.team import assigned, described, described_training, gather, refuse
from fastlocal.engine import ClipMode, Engine, Loss, StepOptions, is_out_of_memory, random_stream
from fastlocal.heads import AuxiliaryHead
from fastlocal.kernels import accelerate, dispatch, use_kernels
from fastlocal.kernels.dispatch import CHOICES, Choice
from fastlocal.metrics import Recorder, StepMetrics
from fastlocal.module import LocalModule, MakeDecoder, MakeHead, ModuleOptions, Recompute, build_modules
from fastlocal.objectives import OBJECTIVES, Objective, loss_weights
from fastlocal.optimizers import Make, adamw, make_optimizers
from fastlocal.partition import partition
from fastlocal.residency import Keep, Residency, ResidencyOptions, Weights
from fastlocal.steps import ExactStep, LocalStep

STATE_VERSION = 1
_Result = TypeVar("_Result")


class LocalTrainer:
    """Trains a timm vision transformer in place, one module at a time.

    Args:
        model: a transformer of timm, torchvision or Hugging Face that fastlocal knows, or a `fastlocal.Backbone` of any
            other. It stays the model that it is.
        modules: K, ``"stages"`` or cut points; see `fastlocal.partition.partition`.
        objective: ``"feature"``, ``"image"``, ``"cross-entropy"``, ``"transport"``, ``"end-to-end"`` or an `Objective`; see
            `fastlocal.objectives`. In the study, K=4, ``"feature"`` came to 63.54 ± 0.86 % where ``"image"`` came to
            62.90 ± 0.40, and with the last two fifths of its steps ``exact``, as `fastlocal train` has them unless told
            otherwise, to 65.77 ± 0.82 where ``"end-to-end"`` came to 64.69 ± 0.18
            (`profiling/results/accuracy/swin_cifar.md`); on digits ``"cross-entropy"`` fell behind by 11 points
            (`digits.md` there), on CIFAR-10 by 8.5, ``"transport"`` by 7 (one seed). To fine-tune, take ``"end-to-end"``:
            it came to 75.53 ± 0.10, ``"feature"`` to 71.41 ± 1.20; or freeze the first modules, with which ``"feature"`` and a
            finish came to 76.01 ± 0.06 (`finetune.md` there). The other decoders have no rows yet.
        decoder: ``"linear"``, ``"mlp"``, ``"conv"`` or ``"transformer"``; see `fastlocal.decoders`; or what makes one from
            (source, target, reconstruction, normalize_target).
        head: makes the auxiliary head of a local module from the geometry of what it reads and the number of classes.
        loss: (logits fp32, labels) → mean over the part, for every head instead of the cross-entropy. Labels are then what it
            takes, one entry per image, and `StepMetrics.correct` stays 0, unless it has a true attribute ``of_classes``.
        optimizer: called once per module with its parameter groups (weights, and those that timm keeps free of weight
            decay: biases, norms and the model's ``no_weight_decay()``), which have names and depths; see
            `fastlocal.optimizers.make_optimizers`. Default: AdamW, lr 5e-4, weight decay 0.05.
        micro_batch: samples in a part. Gradients are those of the whole batch, so a model with BatchNorm, whose output
            depends on the part, is refused. None: the whole batch at once.
        recompute: ``"block"`` recomputes the inside of each block in the backward, ``"none"`` keeps it.
        residency: ``"all"``, ``"optimizer"`` or ``"module"``: what of the idle modules stays on the device; see
            `fastlocal.residency`.
        boundaries: ``"device"`` or ``"host"``: where what stands between two modules lives, images and gradients included;
            on the host, a part of it at a time is on the device. See `fastlocal.boundary`.
        weights: ``"full"``, or ``"low"``: with residency="module", weights that autocast would cast arrive cast; same
            numbers, half the bytes.
        prefetch: with residency="module", fetch the next module's weights behind the compute of the one before, which
            holds both on the device.
        amp_dtype: autocast dtype, torch.bfloat16 or torch.float16 (with loss scaling); None computes in fp32. Activations
            between modules are stored in it.
        device: where to train. Default: where the model is.
        clip_grad: largest gradient norm of a module.
        clip_mode: ``"norm"``; ``"value"``: the largest gradient of an element; ``"agc"``: adaptive clipping, the largest norm
            of a unit's gradient as a share of that of its weights, of all but classifiers.
        label_smoothing: of the cross-entropy.
        ema_decay: keep an exponential moving average of the model, with timm's ModelEmaV3 and its warm-up, in ``ema``.
        normalize: (mean, std) per channel, for uint8 images, which are scaled to [0, 1] and normalized part by part.
            Default: the model's ``pretrained_cfg``.
        kernels: ``"auto"``, ``"triton"`` or ``"reference"``; see `fastlocal.kernels`.
        first_target: what module 1 reconstructs for ``"feature"``: its input ``"image"`` or the ``"patch"`` embedding.
        reconstruction: ``"mse"``, ``"l1"`` or ``"smooth_l1"``.
        normalize_target: normalize each reconstructed token, as masked autoencoders do.
        regularizer_weight: of the reconstruction or transport term, one number or one per local module. Default: the
            objective's.
        classification_weight: of the auxiliary cross-entropy, likewise.
        lookahead: blocks of the next module that each auxiliary head looks through and trains as well.
        compile: compile each module with torch.compile; a text is its mode. ``"reduce-overhead"`` and ``"max-autotune"``
            replay CUDA graphs, which saves launches where parts are small, and holds memory of their own.
        mesh: the processes that train together: a `torch.distributed.device_mesh.DeviceMesh` whose dimensions are named
            "data" (each process has a part of the batch) and "modules" (each process has some of the modules), or one of
            the two. Every process makes the trainer and makes the same calls; see `fastlocal.distributed`.
        rank_cuts: first modules of the second, third, … process along "modules". Default: balanced by FLOPs.
        queue: batches that may be on their way from one process along "modules" to the next, on either side.
        timeout: seconds to wait for another process before giving up.

    If the device runs out of memory during a step, the trainer halves its parts, says so in a warning, and goes on with the
    module that failed; gradients do not depend on the size of the parts.

    Raises:
        ValueError: an argument is not one of the above, or the model is not supported.
        RuntimeError: kernels="triton" was asked for and cannot run on the device.
        RankLost: another process of the mesh has ended or does not answer; `step` and what else waits for others raise it too.
    """

    def __init__(
        self,
        model: nn.Module | Backbone,
        *,
        modules: int | str | Sequence[int] = 4,
        objective: str | Objective = "feature",
        decoder: str | MakeDecoder = "linear",
        head: MakeHead = AuxiliaryHead,
        loss: Loss | None = None,
        optimizer: Make | None = None,
        micro_batch: int | None = None,
        recompute: Recompute = "none",
        residency: Keep = "all",
        boundaries: Home = "device",
        weights: Weights = "full",
        prefetch: bool = True,
        amp_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        clip_grad: float | None = None,
        clip_mode: ClipMode = "norm",
        label_smoothing: float = 0.0,
        ema_decay: float | None = None,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        kernels: Choice = "auto",
        first_target: Literal["image", "patch"] = "image",
        reconstruction: Kind = "mse",
        normalize_target: bool = False,
        regularizer_weight: float | Sequence[float] | None = None,
        classification_weight: float | Sequence[float] | None = None,
        lookahead: int = 0,
        compile: bool | str = False,
        mesh: DeviceMesh | None = None,
        rank_cuts: Sequence[int] | None = None,
        queue: int = 2,
        timeout: float = 1800.0,
    ) -> None:
        if isinstance(objective, str):
            check_choice("objective", objective, list(OBJECTIVES))
        check_choice("kernels", kernels, CHOICES)
        check_choice("first_target", first_target, ("image", "patch"))
        stepping = StepOptions(micro_batch, boundaries, amp_dtype, clip_grad, clip_mode, label_smoothing, compile, loss)
        made_of = ModuleOptions(decoder, head, reconstruction, normalize_target, lookahead, recompute)
        staying = ResidencyOptions(residency, weights, prefetch, amp_dtype)
        if clip_mode == "agc" and weights == "low":
            raise ValueError("clip_mode='agc' measures the weights, and weights='low' rounds them; use weights='full'.")
        if stepping.cuda_graphs and residency == "module":
            raise ValueError(
                f"compile={compile!r} replays CUDA graphs, whose parameters cannot move, so residency must be 'all' or"
                " 'optimizer', got 'module'."
            )
        self.backbone = backbone(model)
        self.model = model = self.backbone.model
        if compile and recompute == "block" and self.backbone.batch_norms:
            raise ValueError(
                f"recompute='block' would update the BatchNorm statistics of {type(model).__name__} twice under compile; use"
                " recompute='none' or compile=False."
            )
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        check_autocast(amp_dtype, self.device)

        self.classes = self.backbone.logits[-1]
        if getattr(model, "num_classes", self.classes) < 2 and loss is None:
            raise ValueError(
                f"model has num_classes={model.num_classes}, with which there is nothing to tell apart; build it with at least"
                " 2."
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("model: every parameter is frozen (requires_grad=False), so there is nothing to train.")
        self.spans = partition(self.backbone, modules)
        self.objective = OBJECTIVES[objective](first_target) if isinstance(objective, str) else objective
        self.kernels: Choice = kernels
        self.loss = loss
        self.on_step_end: Callable[[StepMetrics], None] | None = None
        self.steps = 0
        self._gathered: dict[int, Any] = {}  # optimizer states of other processes' modules
        mean, std = _mean_std(normalize or self.backbone.normalization, model, self.backbone.image.channels)
        shares = loss_weights(self.objective, len(self.spans), regularizer_weight, classification_weight)

        self.ranks = Ranks(mesh, timeout)
        self.ranks.check_same(
            described(
                model,
                modules=[span.start for span in self.spans],
                objective=self.objective.name,
                decoder=decoder,
                amp_dtype=amp_dtype,
                clip_grad=clip_grad,
                clip_mode=clip_mode,
                label_smoothing=label_smoothing,
                ema_decay=ema_decay,
                normalize=(mean.flatten().tolist(), std.flatten().tolist()),
                first_target=first_target,
                reconstruction=reconstruction,
                normalize_target=normalize_target,
                loss_weights=shares,
                lookahead=lookahead,
                mesh=(self.ranks.data.size, self.ranks.modules.size),
                rank_cuts=rank_cuts,
                queue=queue,
            )
        )
        self.ranks.share([*model.parameters(), *model.buffers()])
        # The average is copied first: it shares neither fused attention nor host memory with the model.
        self.ema = _average(model, ema_decay, self.device, residency) if ema_decay is not None else None
        with use_kernels(kernels):
            fused = kernels != "reference" and dispatch.implementation(self.device) == "triton"
        self.fused_layers = _accelerate(model, required=kernels == "triton") if fused else 0

        self.modules = build_modules(self.backbone, self.spans, self.classes, self.objective, made_of)
        refuse(self.backbone, self.modules, self.objective, self.ranks)
        self.rank_spans = assigned(self.modules, self.backbone, self.objective, self.ranks, rank_cuts)
        self.own = self.rank_spans[self.ranks.modules.rank]
        own = [self.modules[k] for k in self.own]
        alone = len(own) == len(self.modules)
        here = model.parameters() if alone else (p for module in own for p in module.parameters())
        for tensors in (model.buffers(),) if residency == "module" else (here, model.buffers()):
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
        for module in own:
            module.heads.to(self.device)

        trained, optimizers = make_optimizers(self.backbone, self.modules, optimizer or adamw)
        self.optimizers: list[torch.optim.Optimizer] = [o for o in optimizers if o is not None]
        bus = Bus(self.device)
        self.ranks.check_same(described_training(self.modules, optimizers))
        self.ranks.share([t for module in self.modules for t in module.heads.state_dict().values()])
        self.residency = Residency(self.modules, optimizers, staying, bus, self.own)
        self.pipeline = Pipeline(self.ranks, queue, self.device)
        self.engine = Engine(
            self.modules,
            self.objective,
            trained=trained,
            optimizers=optimizers,
            weights=shares,
            normalization=(mean.to(self.device), std.to(self.device)),
            residency=self.residency,
            bus=bus,
            options=stepping,
            classifiers=_classifiers(model, self.modules),
            own=self.own,
            reducer=Reducer(self.ranks) if self.ranks.data.size > 1 else None,
        )
        if compile:
            for module in self.modules:
                module.compile(mode=compile if isinstance(compile, str) else None)

    # The public face

    @property
    def on_module_end(self) -> Callable[[int, LocalModule], None] | None:
        """Called with each module's index and itself when its gradients are there, before it is updated; None for nobody.

        `on_step_end`, an attribute as well, is called with the metrics of each step.
        """
        return self.engine.on_module_end

    @on_module_end.setter
    def on_module_end(self, callback: Callable[[int, LocalModule], None] | None) -> None:
        self.engine.on_module_end = callback

    @property
    def exit_names(self) -> list[str]:
        """Names of the classifiers, in the order of `StepMetrics.loss` and of `predict`."""
        return [f"module {i + 1}" for i in self._exits]

    def step(self, images: Tensor | None = None, labels: Tensor | None = None, *, exact: bool = False) -> StepMetrics:
        """Train every module once on a batch.

        With a mesh, every process calls it. Along "data" each gives its own part of the batch. Along "modules" the first gives
        the batch, and what the others give is not looked at; a process measures the modules that it has, and the others' places
        in what is returned hold 0.

        Args:
            images: [B, 3, H, W], floating (already normalized) or uint8 (normalized here, part by part).
            labels: [B] class indices, or [B, classes] probabilities.
            exact: train the model with the exact gradients of the last loss in this step, whatever the objective. Optimizer
                states go on. Auxiliary heads learn as ever, from detached outputs; decoders rest. Exact steps at the end of
                training, two fifths of all, are what closes the gap of a local objective.

        Raises:
            ValueError: shapes do not fit the model, a label is outside the classes, or (where looking costs no
                synchronization: on CPU tensors) a pixel is NaN or infinite.
        """
        if exact and self.ranks.modules.size > 1:
            raise ValueError(
                "exact=True needs the gradients of all modules, and a mesh with 'modules' sends nothing back; use a mesh with"
                " 'data' alone."
            )
        exact = exact or self.objective.exact
        batch = (
            self._enter(images, labels, exact)
            if self.ranks.modules.rank == 0
            else self.pipeline.receive(MessageKind.STEP)
        )
        assert batch.labels is not None
        size, labels = len(batch.x), batch.labels.to(self.device, non_blocking=True)
        if not self.model.training:
            self.model.train()
        for module in self.modules:
            module.train()
        record = Recorder(batch.samples, self._exits, len(self.modules), self.device, counts=self._of_classes)
        step: ExactStep | LocalStep | None = None
        try:
            while True:
                try:
                    with use_kernels(self.kernels):
                        if exact:
                            with random_stream(batch.seed, 0, self.device):
                                step = step or ExactStep(self.engine, batch.x, labels, record)
                                step.run()
                        else:
                            step = step or LocalStep(self.engine, batch.images, labels, record, batch.x, batch.seed)
                            step.run()
                    break
                except Exception as error:
                    if not is_out_of_memory(error) or (self.micro_batch or size) == 1 or self.backbone.batch_norms:
                        raise
                self._halve_parts(size)
        finally:
            self.engine.finish()
        if isinstance(step, LocalStep) and self.own.stop < len(self.modules):
            kept = step.images.whole() if step.images is not None else None
            self.pipeline.send(Message(MessageKind.STEP, step.x.whole(), kept, labels, batch.seed, batch.samples))
        self.ranks.sum_over_data(record.loss, record.correct, record.regularizer)
        self.steps += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.steps)
        metrics = record.metrics()
        if self.on_step_end is not None:
            self.on_step_end(metrics)
        return metrics

    def _enter(self, images: Tensor | None, labels: Tensor | None, exact: bool) -> Message:
        """The batch that the user gave to this process; all processes along "data" go on with theirs, or none does."""
        problem: ValueError | None = None
        try:
            if images is None or labels is None:
                raise ValueError("images and labels must be given to the first process along 'modules'.")
            check_images(images, self.backbone.image)
            if self._of_classes:
                check_labels(labels, len(images), self.classes)
            elif len(labels) != len(images):
                raise ValueError(f"labels must be {len(images)}, one for each image, got {len(labels)}.")
            check_batch_norm(self.backbone, self.micro_batch, len(images))
        except ValueError as error:
            problem = error
        counts = self.ranks.counts(-1 if problem or images is None else len(images))
        if problem is not None:
            raise problem
        if min(counts) < 0:
            raise ValueError(f"process {counts.index(min(counts))} along 'data' was given a batch that it refuses.")
        assert images is not None
        seed = None
        if not memory.is_dry_run() and (self.ranks.data.size > 1 or (len(self.modules) > 1 and not exact)):
            seed = int(torch.randint(2**62, (), device="cpu")) + 1_000_003 * self.ranks.data.rank
        return Message(MessageKind.STEP, images, images, labels, seed, sum(counts))

    @torch.no_grad()
    def predict(self, images: Tensor | None = None, *, ema: bool = False) -> Tensor:
        """Logits [exits, B, classes] (fp32) of every classifier in eval mode; exits before the last come for free.

        With a mesh, every process calls it and has the logits of its own modules' classifiers (`own_exits`), for its own part
        along "data".

        Args:
            images: as for `step`.
            ema: use the moving average of the model, which has only the last classifier: [1, B, classes].
        """
        if ema and self.ema is None:
            raise ValueError("ema=True needs a trainer with ema_decay set.")
        if self.ranks.modules.rank == 0:
            if images is None:
                raise ValueError("images must be given to the first process along 'modules'.")
            check_images(images, self.backbone.image)
        else:
            images = self.pipeline.receive(MessageKind.PREDICT).x
        self.model.eval()
        for module in self.modules:
            module.eval()

        def run() -> Tensor:
            with self._averaged() if ema else contextlib.nullcontext():
                return self._predict(images, self._exits[-1:] if ema else self._exits)

        return self._fitting(len(images), run)

    def _fitting(self, batch: int, run: Callable[[], _Result]) -> _Result:
        """``run`` with parts as large as there is memory for."""
        while True:
            try:
                with use_kernels(self.kernels):
                    return run()
            except Exception as error:
                if not is_out_of_memory(error) or (self.micro_batch or batch) == 1:
                    raise
            self._halve_parts(batch)

    def _predict(self, images: Tensor, exits: range) -> Tensor:
        engine, batch = self.engine, len(images)
        parts, x, logits = engine.parts(batch), engine.images(images), []
        for k in self.own:
            module = self.modules[k]
            inputs, output, classified = x.parts(parts), engine.boundary(batch), []
            with self.residency.on_device(k, engine.following(k)):
                for part in parts:
                    h, logit = engine.infer(k, next(inputs), classify=k in exits)
                    if module.head is None:
                        output.write(part, h)
                    if logit is not None:
                        classified.append(logit)
            x.release()
            x = output
            if k in exits:
                logits.append(torch.cat(classified))
        if self.own.stop < len(self.modules):
            self.pipeline.send(Message(MessageKind.PREDICT, x.whole()))
        return torch.stack(logits) if logits else torch.empty(0, batch, *self.backbone.logits, device=self.device)

    def _predict_early(self, images: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
        engine, places = self.engine, torch.arange(len(images), device=self.device)
        logits = torch.empty(len(images), self.classes, device=self.device)
        exits = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        x = engine.images(images)
        for k, module in enumerate(self.modules):
            parts = engine.parts(len(places))
            inputs, output = x.parts(parts), engine.boundary(len(places))
            left: list[Tensor] = []
            with self.residency.on_device(k, engine.following(k)):
                for part in parts:
                    h, logit = engine.infer(k, next(inputs), classify=k in self._exits)
                    going = torch.ones(len(h), dtype=torch.bool, device=self.device)
                    if logit is not None:
                        going = logit.softmax(-1).amax(-1) < confidence
                        logits[places[part]], exits[places[part]] = logit, self._exits.index(k)
                    going &= module.head is None
                    if going.any():
                        start = sum(len(rows) for rows in left)
                        left.append(places[part][going])
                        output.write(slice(start, start + len(left[-1])), h[going])
            x.release()
            if not left:
                break
            x, places = output, torch.cat(left)
        return logits, exits

    @torch.no_grad()
    def predict_early(self, images: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
        """Each image goes only as deep as it takes.

        Args:
            images: as for `step`.
            confidence: an image stops at the first classifier that gives a class at least this probability.

        Returns:
            Logits [B, classes] (fp32) and the place of the classifier that gave them [B], in the order of `exit_names`.

        Raises:
            ValueError: the modules are spread over processes.
        """
        if len(self.own) != len(self.modules):
            raise ValueError("predict_early needs all modules in one process; load the run without a pipeline.")
        if self.ranks.modules.size > 1:
            raise ValueError(
                "predict_early needs all modules in one process, and a mesh with 'modules' shares them out."
            )
        check_images(images, self.backbone.image)
        self.model.eval()
        for module in self.modules:
            module.eval()
        return self._fitting(len(images), lambda: self._predict_early(images, confidence))

    def ema_state_dict(self) -> dict[str, Tensor] | None:
        """The state dict of the model's moving average, or None without one."""
        return None if self.ema is None else self.ema.module.state_dict()

    def gather(self) -> None:
        """Bring what the processes along "modules" have trained to the first one, whose model is whole then.

        Every process calls it. The others' models hold what they trained themselves and what all started from.
        """
        self._gathered = gather(self)

    def close(self) -> None:
        """No more steps: every process of a mesh calls it, so that nothing is left under way between them."""
        self.pipeline.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training continues from, except random number generators: plain containers and tensors only.

        With a mesh, every process calls it; the first one has it all, and the others an empty dict.
        """
        self.gather()
        if not self.ranks.first:
            return {}
        return {
            "version": STATE_VERSION,
            "objective": self.objective.name,
            "cuts": [span.start for span in self.spans],
            "steps": self.steps,
            "model": self.model.state_dict(),
            "heads": {
                f"{k}.{name}": value
                for k, module in enumerate(self.modules)
                for name, value in module.heads.state_dict().items()
            },
            "optimizers": [
                optimizer.state_dict() if k in self.own else self._gathered[k]
                for k, optimizer in enumerate(self.engine.optimizers)
                if optimizer is not None
            ],
            "scaler": self.scaler.state_dict(),
            "ema": self.ema_state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; residency, micro-batch, recomputation and device may differ from the saved run's.

        Everything is copied, a module at a time, so a state that lies in a mapped file takes no memory of its own.

        Raises:
            ValueError: the state is of another model, partition or objective. Nothing has changed then.
        """
        ours = {"version": STATE_VERSION, "objective": self.objective.name, "cuts": [s.start for s in self.spans]}
        for key, value in ours.items():
            if state.get(key) != value:
                raise ValueError(f"state: its {key} is {state.get(key)!r}, and this trainer's is {value!r}.")
        check_fit("model", state["model"], self.model.state_dict())
        heads = [module.heads for module in self.modules]
        ours_heads = {f"{k}.{name}": v for k, head in enumerate(heads) for name, v in head.state_dict().items()}
        check_fit("heads", state["heads"], ours_heads)
        if len(state["optimizers"]) != len(self.optimizers) or (state["ema"] is None) != (self.ema is None):
            raise ValueError("state: it was saved with other optimizers or another ema_decay than this trainer's.")
        self.model.load_state_dict(state["model"])
        for k, head in enumerate(heads):
            head.load_state_dict(
                {name.split(".", 1)[1]: v for name, v in state["heads"].items() if name.startswith(f"{k}.")}
            )
        saved = iter(state["optimizers"])
        for k, optimizer in enumerate(self.engine.optimizers):
            if optimizer is not None:
                parked = self.residency.options.keep != "all"
                entry = _copied(next(saved), parked) if k in self.own else {**next(saved), "state": {}}
                optimizer.load_state_dict(entry)
                self.residency.park_states(k)  # before the next module's states come to the device
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.steps = state["steps"]

    # Behind it

    def _halve_parts(self, batch: int) -> None:
        """After an out-of-memory error: leave nothing half-done behind, and go on with parts of half the size."""
        self.residency.park()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        before = min(self.micro_batch or batch, batch)
        self.micro_batch = -(-before // 2)
        warnings.warn(
            f"out of memory with parts of {before} samples; going on with parts of {self.micro_batch}.", stacklevel=3
        )

    @property
    def micro_batch(self) -> int | None:
        """Samples in a part, or None for the whole batch; may be changed between steps."""
        return self.engine.micro_batch

    @micro_batch.setter
    def micro_batch(self, value: int | None) -> None:
        self.engine.micro_batch = value

    @property
    def scaler(self) -> torch.amp.GradScaler:
        """The loss scaling of float16, shared by all modules."""
        return self.engine.scaler

    @property
    def _of_classes(self) -> bool:
        """Whether labels are classes, or probabilities of them."""
        return self.loss is None or bool(getattr(self.loss, "of_classes", False))

    @property
    def own_exits(self) -> slice:
        """The places of this process's classifiers among all (`exit_names`)."""
        places = [i for i, k in enumerate(self._exits) if k in self.own]
        return slice(places[0], places[-1] + 1) if places else slice(0, 0)

    @property
    def _exits(self) -> range:
        return range(len(self.modules) - 1 if self.objective.exact else self.engine.first, len(self.modules))

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model with the values of its moving average."""
        assert self.ema is not None
        average = dict(self.ema.module.named_parameters())
        pairs = [(parameter, average[name]) for name, parameter in self.model.named_parameters()]
        self.residency.exchange(pairs)
        try:
            yield
        finally:
            self.residency.exchange(pairs)


def _copied(state: dict[str, Any], parked: bool) -> dict[str, Any]:
    """An optimizer's state whose tensors are copies; `Optimizer.load_state_dict` keeps those that it is given.

    Args:
        parked: all but single numbers will be copied to the host next, so they need not be here.
    """

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and not (parked and value.numel() > 1) else value

    moments = {i: {key: copied(value) for key, value in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": moments}


def _mean_std(
    normalize: tuple[Sequence[float], Sequence[float]] | None, model: nn.Module, channels: int
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [channels, 1, 1] of images with values from 0 to 255."""
    if normalize is None:
        configuration = getattr(model, "pretrained_cfg", None) or {}
        normalize = (configuration.get("mean", (0.5,) * channels), configuration.get("std", (0.5,) * channels))
    mean, std = (tuple(float(v) for v in values) for values in normalize)
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ValueError(
            f"normalize must be (mean, std) with {channels} numbers each and every std positive, got {normalize}."
        )
    return (
        torch.tensor(mean, device="cpu").view(-1, 1, 1) * 255,
        torch.tensor(std, device="cpu").view(-1, 1, 1) * 255,
    )


def _classifiers(model: nn.Module, modules: Sequence[LocalModule]) -> list[nn.Parameter]:
    """What timm's adaptive clipping leaves alone, the last two parameters of the model, and the auxiliary heads."""
    heads = [module.auxiliary for module in modules if module.auxiliary is not None]
    return [*list(model.parameters())[-2:], *(p for head in heads for p in head.parameters())]


def _average(model: nn.Module, decay: float, device: torch.device, residency: Keep) -> ModelEmaV3:
    """The moving average of ``model``, on the host if the model's parameters live there."""
    on_host = residency == "module"
    device_of_average = torch.device("cpu") if on_host else None
    # Without warm-up a short run would average in little but the weights that it started from.
    ema = ModelEmaV3(model, decay=decay, use_warmup=True, device=device_of_average, foreach=not on_host)
    if on_host:
        for value in ema.module.state_dict().values():
            memory.on_host(value)
    else:
        ema.module.to(device)
    return ema


def _accelerate(model: nn.Module, required: bool) -> int:
    """Swap in fused attention; a model it cannot serve keeps timm's, unless it is ``required``."""
    try:
        return accelerate(model)
    except ValueError:
        if required:
            raise
        return 0
