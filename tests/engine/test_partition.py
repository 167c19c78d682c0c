"""Where the cuts fall."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from fastlocal.backbones import backbone
from fastlocal.partition import partition


def edges(model: nn.Module, modules: object) -> list[int]:
    return [span.start for span in partition(backbone(model), modules)]  # type: ignore[arg-type]


@pytest.mark.parametrize("depths", [(2, 2, 6, 2), (2, 2, 18, 2)], ids=["tiny", "small"])
def test_swin_is_cut_at_its_stages(depths: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", depths=depths)
    assert edges(model, 4) == edges(model, "stages") == [0, 2, 4, 4 + depths[2]]
    assert edges(model, 2) == [0, 4]
    assert edges(model, 1) == [0]
    assert edges(model, sum(depths)) == list(range(sum(depths)))


def test_more_modules_than_stages_balance_the_cost(build: Callable[..., nn.Module]) -> None:
    assert edges(build("swin"), 8) == list(range(8))
    assert len(edges(build("swin"), 5)) == 5


def test_vit_is_cut_into_equal_parts(build: Callable[..., nn.Module]) -> None:
    assert edges(build("vit", depth=12), 4) == [0, 3, 6, 9]
    sizes = [len(span) for span in partition(backbone(build("vit", depth=12)), 5)]
    assert sum(sizes) == 12
    assert max(sizes) - min(sizes) == 1


def test_explicit_cut_points(build: Callable[..., nn.Module]) -> None:
    assert edges(build("vit"), [1, 4]) == [0, 1, 4]


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        (0, "modules must be from 1 to 5"),
        (6, "modules must be from 1 to 5, the number of blocks of this model; got 6"),
        ("stages", "needs a model with stages"),
        ("four", "got 'four'"),
        ([0, 2], "increasing block indices from 1 to 4"),
        ([3, 2], "increasing block indices"),
        ([2, 5], "increasing block indices"),
    ],
)
def test_impossible_partitions(build: Callable[..., nn.Module], modules: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        edges(build("vit"), modules)
