"""Swap the attention of a timm or torchvision model for the fused ops, in place, and back.

A layer becomes an instance of a subclass (`fused_layers`) that overrides one method. Parameters, buffers, hooks, the
state dict and the module tree stay as they are; so copies, pickles, data-parallel replicas and sharded layers compute
with their own parameters, and giving a layer its former class back restores it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from fastlocal.kernels.attention import MAXIMUM_HEAD_DIM
from fastlocal.kernels.window_attention import MAXIMUM_HEAD_DIM as MAXIMUM_WINDOW_HEAD_DIM

Layer = Any  # timm's have no types for their attributes
Swap = tuple[nn.Module, type[nn.Module], str]  # a module, the class it gets, and the method that class overrides


def accelerate(model: nn.Module) -> int:
    """Swap the attention of Swin, Swin-V2, ViT (DeiT), BEiT, EVA, ViT with relative positions and MaxViT layers of timm,
    and of torchvision's Swin, in ``model`` for the fused ops.

    In place; outputs and gradients stay equal to rounding, in training and in evaluation; only the masks of a Swin's
    projection dropout are others, since timm draws them on windows and the fused layers on the grid. A layer called with
    a mask of its own runs timm's code; so does one whose method somebody has replaced on the instance, and it is not
    counted. Accelerating twice is the same as once.

    Returns:
        How many layers use a fused op now.

    Raises:
        ValueError: the model has no layer of those, or one that the ops cannot replace (it says which and why). The
            model is unchanged then.
        ImportError: timm is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise ImportError("accelerate swaps timm's layers and needs timm, which is not installed: pip install timm.")
    layers = [(name, layer, swaps) for name, layer in model.named_modules() if (swaps := _swaps(layer))]
    if not layers:
        raise ValueError(
            "model must contain layers with an attention that fastlocal can swap (timm's Swin, Swin-V2, ViT, DeiT, BEiT, "
            "EVA, ViT with relative positions, MaxViT; torchvision's Swin), got "
            f"{type(model).__name__} without one{_attention_classes(model)}."
        )
    for name, layer, swaps in layers:
        if (reason := _why_not(layer, swaps[-1][0])) is not None:
            raise ValueError(f"model cannot be accelerated: {name or type(layer).__name__} {reason}.")
    for _, _, swaps in layers:
        for module, fused, _ in swaps:
            module.__class__ = fused
    return len(layers)


def restore(model: nn.Module) -> int:
    """Undo `accelerate`, in place.

    Returns:
        How many layers were restored; 0 if ``model`` was not accelerated.

    Raises:
        ValueError: something else has changed the class of a fused layer since (``fully_shard`` does).
    """
    from fastlocal.kernels import fused_layers

    counted = {*fused_layers.WINDOW_BLOCKS.values(), *fused_layers.LAYERS.values()}
    fused = counted | set(fused_layers.WINDOW_ATTENTION.values())
    layers = [(name, module) for name, module in model.named_modules() if fused & set(type(module).__mro__)]
    for name, module in layers:
        if type(module) not in fused:
            raise ValueError(
                f"model cannot be restored: {name or 'it'} has become a {type(module).__name__} since accelerate."
            )
    restored = [type(module) in counted for _, module in layers]
    for _, module in layers:
        module.__class__ = type(module).__bases__[0]
    return sum(restored)


def _swaps(layer: Layer) -> list[Swap]:
    """What changes class in a layer that can be swapped, its attention last; nothing for other modules."""
    from fastlocal.kernels import fused_layers

    if (fused := _fused(layer, fused_layers.LAYERS)) is not None:
        swaps: list[Swap] = [(layer, fused, "forward")]
    elif (fused := _fused(layer, fused_layers.WINDOW_BLOCKS)) is not None:
        attention = _fused(layer.attn, fused_layers.WINDOW_ATTENTION)
        swaps = [(layer, fused, "_attn"), (layer.attn, attention, "forward")] if attention is not None else []
    else:
        return []
    return [] if any(method in vars(module) for module, _, method in swaps) else swaps


def _fused(layer: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> type[nn.Module] | None:
    """The class that takes the place of the layer's: by its type, because a subclass may compute something else."""
    return type(layer) if type(layer) in classes.values() else classes.get(type(layer))


def _why_not(layer: Layer, attention: Layer) -> str | None:
    """What the fused ops cannot do for this layer, to read after its name; None if there is nothing."""
    window = getattr(layer, "window_size", None)
    dropout = attention.attn_drop.p if hasattr(attention, "attn_drop") else attention.attention_dropout
    if dropout > 0:
        return f"has attention dropout {dropout}, which the fused ops do not apply; build it with 0"
    channels = attention.proj.in_features // attention.num_heads
    maximum = MAXIMUM_HEAD_DIM if window is None else MAXIMUM_WINDOW_HEAD_DIM
    if channels > maximum:
        return f"has {channels} channels per head, and the fused op takes at most {maximum}"
    return None


def _attention_classes(model: nn.Module) -> str:
    """The attention layers that a refused model has, to read after its name."""
    found = {
        f"{type(m).__module__}.{type(m).__name__}" for m in model.modules() if "attention" in type(m).__name__.lower()
    }
    return f"; it has {', '.join(sorted(found))}" if found else ""
