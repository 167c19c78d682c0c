"""The training step: one module at a time, one part of the batch at a time.

A local step trains module 1 on the batch, hands its detached output to module 2, and so on; a part's graph is gone before the
next part runs, a module's gradients and state before the next module runs. The exact step (``objective="end-to-end"``) runs all
modules forward without a graph, keeping what stands between them, and then goes back from the last module to the first,
running each again with a graph and feeding it the gradient of its output.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fastlocal import memory
from fastlocal.backbone import backbone
from fastlocal.checks import check_autocast, check_choice, check_fit, check_images, check_labels
from fastlocal.decoders import DECODERS, Kind
from fastlocal.heads import AuxiliaryHead
from fastlocal.kernels import accelerate, dispatch, use_kernels
from fastlocal.kernels.dispatch import CHOICES, Choice
from fastlocal.metrics import Recorder, StepMetrics
from fastlocal.module import LocalModule, Recompute
from fastlocal.objectives import OBJECTIVES, Features, Objective
from fastlocal.optimizers import Make, adamw, make_optimizers
from fastlocal.partition import partition
from fastlocal.residency import Keep, Residency

STATE_VERSION = 1
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class LocalTrainer:
    """Trains a timm vision transformer in place, one module at a time.

    Args:
        model: a timm model (swin_*, swinv2_*, vit_*, deit*, beit*, eva02_*). It stays an ordinary timm model.
        modules: K, ``"stages"`` or cut points; see `fastlocal.partition.partition`.
        objective: ``"feature"``, ``"image"``, ``"cross-entropy"``, ``"transport"`` or ``"end-to-end"``; see
            `fastlocal.objectives`.
        decoder: ``"linear"``, ``"mlp"``, ``"conv"`` or ``"transformer"``; see `fastlocal.decoders`.
        optimizer: called once per module with its parameter groups (weights, and those that timm keeps free of weight
            decay: biases, norms and the model's ``no_weight_decay()``). Default: AdamW, lr 5e-4, weight decay 0.05.
        micro_batch: samples in a part. Gradients are those of the whole batch. None: the whole batch at once.
        recompute: ``"block"`` recomputes the inside of each block in the backward, ``"none"`` keeps it.
        residency: ``"all"``, ``"optimizer"`` or ``"module"``: what of the idle modules stays on the device; see
            `fastlocal.residency`.
        amp_dtype: autocast dtype, torch.bfloat16 or torch.float16 (with loss scaling); None computes in fp32. Activations
            between modules are stored in it.
        device: where to train. Default: where the model is.
        clip_grad: largest gradient norm of a module.
        label_smoothing: of the cross-entropy.
        ema_decay: keep an exponential moving average of the model, with timm's ModelEmaV3, in ``ema``.
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

    If the device runs out of memory during a step, the trainer halves its parts, says so in a warning, and goes on; gradients
    do not depend on the size of the parts.

    Raises:
        ValueError: an argument is not one of the above, or the model is not supported.
        RuntimeError: kernels="triton" was asked for and cannot run on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        modules: int | str | Sequence[int] = 4,
        objective: str = "feature",
        decoder: str = "linear",
        optimizer: Make | None = None,
        micro_batch: int | None = None,
        recompute: Recompute = "none",
        residency: Keep = "all",
        amp_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        clip_grad: float | None = None,
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
    ) -> None:
        check_choice("objective", objective, list(OBJECTIVES))
        check_choice("decoder", decoder, list(DECODERS))
        check_choice("recompute", recompute, get_args(Recompute))
        check_choice("residency", residency, get_args(Keep))
        check_choice("kernels", kernels, CHOICES)
        check_choice("first_target", first_target, ("image", "patch"))
        if isinstance(compile, str):
            check_choice("compile", compile, COMPILE_MODES)
        self._graphs = compile in ("reduce-overhead", "max-autotune")
        if self._graphs and residency == "module":
            raise ValueError(
                f"compile={compile!r} replays CUDA graphs, whose parameters cannot move, so residency must be 'all' or"
                " 'optimizer', got 'module'."
            )
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, or None for the whole batch; got {micro_batch}.")
        if lookahead < 0:
            raise ValueError(f"lookahead must be at least 0, got {lookahead}.")
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        check_autocast(amp_dtype, self.device)

        self.model = model
        self.backbone = backbone(model)
        self.classes = cast(int, model.num_classes)
        if self.classes < 1:
            raise ValueError("model has no classifier (num_classes=0); build it with the number of classes.")
        self.spans = partition(self.backbone, modules)
        self.objective: Objective = OBJECTIVES[objective](first_target)
        self.micro_batch = micro_batch
        self.amp_dtype = amp_dtype
        self.clip_grad = clip_grad
        self.label_smoothing = label_smoothing
        self.kernels: Choice = kernels
        self.steps = 0
        mean, std = _mean_std(normalize, model, self.backbone.image.channels)
        self._mean, self._std = mean.to(self.device), std.to(self.device)
        self._regularizer_weights, self._classification_weights = self._weights(
            regularizer_weight, classification_weight
        )

        # The average is copied first: it shares neither fused attention nor host memory with the model.
        self.ema: ModelEmaV3 | None = None
        if ema_decay is not None:
            on_host = residency == "module"
            self.ema = ModelEmaV3(
                model, decay=ema_decay, device=torch.device("cpu") if on_host else None, foreach=not on_host
            )
            if on_host:
                for value in self.ema.module.state_dict().values():
                    memory.on_host(value)
            else:
                self.ema.module.to(self.device)
        with use_kernels(kernels):
            fused = kernels != "reference" and dispatch.implementation(self.device) == "triton"
        self.fused_layers = _accelerate(model, required=kernels == "triton") if fused else 0

        self.modules = tuple(
            self._build(k, decoder, reconstruction, normalize_target, lookahead, recompute)
            for k in range(len(self.spans))
        )
        for tensors in (model.buffers(),) if residency == "module" else (model.parameters(), model.buffers()):
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
        for module in self.modules:
            module.heads.to(self.device)

        self._trained, optimizers = make_optimizers(model, self.modules, optimizer or adamw)
        self.optimizers: list[torch.optim.Optimizer] = [o for o in optimizers if o is not None]
        self._optimizer_of = optimizers
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == torch.float16)
        self.residency = Residency(self.modules, optimizers, residency, self.device)
        if compile:
            for module in self.modules:
                module.compile(mode=compile if isinstance(compile, str) else None)

    # The public face

    @property
    def exit_names(self) -> list[str]:
        """Names of the classifiers, in the order of `StepMetrics.loss` and of `predict`."""
        return [f"module {i + 1}" for i in self._exits]

    def step(self, images: Tensor, labels: Tensor) -> StepMetrics:
        """Train every module once on a batch.

        Args:
            images: [B, 3, H, W], floating (already normalized) or uint8 (normalized here, part by part).
            labels: [B] class indices, or [B, classes] probabilities.

        Raises:
            ValueError: shapes do not fit the model, a label is outside the classes, or (where looking costs no
                synchronization: on CPU tensors) a pixel is NaN or infinite.
        """
        check_images(images, self.backbone.image)
        check_labels(labels, len(images), self.classes)
        if not self.model.training:
            self.model.train()
        for module in self.modules:
            module.train()
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        run = self._exact_step if self.objective.exact else self._local_step
        while True:
            record = Recorder(len(images), self._exits, len(self.modules), self.device)
            try:
                with use_kernels(self.kernels):
                    run(images, labels, record)
                break
            except torch.OutOfMemoryError:
                if (self.micro_batch or len(images)) == 1:
                    raise
            self._halve_parts(len(images))
        if self.scaler.is_enabled() and self.optimizers:
            self.scaler.update()
        self.residency.synchronize()
        self.steps += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.steps)
        return record.metrics()

    @torch.no_grad()
    def predict(self, images: Tensor, *, ema: bool = False) -> Tensor:
        """Logits [exits, B, classes] (fp32) of every classifier in eval mode; exits before the last come for free.

        Args:
            images: as for `step`.
            ema: use the moving average of the model, which has only the last classifier: [1, B, classes].
        """
        if ema and self.ema is None:
            raise ValueError("ema=True needs a trainer with ema_decay set.")
        check_images(images, self.backbone.image)
        x = images.to(self.device, non_blocking=True)
        parts, exits = self._parts(len(x)), self._exits[-1:] if ema else self._exits
        self.model.eval()
        for module in self.modules:
            module.eval()
        logits = []
        with use_kernels(self.kernels), self._averaged() if ema else contextlib.nullcontext():
            for k in range(len(self.modules)):
                with self.residency.on_device(k, self._next(k)):
                    outputs = [self._infer(k, x[part], classify=k in exits) for part in parts]
                x = torch.cat([output for output, _ in outputs])
                if k in exits:
                    logits.append(torch.cat([logit for _, logit in outputs if logit is not None]))
        return torch.stack(logits)

    def ema_state_dict(self) -> dict[str, Tensor] | None:
        """The state dict of the model's moving average, or None without one."""
        return None if self.ema is None else self.ema.module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training continues from, except random number generators: plain containers and tensors only."""
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
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": self.ema_state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; residency, micro-batch, recomputation and device may differ from the saved run's.

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
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.residency.park()
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.steps = state["steps"]

    # The two steps

    def _local_step(self, images: Tensor, labels: Tensor, record: Recorder) -> None:
        x = images
        for k, module in enumerate(self.modules):
            with self.residency.on_device(k, self._next(k)):
                self._prepare_gradients(k)
                output: Tensor | None = None
                for part in self._parts(len(labels)):
                    image = images[part] if module.reads_image else None
                    h = self._train_part(k, x[part], image, labels[part], record)
                    if module.head is None:
                        # Where shapes allow, a part's output takes the place of its input: nobody reads that again.
                        output = self._store(h, part, output, len(labels), over=x if k > 0 else None)
                    del h
                self._update(k, record)
            if output is not None:
                x = output
            if not any(later.reads_image for later in self.modules[k + 1 :]):
                images = x

    def _train_part(self, k: int, x: Tensor, image: Tensor | None, labels: Tensor, record: Recorder) -> Tensor:
        """Forward and backward of a local module on one part; returns the detached output, and the graph is gone."""
        module = self.modules[k]
        if k == 0:
            image = x = self._prepare(x)
        elif image is not None:
            image = self._prepare(image)
        with self._autocast():
            features = module(x)
        total = self.local_loss(k, features, image, labels, record)
        self._backward(total, len(labels) / record.samples)
        return features.output.detach()

    def local_loss(self, k: int, features: Features, image: Tensor | None, labels: Tensor, record: Recorder) -> Tensor:
        """What module ``k`` minimizes on one part, given its ``features``; its measurements go to ``record``."""
        module = self.modules[k]
        with self._autocast():
            logits = module.classify(features.output)
            regularizer = None
            if module.head is None and self._regularizer_weights[k] != 0:
                regularizer = self.objective.regularizer(module.decoder, features, image)
        loss = total = self._criterion(logits, labels)
        if module.head is None:
            total = self._classification_weights[k] * loss
            if regularizer is not None:
                total = total + self._regularizer_weights[k] * regularizer
        record.add(k, loss, logits, labels, regularizer)
        return total

    def _exact_step(self, images: Tensor, labels: Tensor, record: Recorder) -> None:
        parts = self._parts(len(labels))
        last = len(self.modules) - 1
        # Forward without a graph: what enters each module, and the random numbers each part of it is about to draw.
        entering = [images]
        generators: list[list[_GeneratorState]] = []
        for k in range(last):
            generators.append([])
            with self.residency.on_device(k, k + 1):
                output: Tensor | None = None
                for part in parts:
                    generators[k].append(_generator_state(self.device))
                    output = self._store(self._forward_part(k, entering[k][part]), part, output, len(labels))
            assert output is not None
            entering.append(output)
            del output
        # Backward: once a part is through, the gradient of what entered a module takes its place.
        gradient: Tensor | None = None
        for k in range(last, -1, -1):
            with self.residency.on_device(k, k - 1 if k > 0 else None):
                self._prepare_gradients(k)
                for i, part in enumerate(parts):
                    if k == last:
                        grad = self._backpropagate_last(entering[k][part], labels[part], record)
                    else:
                        assert gradient is not None
                        with _replay(generators[k][i], self.device):
                            grad = self._backpropagate_part(k, entering[k][part], gradient[part])
                    if grad is not None and len(parts) == 1:
                        entering[k] = self._own(grad)
                    elif grad is not None:
                        entering[k][part] = grad
                    del grad
                gradient = entering.pop()
                self._update(k, record)

    @torch.no_grad()
    def _forward_part(self, k: int, x: Tensor) -> Tensor:
        with self._autocast():
            return self.modules[k](self._prepare(x) if k == 0 else x).output

    def _backpropagate_last(self, x: Tensor, labels: Tensor, record: Recorder) -> Tensor | None:
        """Loss and backward of the last module on one part; returns the gradient of ``x``, None for images."""
        k = len(self.modules) - 1
        x = self._leaf(k, x)
        with self._autocast():
            logits = self.modules[k].classify(self.modules[k](x).output)
        loss = self._criterion(logits, labels)
        record.add(k, loss, logits, labels, None)
        self._backward(loss, len(labels) / record.samples)
        return x.grad

    def _backpropagate_part(self, k: int, x: Tensor, gradient: Tensor) -> Tensor | None:
        """Run module ``k`` on one part again and backpropagate ``gradient``; returns the gradient of ``x``."""
        x = self._leaf(k, x)
        with self._autocast():
            output = self.modules[k](x).output
        if output.requires_grad:
            output.backward(gradient.to(output.dtype))
        return x.grad

    def _leaf(self, k: int, x: Tensor) -> Tensor:
        return self._prepare(x) if k == 0 else x.detach().requires_grad_()

    def _halve_parts(self, batch: int) -> None:
        """After an out-of-memory error: leave nothing half-done behind, and go on with parts of half the size."""
        for parameters in self._trained:
            for parameter in parameters:
                parameter.grad = None
        self.residency.park()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        before = min(self.micro_batch or batch, batch)
        self.micro_batch = -(-before // 2)
        warnings.warn(
            f"out of memory with parts of {before} samples; going on with parts of {self.micro_batch}. The batch is trained"
            " on again, so the modules that had finished it see it twice.",
            stacklevel=3,
        )

    # What both steps use

    def _parts(self, batch: int) -> list[slice]:
        size = self.micro_batch or batch
        return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]

    def _next(self, k: int) -> int | None:
        return k + 1 if k + 1 < len(self.modules) else None

    @property
    def _exits(self) -> range:
        return range(len(self.modules) - 1 if self.objective.exact else 0, len(self.modules))

    def _prepare(self, images: Tensor) -> Tensor:
        """uint8 → normalized fp32; floating images come normalized already."""
        if images.dtype != torch.uint8:
            return images
        return images.float().sub_(self._mean).div_(self._std)

    def _autocast(self) -> torch.autocast:
        # One context per forward and no weight cache: the cache would hold low-precision copies of all weights that were
        # ever used in the context, and go stale when the optimizer steps. A forward uses each weight once anyway.
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None, cache_enabled=False)

    def _own(self, value: Tensor) -> Tensor:
        """``value``, copied if it lies where a CUDA graph writes again when it is next replayed."""
        return value.clone() if self._graphs else value

    def _prepare_gradients(self, k: int) -> None:
        """Where CUDA graphs compute gradients: make those of module ``k``, so that each part's are added, not taken."""
        for part in (self.modules[k].stem, self.modules[k].blocks) if self._graphs else ():
            for parameter in part.parameters() if part is not None else ():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, labels, label_smoothing=self.label_smoothing)

    def _backward(self, loss: Tensor, share: float) -> None:
        """Backward of a mean over a part, as its share of the mean over the batch."""
        self.scaler.scale(loss if share == 1 else loss * share).backward()

    def _store(self, h: Tensor, part: slice, whole: Tensor | None, batch: int, over: Tensor | None = None) -> Tensor:
        """Put a part's output where the next module finds it: in ``whole``, made at the first part."""
        h = h.to(self.amp_dtype or h.dtype)
        if len(h) == batch:
            return memory.tag(self._own(h), "boundary")
        if whole is None and over is not None and over.shape[1:] == h.shape[1:] and over.dtype == h.dtype:
            whole = over
        elif whole is None:
            whole = memory.tag(h.new_empty(batch, *h.shape[1:]), "boundary")
        whole[part] = h
        return whole

    def _update(self, k: int, record: Recorder) -> None:
        """Clip, step and release the gradients of module ``k``."""
        optimizer = self._optimizer_of[k]
        gradients = [p for p in self._trained[k] if p.grad is not None]
        if optimizer is None or not gradients:
            return
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
        if self.clip_grad is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in gradients if p.grad is not None])
        else:
            norm = torch.nn.utils.clip_grad_norm_(gradients, self.clip_grad)
        record.gradient_norm[k] = norm
        if memory.is_dry_run() or bool(torch.isfinite(norm)):
            self.residency.step(k)
        else:
            record.skipped[k] = True
            optimizer.zero_grad(set_to_none=True)

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

    def _infer(self, k: int, x: Tensor, classify: bool) -> tuple[Tensor, Tensor | None]:
        with self._autocast():
            output = self._own(self.modules[k](self._prepare(x) if k == 0 else x).output)
            return output, self.modules[k].classify(output).float() if classify else None

    # Building and checking

    def _build(
        self, k: int, decoder: str, kind: Kind, normalize_target: bool, lookahead: int, recompute: Recompute
    ) -> LocalModule:
        span, view, local = self.spans[k], self.backbone, k + 1 < len(self.spans) and not self.objective.exact
        lookahead = min(lookahead, len(self.spans[k + 1])) if local else 0
        auxiliary = AuxiliaryHead(view.boundaries[span.stop + lookahead], self.classes) if local else None
        target = self.objective.target(k == 0, view.image, view.boundaries[span.start]) if local else None
        return LocalModule(
            view,
            span,
            auxiliary=auxiliary,
            decoder=DECODERS[decoder](view.boundaries[span.stop], target, kind, normalize_target) if target else None,
            lookahead=lookahead,
            measure_residual=local and self.objective.measures_residual,
            recompute=recompute,
        )

    def _weights(
        self, regularizer: float | Sequence[float] | None, classification: float | Sequence[float] | None
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        count = len(self.spans) - 1
        given = {"regularizer_weight": regularizer, "classification_weight": classification}
        weights = []
        for (name, value), default in zip(given.items(), self.objective.default_weights(count + 1), strict=True):
            values = default if value is None else (value,) * count if isinstance(value, (int, float)) else tuple(value)
            if len(values) != count:
                raise ValueError(f"{name} needs one number, or one for each of the {count} local modules; got {value}.")
            weights.append(values)
        return weights[0], weights[1]


_GeneratorState = tuple[Tensor, Tensor | None]


def _generator_state(device: torch.device) -> _GeneratorState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _replay(state: _GeneratorState, device: torch.device) -> Iterator[None]:
    """Draw the random numbers that were drawn after ``state`` again, and then go on as if nothing had happened."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield


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
    return tuple(torch.tensor(values).view(-1, 1, 1) * 255 for values in (mean, std))  # type: ignore[return-value]


def _accelerate(model: nn.Module, required: bool) -> int:
    """Swap in fused attention; a model it cannot serve keeps timm's, unless it is ``required``."""
    try:
        return accelerate(model)
    except ValueError:
        if required:
            raise
        return 0
