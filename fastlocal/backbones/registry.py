"""Which function sees which class of models as a `Backbone`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fastlocal.backbones.backbone import Backbone, Chain

Image = tuple[int, int, int]
Adapter = Callable[[Any, Image], Backbone]
_Adapter = TypeVar("_Adapter", bound=Adapter)

# By the class's full name, so that a library is imported by those who use it only.
ADAPTERS: dict[str, Adapter] = {}

# What a subclass may not change, or the parts would not make its forward.
_FORWARD = ("forward", "forward_features", "forward_head")


def register_backbone(*classes: type[nn.Module] | str) -> Callable[[_Adapter], _Adapter]:
    """Decorate the function that sees models of ``classes`` as a `Backbone`.

        @fastlocal.register_backbone(MyTransformer)
        def my_transformer(model, image):
            return fastlocal.Backbone(model.stem, model.blocks, model.head, image, model=model)

    The function takes the model and the shape of an image (channels, height, width). Subclasses of ``classes`` are seen by it
    too, unless they define a forward of their own.

    Args:
        classes: classes, or their full names such as ``"timm.models.eva.Eva"``.
    """

    def register(adapter: _Adapter) -> _Adapter:
        ADAPTERS.update({c if isinstance(c, str) else _full_name(c): adapter for c in classes})
        return adapter

    return register


def backbone(model: nn.Module | Backbone, image_size: int | tuple[int, int] | None = None) -> Backbone:
    """See ``model`` as stem → blocks → head.

    Args:
        model: of a registered class, or a `Backbone`, which is returned as it is.
        image_size: side of the images in pixels, or (height, width), for models that take any. Default: the one that the model
            was built for.

    Raises:
        ValueError: the architecture is not supported, or the model is built in a way that cannot be cut, or for images of
            another size.
    """
    if isinstance(model, Backbone):
        return model
    if isinstance(model, Chain):
        return Backbone(model.stem, model.functions, model.head, model=model, **model.options)
    image = image_shape(model, image_size)
    adapter = _adapter(model)
    try:
        return adapter(model, image)
    except ValueError:
        raise
    except Exception as error:  # each architecture has its own for images that do not fit
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(
            f"model: {type(model).__name__} cannot be run on images of {'×'.join(map(str, image))}: {reason}."
        ) from error


def image_shape(model: Any, image_size: int | tuple[int, int] | None = None) -> Image:
    """(channels, height, width) of the images that ``model`` was built for, or with sides of ``image_size``."""
    configuration = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = configuration.get("input_size", (3, 224, 224))
    hugging_face = getattr(model, "config", None)
    hugging_face = getattr(hugging_face, "vision_config", hugging_face)
    built_for = getattr(hugging_face, "image_size", None) or getattr(model, "image_size", None)
    for name in ("patch_embed", "patch_embed1"):
        built_for = getattr(getattr(model, name, None), "img_size", None) or built_for
    size = image_size or built_for or (height, width)
    height, width = (size, size) if isinstance(size, int) else size
    first = next((p for p in model.parameters() if p.ndim == 4), None)
    channels = getattr(hugging_face, "num_channels", None) or getattr(model, "in_chans", None) or channels
    if first is not None and not hasattr(model, "in_chans") and hugging_face is None:
        channels = first.shape[1]
    return channels, height, width


def _adapter(model: nn.Module) -> Adapter:
    for ancestor in type(model).__mro__:
        if (adapter := ADAPTERS.get(_full_name(ancestor))) is not None:
            for name in _FORWARD:
                if getattr(type(model), name, None) is not getattr(ancestor, name, None):
                    raise ValueError(
                        f"model: {type(model).__name__} has a {name} of its own, so it is no longer the"
                        f" {ancestor.__name__} that fastlocal knows; say what it does with fastlocal.register_backbone."
                    )
            return adapter
    raise ValueError(
        f"model: {type(model).__name__} is not supported: fastlocal knows the transformers of timm, torchvision and"
        " Hugging Face that the README lists; give a fastlocal.Backbone(stem, blocks, head, example) for any other."
    )


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
