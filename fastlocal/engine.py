"""What the local and the exact step have in common: how one module sees one part, and how it is updated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from fastlocal import memory
from fastlocal.boundary import Boundary, Home
from fastlocal.bus import Bus
from fastlocal.checks import check_choice
from fastlocal.distributed import Reducer
from fastlocal.distributed.data_parallel import Reduction
from fastlocal.metrics import Recorder
from fastlocal.module import LocalModule
from fastlocal.objectives import Features, Objective
from fastlocal.residency import Residency

Loss = Callable[[Tensor, Tensor], Tensor]
ClipMode = Literal["norm", "value", "agc"]
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class StepOptions:
    """How a batch is worked through.

    Raises:
        ValueError: a value is none of what `LocalTrainer` accepts.
    """

    micro_batch: int | None
    boundaries: Home
    amp_dtype: torch.dtype | None
    clip_grad: float | None
    clip_mode: ClipMode
    label_smoothing: float
    compile: bool | str
    loss: Loss | None = None

    def __post_init__(self) -> None:
        check_choice("boundaries", self.boundaries, get_args(Home))
        if isinstance(self.compile, str):
            check_choice("compile", self.compile, COMPILE_MODES)
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, or None for the whole batch; got {self.micro_batch}.")
        check_choice("clip_mode", self.clip_mode, get_args(ClipMode))
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad must be positive, or None for no clipping; got {self.clip_grad}.")

    @property
    def cuda_graphs(self) -> bool:
        """Whether modules replay CUDA graphs, whose results lie where the next replay writes again."""
        return self.compile in ("reduce-overhead", "max-autotune")


class Engine:
    """One module at a time, one part at a time.

    Args:
        modules: in the order of the forward.
        trained: what each module trains.
        optimizers: one per module, None for a module with nothing to train.
        weights: of the regularizer and of the auxiliary cross-entropy, one of each per local module.
        normalization: mean and standard deviation [channels, 1, 1] of images with values from 0 to 255.
        own: the modules that this process trains.
        classifiers: the parameters that adaptive clipping leaves alone.
        reducer: sums gradients over processes; None for one process.

    Attributes:
        first: the first module that trains anything; those before it have neither graph nor gradients.
    """

    def __init__(
        self,
        modules: Sequence[LocalModule],
        objective: Objective,
        trained: Sequence[Sequence[nn.Parameter]],
        optimizers: Sequence[torch.optim.Optimizer | None],
        weights: tuple[Sequence[float], Sequence[float]],
        normalization: tuple[Tensor, Tensor],
        residency: Residency,
        bus: Bus,
        options: StepOptions,
        own: range,
        classifiers: Iterable[nn.Parameter] = (),
        reducer: Reducer | None = None,
    ) -> None:
        self.modules = modules
        self.own = own
        self.objective = objective
        self.trained = trained
        self.optimizers = optimizers
        self.residency = residency
        self.bus = bus
        self.device = bus.device
        self.micro_batch = options.micro_batch
        self.boundaries = options.boundaries
        self.amp_dtype = options.amp_dtype
        self.clip_grad = options.clip_grad
        self.clip_mode = options.clip_mode
        self._classifiers = set(classifiers)
        self.label_smoothing = options.label_smoothing
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self._cuda_graphs = options.cuda_graphs
        self._loss = options.loss
        self.on_module_end: Callable[[int, LocalModule], None] | None = None
        self._regularizer_weights, self._classification_weights = weights
        self._mean, self._std = normalization
        self._unscaled = False
        self.first = next((k for k, parameters in enumerate(trained) if parameters), len(modules) - 1)
        self._reducer = reducer
        self._reducing: tuple[int, Reduction] | None = None  # the module whose gradients are on their way

    # Parts and boundaries

    def parts(self, batch: int) -> list[slice]:
        """The parts of a batch."""
        size = self.micro_batch or batch
        return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]

    def images(self, images: Tensor) -> Boundary:
        """What enters module 1."""
        return Boundary.of(images, self.boundaries, self.bus)

    def boundary(self, batch: int) -> Boundary:
        """An empty one, for features of ``batch`` samples or for their gradient."""
        return Boundary(self.boundaries, self.bus, batch, self.amp_dtype, clone=self._cuda_graphs)

    def following(self, k: int) -> int | None:
        """The module that a forward comes to after module ``k`` in this process."""
        return k + 1 if k + 1 < self.own.stop else None

    # A module and a part

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 → normalized fp32; floating images come normalized already."""
        if images.dtype != torch.uint8:
            return images
        return images.float().sub_(self._mean).div_(self._std)

    def enter(self, k: int, x: Tensor) -> Tensor:
        """What module ``k`` is run on, from a part ``x`` of what stands before it."""
        return self.prepare(x) if k == 0 else x

    def autocast(self) -> torch.autocast:
        """One context per forward and no weight cache.

        The cache would hold low-precision copies of all weights that were ever used in the context, and go stale when the
        optimizer steps. A forward uses each weight once anyway.
        """
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None, cache_enabled=False)

    @torch.no_grad()
    def infer(self, k: int, x: Tensor, classify: bool) -> tuple[Tensor, Tensor | None]:
        """Output of module ``k`` on one part without a graph, and its classifier's logits (fp32) if asked for."""
        with self.autocast(), self.modules[k].statistics_kept():
            output = self.modules[k](self.enter(k, x)).output
            if self._cuda_graphs:
                output = output.clone()  # it lies where a CUDA graph writes again when it is next replayed
            return output, self.modules[k].classify(output).float() if classify else None

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss, a mean over the part: cross-entropy, or the user's own."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        if self._loss is not None:
            return self._loss(wide, labels)
        return F.cross_entropy(wide, labels, label_smoothing=self.label_smoothing)

    def local_loss(self, k: int, features: Features, image: Tensor | None, labels: Tensor, record: Recorder) -> Tensor:
        """What module ``k`` minimizes on one part, given its ``features``; its measurements go to ``record``."""
        module = self.modules[k]
        with self.autocast():
            logits = module.classify(features.output)
            regularizer = None
            if module.head is None and self._regularizer_weights[k] != 0:
                regularizer = self.objective.regularizer(module.decoder, features, image, labels)
        loss = total = self.criterion(logits, labels)
        if module.head is None:
            total = self._classification_weights[k] * loss
            if regularizer is not None:
                total = total + self._regularizer_weights[k] * regularizer
        record.add(k, loss, logits, labels, regularizer)
        return total

    def auxiliary_loss(self, k: int, h: Tensor, labels: Tensor, record: Recorder) -> Tensor:
        """What the auxiliary head of module ``k`` minimizes on one part ``h`` of the module's output, which is detached."""
        with self.autocast():
            logits = self.modules[k].classify(h, train_lookahead=False)
        loss = self.criterion(logits, labels)
        record.add(k, loss, logits, labels, None)
        return self._classification_weights[k] * loss

    def backward(self, loss: Tensor, share: float) -> None:
        """Backward of a mean over a part, as its share of the mean over the batch."""
        self.scaler.scale(loss if share == 1 else loss * share).backward()

    # Gradients

    @contextlib.contextmanager
    def learning(self, k: int, upcoming: int | None, record: Recorder, update: bool = True) -> Iterator[None]:
        """Module ``k`` is on the device; the gradients that this block leaves update it, or are dropped.

        If the block fails, the gradients are dropped as well, and the module is as it was before. Where gradients are summed
        over processes, the update may come at the end of the next block, or of the step (`settle`).
        """
        if self._reducing is not None and not set(self.trained[self._reducing[0]]).isdisjoint(self.modules[k].borrowed):
            self.settle(record)  # what module k reads must be up to date
        # Exact gradients of a shared parameter add up over the modules that read it, until its owner's turn, the last.
        sums = {p: p.grad.clone() for module in self.modules for p in module.shared if p.grad is not None}
        with self.residency.on_device(k, upcoming):
            self._prepare_gradients(k)
            try:
                yield
            except BaseException:
                self.drop_gradients(k)
                for parameter in self.modules[k].shared:
                    parameter.grad = None
                for parameter, gradient in sums.items():
                    parameter.grad = gradient
                raise
            if not update:
                self.drop_gradients(k)
            elif self._reducer is None:
                self._update(k, record)
            else:
                begun = k, self._reducer.start(self.trained[k])
                self.settle(record)  # of the module before, whose gradients travelled meanwhile
                self._reducing = begun
                if self.residency.options.keep == "module":
                    self.settle(record)

    def settle(self, record: Recorder) -> None:
        """Update the module whose gradients are on their way, if there is one."""
        if self._reducing is not None:
            (k, reduction), self._reducing = self._reducing, None
            reduction.finish()
            self._update(k, record)

    def drop_gradients(self, k: int) -> None:
        """Set the gradients of module ``k`` to None."""
        for parameter in self.trained[k]:
            parameter.grad = None

    def finish(self) -> None:
        """After the last module of a step, or after one that could not go on."""
        self._reducing = None
        if self._unscaled:
            self.scaler.update()
            self._unscaled = False
        self.bus.synchronize()

    def _prepare_gradients(self, k: int) -> None:
        """Where CUDA graphs compute gradients: make those of module ``k``, so that each part's are added, not taken."""
        for part in (self.modules[k].stem, self.modules[k].blocks) if self._cuda_graphs else ():
            for parameter in part.parameters() if part is not None else ():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _update(self, k: int, record: Recorder) -> None:
        """Clip, step and release the gradients of module ``k``."""
        if self.on_module_end is not None:
            self.on_module_end(k, self.modules[k])
        optimizer = self.optimizers[k]
        gradients = [p for p in self.trained[k] if p.grad is not None]
        if optimizer is None or not gradients:
            return
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
            self._unscaled = True
        if self.clip_grad is not None and self.clip_mode == "norm":
            norm = torch.nn.utils.clip_grad_norm_(gradients, self.clip_grad)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in gradients if p.grad is not None])
            if self.clip_grad is not None:
                clipped = [p for p in gradients if self.clip_mode == "value" or p not in self._classifiers]
                dispatch_clip_grad(clipped, self.clip_grad, mode=self.clip_mode)
        record.gradient_norm[k] = norm
        if memory.is_dry_run() or bool(torch.isfinite(norm)):
            try:
                self.residency.step(k)
            except torch.OutOfMemoryError as error:
                raise UpdateOutOfMemory(
                    f"no memory for the optimizer's step of module {k + 1}, which smaller parts do not free; more modules, or"
                    " residency='optimizer' or 'module', which keep the optimizer states on the host, do."
                ) from error
        else:
            record.skipped[k] = True
            optimizer.zero_grad(set_to_none=True)


class UpdateOutOfMemory(torch.OutOfMemoryError):
    """The optimizer's step ran out of memory; the module may be updated in part, so the step cannot be repeated."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether smaller parts may help against ``error``: the allocator's, or a library's that allocates by itself."""
    text = str(error)
    if isinstance(error, UpdateOutOfMemory):
        return False
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in ("_STATUS_ALLOC_FAILED", "out of memory"))
    )


@contextlib.contextmanager
def random_stream(seed: int | None, k: int, device: torch.device) -> Iterator[None]:
    """The random stream of module ``k`` in a step; the global generators are as before afterwards."""
    if seed is None or memory.is_dry_run():
        yield
        return
    card = device.type == "cuda"
    with torch.random.fork_rng([device] if card else []):
        torch.default_generator.manual_seed(seed + k)
        if card:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed + k)
        yield
