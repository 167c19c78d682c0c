"""Where the network is cut: K modules of balanced cost, one per stage, or at the user's own cut points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fastlocal.backbones import Backbone


def partition(backbone: Backbone, modules: int | str | Sequence[int]) -> tuple[range, ...]:
    """Cut the blocks of ``backbone`` into consecutive ranges.

    Args:
        modules: a number K (ranges of balanced cost; as long as K is not larger than the number of stages, cuts fall
            between stages only: Swin with K=4 gives its 4 stages, K=2 gives stages 1–2 | 3–4), ``"stages"``, or cut points:
            the index of the first block of the second, third, … module.

    Raises:
        ValueError: K is out of range, a cut point is out of range or out of order, or the model has no stages.
    """
    blocks = len(backbone.blocks)
    if isinstance(modules, str):
        if modules != "stages":
            raise ValueError(f"modules must be a number, 'stages' or a list of cut points, got {modules!r}.")
        if len(backbone.stages) == 1:
            raise ValueError(
                f"modules='stages' needs a model with stages (a Swin); {type(backbone.model).__name__} has none: give a number"
                f" from 1 to {blocks}."
            )
        return _ranges(backbone.stages[1:], blocks)
    if isinstance(modules, int):
        if not 1 <= modules <= blocks:
            raise ValueError(f"modules must be from 1 to {blocks}, the number of blocks of this model; got {modules}.")
        starts = backbone.stages if modules <= len(backbone.stages) else range(blocks)
        return _ranges(_balanced(_costs(backbone), modules, starts), blocks)
    cuts = list(modules)
    if any(not isinstance(cut, int) or not 0 < cut < blocks for cut in cuts) or cuts != sorted(set(cuts)):
        raise ValueError(
            f"modules: cut points must be increasing block indices from 1 to {blocks - 1} (each the first block of a module);"
            f" got {cuts}."
        )
    return _ranges(cuts, blocks)


def _ranges(cuts: Sequence[int], blocks: int) -> tuple[range, ...]:
    edges = [0, *cuts, blocks]
    return tuple(range(start, stop) for start, stop in pairwise(edges))


def _costs(backbone: Backbone) -> list[int]:
    """Multiply-accumulates of each block's linear layers: parameters × tokens."""
    return [
        sum(p.numel() for p in block.parameters()) * geometry.height * geometry.width
        for block, geometry in zip(backbone.blocks, backbone.boundaries[1:], strict=True)
    ]


def _balanced(costs: list[int], modules: int, starts: Sequence[int]) -> list[int]:
    """The cuts, among ``starts``, that minimize the sum of the squared module costs (dynamic programming)."""
    edges = [*starts, len(costs)]
    # best[j]: the cheapest way to cut blocks[:edges[j]] into the modules placed so far, and its cuts.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for _ in range(modules):
        best = {
            j: min(
                (cost + sum(costs[edges[i] : edges[j]]) ** 2, [*cuts, edges[i]])
                for i, (cost, cuts) in best.items()
                if i < j
            )
            for j in range(1, len(edges))
            if any(i < j for i in best)
        }
    return best[len(edges) - 1][1][1:]
