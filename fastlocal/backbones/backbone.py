"""A network seen as stem → blocks → head.

Nothing is copied: the parts call the model's own code, and its parameters stay the user's. What a part reads, and the shapes
between parts, are found by running them once on tensors that have shapes and no values.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from fastlocal.dry_run import without_values
from fastlocal.geometry import Geometry
from fastlocal.memory import tensors_in

Function = Callable[[Any], Any]


class Part(nn.Module):
    """A piece of a model's forward. Its parameters are those that it is the first to read; the code stays the model's.

    Attributes:
        borrowed: the parameters that it reads and an earlier part owns.
    """

    def __init__(self, function: Function) -> None:
        super().__init__()
        self._function = (function,)  # in a tuple, or a module would be registered with all of its parameters
        self.borrowed: tuple[nn.Parameter, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        return self._function[0](x)

    @property
    def functions(self) -> tuple[Function, ...]:
        """What it runs, one after the other."""
        return self._function

    @property
    def code(self) -> nn.Module:
        """The module that it runs, where it is one; else itself."""
        return self._function[0] if isinstance(self._function[0], nn.Module) else self


class Block(Part):
    """One block, after the transition (such as Swin's patch merging) that stands before it, if any."""

    def __init__(self, function: Function, transition: Function | None = None) -> None:
        super().__init__(function)
        self._transition = (transition,)

    @property
    def functions(self) -> tuple[Function, ...]:
        return tuple(f for f in (*self._transition, *self._function) if f is not None)

    @property
    def code(self) -> nn.Module:
        modules = [f for f in self.functions if isinstance(f, nn.Module)]
        return nn.ModuleList(modules) if len(modules) == len(self.functions) else self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # a pair, where others give one
        """Return the block's input (after the transition) and its output; their difference is the residual."""
        if self._transition[0] is not None:
            x = self._transition[0](x)
        return x, self._function[0](x)


class Chain(nn.Module):
    """The model that a stem, blocks and a head make, where no other class says how they are called."""

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Module, **options: Any) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head
        self.output_of: Function = options.pop("output_of")
        self.options = options

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.functions:
            x = block(x)
        return self.head(x)

    @property
    def functions(self) -> list[Function]:
        """What runs the blocks: each gives what goes on, of all that its module returns."""

        def runs(block: nn.Module) -> Function:
            return lambda x: self.output_of(block(x))

        return [runs(block) for block in self.blocks]


class Backbone:
    """A model as stem → blocks → head, for `LocalTrainer`.

    Args:
        stem: images [B, C, H, W] → features.
        blocks: in the order of the forward: features → features, or a pair (transition, block), where the transition changes
            the features' shape and the block adds its residual to what the transition returns.
        head: features after the last block → logits, final norm and pooling included.
        example: images, of which only the shape is used: [B, C, H, W] with any B, or (C, H, W).
        model: what owns all of them, where they are functions and not modules of their own.
        stages: the index of the first block of each stage.
        prefix: class and register tokens that stand before the patch tokens, where features are tokens [B, N, C].
        layout: ``"NHWC"`` or ``"NCHW"``, where features are maps and their shape does not tell.
        output_of: what of a block's return value goes on, for blocks that return tuples. For modules without a ``model``.
        normalization: (mean, std) per channel that uint8 images are normalized with.

    Attributes:
        model: the model whose parameters the parts share; it may be called as ever.
        stem, blocks, head: the parts.
        stages: as given.
        image: geometry of the images.
        boundaries: geometry before block 0, 1, …, and after the last one.
        keeps_shape: whether each block, after its transition, returns the shape that it read.
        logits: shape of one sample's logits; the last of them is the number of classes.
        shared: names of the parameters that more than one part reads. The first of those parts owns them: exact gradients
            are those of all parts; a local objective trains them in its module alone.

    Raises:
        ValueError: the parts do not fit together, or their features are neither tokens of a grid nor maps.
    """

    def __init__(
        self,
        stem: Function,
        blocks: Sequence[Function | tuple[Function | None, Function]],
        head: Function,
        example: Tensor | tuple[int, int, int],
        *,
        model: nn.Module | None = None,
        stages: Sequence[int] = (0,),
        prefix: int = 0,
        layout: Literal["NHWC", "NCHW"] | None = None,
        output_of: Function | None = None,
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        channels, height, width = example.shape[-3:] if isinstance(example, Tensor) else example
        self.image = Geometry(height, width, channels, "image")
        if model is None:
            model = _chain(
                stem, blocks, head, output_of, example=(channels, height, width), stages=tuple(stages), prefix=prefix,
                layout=layout, normalization=normalization,
            )  # fmt: skip
            stem, blocks, head = model.stem, model.functions, model.head
        self.model = model
        self.stem = Part(stem)
        self.blocks = tuple(Block(b[1], b[0]) if isinstance(b, tuple) else Block(b) for b in blocks)
        self.head = Part(head)
        self.stages = tuple(stages)
        self.normalization = normalization
        self._discover(prefix, layout)

    @property
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the model wants free of weight decay."""
        return set(getattr(self.model, "no_weight_decay", set)())

    @property
    def batch_norms(self) -> tuple[_BatchNorm, ...]:
        """The layers whose output, in training, depends on the other samples of the batch."""
        return tuple(module for module in self.model.modules() if isinstance(module, _BatchNorm))

    def _discover(self, prefix: int, layout: str | None) -> None:
        """Find geometry, logits and who reads which parameters."""
        names = {p: name for name, p in self.model.named_parameters()}
        layers = {p: layer for layer in self.model.modules() for p in layer.parameters(recurse=False)}
        weight = next((p for p in names if p.is_floating_point()), torch.empty(0))
        owned: set[nn.Parameter] = set()
        boundaries: list[Geometry] = []
        keeps_shape: list[bool] = []

        def run(part: Part, x: Tensor) -> Any:
            with _Parameters() as read:
                y = part(x)
            seen = [p for p in read.seen if p in names]  # not those made on the way, as a normalized weight may be
            part.borrowed = tuple(p for p in seen if p in owned)
            own = [p for p in seen if p not in owned]
            owned.update(own)
            for parameter in own:
                layer, name = layers[parameter], names[parameter].replace(".", "_")
                if next(layer.children(), None) is None and set(layer.parameters()) <= set(own):
                    part.add_module(name.rpartition("_")[0] or name, layer)  # whole, so that its kind can be told
                else:
                    part.register_parameter(name, parameter)
            return y

        with unchanged_by(self.model), without_values(), torch.no_grad():
            x = run(self.stem, torch.empty(2, *self.image.shape, dtype=weight.dtype, device=weight.device))
            boundaries.append(_geometry(x, self.image, prefix, layout, "the stem"))
            for i, block in enumerate(self.blocks):
                before, x = run(block, x)
                keeps_shape.append(getattr(before, "shape", None) == getattr(x, "shape", None))
                boundaries.append(_geometry(x, self.image, prefix, layout, f"block {i}"))
            logits = run(self.head, x)
        if not isinstance(logits, Tensor) or len(logits) != 2 or logits.ndim < 2:
            raise ValueError(f"model: its head must return logits [B, …, classes], got {_described(logits)}.")
        self.logits = tuple(logits.shape[1:])
        self.boundaries = tuple(boundaries)
        self.keeps_shape = tuple(keeps_shape)
        parts = (self.stem, *self.blocks, self.head)
        self.shared = tuple(dict.fromkeys(names[p] for part in parts for p in part.borrowed))


def _chain(stem: Any, blocks: Sequence[Any], head: Any, output_of: Function | None, **options: Any) -> Chain:
    for name, part in (("stem", stem), *((f"blocks[{i}]", block) for i, block in enumerate(blocks)), ("head", head)):
        if not isinstance(part, nn.Module):
            raise ValueError(
                f"{name} must be an nn.Module, or the model that owns it be given too; got {_described(part)}."
            )
    if not blocks:
        raise ValueError("blocks must hold at least one module.")
    return Chain(stem, blocks, head, output_of=output_of or _unchanged, **options)


def _unchanged(x: Any) -> Any:
    return x


@contextlib.contextmanager
def unchanged_by(model: nn.Module) -> Iterator[None]:
    """``model`` forgets what it kept in this block, such as tables that some make at their first call."""

    def state(value: Any) -> Any:
        return copy.copy(value) if isinstance(value, (dict, list)) else value

    before = [(layer, {name: state(value) for name, value in vars(layer).items()}) for layer in model.modules()]
    try:
        yield
    finally:
        for layer, attributes in before:
            vars(layer).clear()
            vars(layer).update(attributes)


class _Parameters(TorchDispatchMode):
    """Notes the parameters that operations read, in their order. For use among tensors without values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[nn.Parameter, None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled there, and hiding each call from the compiler takes as long as the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        for tensor in tensors_in((args, kwargs)):
            if isinstance(tensor, nn.Parameter):
                self.seen[tensor] = None
        return func(*args, **(kwargs or {}))


def _geometry(x: Any, image: Geometry, prefix: int, layout: str | None, after: str) -> Geometry:
    """The geometry of a batch ``x`` of two."""
    if not isinstance(x, Tensor) or len(x) != 2 or x.ndim not in (3, 4):
        raise ValueError(
            f"model: {after} must return tokens [B, N, C] or a map [B, H, W, C] or [B, C, H, W], got {_described(x)}."
        )
    if x.ndim == 3:
        tokens = x.shape[1] - prefix
        for height in range(1, tokens + 1):
            # The grid of the images' own aspect ratio.
            if tokens % height == 0 and height * image.width == (tokens // height) * image.height:
                return Geometry(height, tokens // height, x.shape[2], "tokens", prefix)
        raise ValueError(
            f"model: the {x.shape[1]} tokens after {after}, {prefix} of them before the patches, are no grid of"
            f" {image.height}×{image.width} images; prefix must be the number of class and register tokens."
        )
    if layout is None:
        fits = [
            name
            for name, (h, w) in {"NHWC": (x.shape[1], x.shape[2]), "NCHW": (x.shape[2], x.shape[3])}.items()
            if h * image.width == w * image.height
        ]
        if len(fits) != 1:
            raise ValueError(
                f"layout must be 'NHWC' or 'NCHW': the shape {list(x.shape)} after {after} does not tell which."
            )
        layout = fits[0]
    if layout == "NHWC":
        return Geometry(x.shape[1], x.shape[2], x.shape[3], "NHWC")
    return Geometry(x.shape[2], x.shape[3], x.shape[1], "NCHW")


def _described(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
