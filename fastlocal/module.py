"""A local module: some consecutive blocks, and the heads they learn from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlocal.backbones import Backbone, Block
from fastlocal.checks import check_choice
from fastlocal.decoders import DECODERS, Decoder, Kind
from fastlocal.geometry import Geometry
from fastlocal.objectives import Features, Objective

Recompute = Literal["none", "block"]
MakeDecoder = Callable[[Geometry, Geometry, Kind, bool], Decoder]
MakeHead = Callable[[Geometry, int], nn.Module]


@dataclass(frozen=True)
class ModuleOptions:
    """What the local modules are made of.

    Raises:
        ValueError: a value is none of what `fastlocal.LocalTrainer` accepts.
    """

    decoder: str | MakeDecoder
    head: MakeHead
    reconstruction: Kind
    normalize_target: bool
    lookahead: int
    recompute: Recompute

    def __post_init__(self) -> None:
        if isinstance(self.decoder, str):
            check_choice("decoder", self.decoder, list(DECODERS))
        check_choice("recompute", self.recompute, get_args(Recompute))
        if self.lookahead < 0:
            raise ValueError(f"lookahead must be at least 0, got {self.lookahead}.")


class LocalModule(nn.Module):
    """Blocks ``span`` of a backbone with their auxiliary head and decoder.

    The first module also has the stem and the last one the head of the backbone. Stem, blocks and head are the user's own.

    Args:
        span: the indices of the module's blocks.
        auxiliary: classifier of a local module; None in the last module and for exact gradients.
        decoder: None where the objective reconstructs nothing.
        lookahead: how many blocks of the next module the auxiliary head looks through. They stay the next module's: both
            modules' losses contribute to their gradient.
        measure_residual: compute `Features.residual`.
        recompute: ``"block"`` keeps the input of each block and recomputes its inside in the backward, in all blocks but
            the last, whose backward comes first and would free nothing.

    Attributes:
        shared: the parameters that the module's own parts of the backbone read and an earlier module owns, such as a position
            bias of all blocks.
        borrowed: all that the module reads and another one owns: `shared`, and the blocks that it looks ahead through.
    """

    def __init__(
        self,
        backbone: Backbone,
        span: range,
        *,
        auxiliary: nn.Module | None = None,
        decoder: Decoder | None = None,
        lookahead: int = 0,
        measure_residual: bool = False,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.span = span
        self.stem = backbone.stem if span.start == 0 else None
        self.blocks = nn.ModuleList(backbone.blocks[span.start : span.stop])
        self.head = backbone.head if span.stop == len(backbone.blocks) else None
        self.auxiliary = auxiliary
        self.decoder = decoder
        # In a tuple, so that their parameters are not counted as this module's own.
        self.lookahead: tuple[Block, ...] = backbone.blocks[span.stop : span.stop + lookahead]
        own = set(self.parameters())
        parts = [part for part in (self.stem, *backbone.blocks[span.start : span.stop], self.head) if part is not None]
        self.shared = tuple(dict.fromkeys(p for part in parts for p in part.borrowed if p not in own))
        ahead = [p for block in self.lookahead for p in (*block.parameters(), *block.borrowed)]
        self.borrowed = tuple(dict.fromkeys(p for p in (*self.shared, *ahead) if p not in own))
        self.batch_norms = tuple(norm for norm in backbone.batch_norms if norm.track_running_stats)
        self.measure_residual = measure_residual
        self.recompute = recompute

    @property
    def reads_image(self) -> bool:
        """Whether the module's loss needs the images."""
        return self.decoder is not None and self.decoder.target.layout == "image"

    @property
    def heads(self) -> nn.ModuleDict:
        """What the backbone does not have: auxiliary head and decoder, as far as there are any."""
        heads = {"auxiliary": self.auxiliary, "decoder": self.decoder}
        return nn.ModuleDict({name: head for name, head in heads.items() if head is not None})

    @contextlib.contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """What runs in this block is run again, or was: BatchNorm leaves its running statistics alone."""
        held = [(norm, norm.momentum, norm.num_batches_tracked) for norm in self.batch_norms]
        for norm, _, _ in held:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for norm, momentum, count in held:
                norm.momentum, norm.num_batches_tracked = momentum, count

    def _twice(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """Contexts of a block's forward and of its recomputation."""
        return contextlib.nullcontext(), self.statistics_kept()

    def forward(self, x: Tensor) -> Features:
        """Run stem (in module 1) and blocks on ``x``, images or the previous module's output."""
        embedded = x if self.stem is None else self.stem(x)
        h, residual = embedded, None
        for block in self.blocks:
            if self.recompute == "block" and torch.is_grad_enabled() and block is not self.blocks[-1]:
                contexts: dict[str, Any] = {"context_fn": self._twice} if self.batch_norms else {}
                h, moved = checkpoint(self._run, block, h, use_reentrant=False, **contexts)
            else:
                h, moved = self._run(block, h)
            if moved is not None:
                residual = moved if residual is None else residual + moved
        return Features(embedded, h, residual)

    def _run(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        before, after = block(x)
        return after, (after - before).float().square().mean() if self.measure_residual else None

    def classify(self, h: Tensor, train_lookahead: bool = True) -> Tensor:
        """Logits [B, classes] from the module's output: the backbone's head in the last module, the auxiliary one elsewhere.

        Args:
            train_lookahead: let the blocks that the auxiliary head looks through have gradients.
        """
        if self.head is not None:
            return self.head(h)
        assert self.auxiliary is not None
        ahead = torch.set_grad_enabled(train_lookahead and torch.is_grad_enabled())
        with ahead, self.statistics_kept() if self.lookahead else contextlib.nullcontext():
            for block in self.lookahead:
                _, h = block(h)
        return self.auxiliary(h)


def build_modules(
    backbone: Backbone, spans: Sequence[range], classes: int, objective: Objective, options: ModuleOptions
) -> tuple[LocalModule, ...]:
    """The modules that ``spans`` cut ``backbone`` into, with the heads that ``objective`` needs.

    Frozen modules (nothing in them has ``requires_grad``) before the first that is not have none: they are only passed.
    """
    modules, learns = [], False
    for span, following in zip(spans, [*spans[1:], None], strict=True):
        parts = [*(backbone.stem,) * (span.start == 0), *backbone.blocks[span.start : span.stop]]
        learns = learns or following is None or any(p.requires_grad for part in parts for p in part.parameters())
        local = following is not None and not objective.exact and learns
        if local and objective.measures_residual and not all(backbone.keeps_shape[i] for i in span):
            changing = next(i for i in span if not backbone.keeps_shape[i])
            raise ValueError(
                f"objective={objective.name!r} measures the residual of each block, and block {changing} of"
                f" {type(backbone.model).__name__} returns another shape than it reads; choose another objective."
            )
        lookahead = min(options.lookahead, len(following)) if local and following is not None else 0
        auxiliary = decoder = None
        if local:
            auxiliary = options.head(backbone.boundaries[span.stop + lookahead], classes)
            target = objective.target(span.start == 0, backbone.image, backbone.boundaries[span.start])
            if target is not None:
                source = backbone.boundaries[span.stop]
                make = DECODERS[options.decoder] if isinstance(options.decoder, str) else options.decoder
                decoder = make(source, target, options.reconstruction, options.normalize_target)
        modules.append(
            LocalModule(
                backbone,
                span,
                auxiliary=auxiliary,
                decoder=decoder,
                lookahead=lookahead,
                measure_residual=local and objective.measures_residual,
                recompute=options.recompute,
            )
        )
    return tuple(modules)
