"""What a module learns from: one class per objective.

Every local module minimizes ``classification weight · CE(aux(h), labels) + regularization weight · regularizer``; objectives
differ in the regularizer and in the default weights. The last module minimizes the cross-entropy of the model's own head,
and nothing else. `EndToEnd` is no local objective at all: it asks the trainer for the exact gradients of the last loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastlocal.decoders import Decoder
from fastlocal.geometry import Geometry

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Features:
    """What one forward of a module leaves for its loss.

    Attributes:
        embedded: what the first block reads: the module's input, after the patch embedding in module 1.
        output: what the module passes on.
        residual: Σ over the module's blocks of mean(residual²), fp32 scalar, if the objective asks for it.
    """

    embedded: Tensor
    output: Tensor
    residual: Tensor | None


class Objective:
    """Cross-entropy of the auxiliary head alone: greedy local learning."""

    name: ClassVar[str] = "cross-entropy"
    exact: ClassVar[bool] = False
    measures_residual: ClassVar[bool] = False

    def __init__(self, first_target: Literal["image", "patch"] = "image") -> None:
        self.first_target = first_target

    def default_weights(self, modules: int) -> tuple[Weights, Weights]:
        """Regularization and classification weights of the ``modules - 1`` local modules."""
        return (0.0,) * (modules - 1), (1.0,) * (modules - 1)

    def target(self, first: bool, image: Geometry, embedded: Geometry) -> Geometry | None:
        """The geometry that a module's decoder reconstructs, or None for no decoder.

        Args:
            first: whether this is module 1.
            image: geometry of the images.
            embedded: geometry of what the module's first block reads.
        """
        return None

    def regularizer(
        self, decoder: Decoder | None, features: Features, images: Tensor | None, labels: Tensor
    ) -> Tensor | None:
        """The term beside the cross-entropy (fp32 scalar, a mean over samples), or None.

        Args:
            images: of the part, where the decoder reconstructs them; else None.
            labels: of the part.
        """
        return None


class Feature(Objective):
    """Reconstruct the module's own input features: the paper (Pathak, Zhang, Samaras, arXiv 2212.14215).

    Weights 1 and 1 are those of the same authors' predecessor local_learning_wsi (MICCAI 2022); the paper's are unknown to
    us. The input of module 1 is the image, or, with ``first_target="patch"``, its patch embedding.
    """

    name = "feature"

    def default_weights(self, modules: int) -> tuple[Weights, Weights]:
        return (1.0,) * (modules - 1), (1.0,) * (modules - 1)

    def target(self, first: bool, image: Geometry, embedded: Geometry) -> Geometry | None:
        return image if first and self.first_target == "image" else embedded

    def regularizer(
        self, decoder: Decoder | None, features: Features, images: Tensor | None, labels: Tensor
    ) -> Tensor | None:
        assert decoder is not None
        if decoder.target.layout == "image":
            assert images is not None
            return decoder.loss(features.output, images)
        return decoder.loss(features.output, features.embedded.detach())


class Image(Feature):
    """Reconstruct the image in every module: InfoPro (Wang et al., ICLR 2021) on a transformer.

    Default weights are InfoPro's for CIFAR-10: over the depth, reconstruction goes linearly from 1 to 0 and classification
    from 0 to 1; with two modules they are 5 and 0.5.
    """

    name = "image"

    def default_weights(self, modules: int) -> tuple[Weights, Weights]:
        if modules == 2:
            return (5.0,), (0.5,)
        depth = [k / (modules - 1) for k in range(modules - 1)]
        return tuple(1 - d for d in depth), tuple(depth)

    def target(self, first: bool, image: Geometry, embedded: Geometry) -> Geometry | None:
        return image


class Transport(Objective):
    """Move the features as little as possible: TRGL (Karkar et al., NeurIPS 2023), τ·Σ over blocks of mean(residual²).

    τ = 0.01 is our choice, of the order that keeps the term below the cross-entropy at the start.
    """

    name = "transport"
    measures_residual = True

    def default_weights(self, modules: int) -> tuple[Weights, Weights]:
        return (0.01,) * (modules - 1), (1.0,) * (modules - 1)

    def regularizer(
        self, decoder: Decoder | None, features: Features, images: Tensor | None, labels: Tensor
    ) -> Tensor | None:
        return features.residual


class EndToEnd(Objective):
    """Exact backpropagation, one module at a time; no auxiliary head, no decoder."""

    name = "end-to-end"
    exact = True


OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (Feature, Image, Objective, Transport, EndToEnd)}


def loss_weights(
    objective: Objective,
    modules: int,
    regularizer: float | Sequence[float] | None,
    classification: float | Sequence[float] | None,
) -> tuple[Weights, Weights]:
    """Weights of the regularizer and of the auxiliary cross-entropy of each of the ``modules - 1`` local modules.

    Args:
        regularizer, classification: one number for all, one for each, or None for the objective's own.

    Raises:
        ValueError: there are more or fewer numbers than local modules.
    """
    count = modules - 1
    given = {"regularizer_weight": regularizer, "classification_weight": classification}
    weights: list[Weights] = []
    for (name, value), default in zip(given.items(), objective.default_weights(modules), strict=True):
        values = default if value is None else (value,) * count if isinstance(value, (int, float)) else tuple(value)
        if len(values) != count:
            raise ValueError(f"{name} needs one number, or one for each of the {count} local modules; got {value}.")
        weights.append(values)
    return weights[0], weights[1]
