"""Which way to train: the fastest that fits, exact gradients before local ones, plain training before all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import torch
from torch import nn

from fastlocal import memory as dry
from fastlocal.backbones import Backbone, backbone
from fastlocal.boundary import Home
from fastlocal.finish import FINISH
from fastlocal.heads import AuxiliaryHead
from fastlocal.module import ModuleOptions, Recompute, build_modules
from fastlocal.objectives import OBJECTIVES
from fastlocal.optimizers import adamw
from fastlocal.partition import partition
from fastlocal.planner.budget import RESERVE, format_bytes, parse_bytes
from fastlocal.planner.cards import NOMINAL, Card, card_named
from fastlocal.planner.estimate import Cut, Plan
from fastlocal.planner.profile import Profile
from fastlocal.planner.rehearsal import fake_model, rehearse
from fastlocal.residency import Keep, Weights

# Exact gradients are chosen over a local objective with an exact finish, and that over one without, as long as they take no
# more than this times its time: the price of certainty about the accuracy, which local objectives may lose by points.
WORTH = 1.25
CERTAINTY = {"local": 0, "local + exact finish": 1, "exact": 2}

# An estimate is rehearsed if it is at most this much over the limit: most are that exact. Plain training, which nobody should
# do without where it fits, has a second chance.
CLOSE, CLOSE_PLAIN = 1.05, 1.15

# How many are rehearsed at most before nothing is said to fit.
REHEARSALS = 6

FITS, CHOSEN, SLOWER = "fits", "chosen", "fits, slower"


@dataclass(frozen=True)
class Candidate:
    """A line of the planner's table.

    ``verdict`` is ``"chosen"``, ``"fits, slower"``, or why it was rejected. Where ``measured`` is False the peak is an
    estimate; else it was seen in a rehearsal.
    """

    plan: Plan
    verdict: str
    measured: bool = True


@dataclass(frozen=True)
class Search:
    """What the planner found.

    Attributes:
        chosen: the best plan that fits, or None.
        budget: bytes of memory, and ``limit``: what tensors may have of it.
        candidates: the best way for each class of accuracy and number of modules, the chosen one first.
        rivals: ordinary end-to-end training for the same memory: plain, checkpointing, accumulation, both.
        smallest: the smallest peak of all candidates, in bytes.
        reserve: bytes of the budget that tensors do not get.
        card: whose speed the ranking assumes.
    """

    chosen: Plan | None
    budget: int
    candidates: tuple[Candidate, ...]
    rivals: tuple[Candidate, ...]
    smallest: int
    reserve: int
    card: Card

    @property
    def limit(self) -> int:
        """Bytes that tensors may have."""
        return self.budget - self.reserve


class DoesNotFit(ValueError):
    """No plan fits the budget; the sentence names the smallest budget that would do."""


def plan(
    model: nn.Module,
    *,
    batch_size: int,
    memory: str | int,
    image_size: int | None = None,
    objective: str | None = None,
    shrink_batch: bool = False,
    **options: Any,
) -> Plan:
    """The best plan for training ``model`` on a card with ``memory``.

    Args:
        shrink_batch: halve the batch until a plan fits.
        options, and the others: as for `search`.

    Raises:
        ValueError: an argument is not one that `search` accepts.
        DoesNotFit: nothing fits.
    """
    while True:
        found = search(
            model, batch_size=batch_size, budget=memory, image_size=image_size, objective=objective, **options
        )
        if found.chosen is not None:
            return found.chosen
        if not shrink_batch or batch_size == 1:
            least = format_bytes(found.smallest + found.reserve, up=True)
            raise DoesNotFit(
                f"memory: nothing fits {format_bytes(found.budget)} (of which {format_bytes(found.reserve)} are reserved) at"
                f" batch size {batch_size}; the smallest budget that would do is {least}."
            )
        batch_size //= 2


def search(
    model: nn.Module,
    *,
    batch_size: int,
    budget: str | int,
    image_size: int | None = None,
    objective: str | None = None,
    exact_share: float | None = None,
    reserve: str | int = RESERVE,
    host_memory: str | int | None = None,
    image_dtype: torch.dtype = torch.uint8,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Search:
    """Everything the planner knows: the chosen plan, the best other ones and why not, the rivals.

    Args:
        model: a timm model, on any device, ``meta`` too. It is not touched.
        batch_size: samples per step.
        budget: memory of the card: bytes, or a text such as ``"4GiB"`` or ``"500 MiB"``.
        image_size: side of the images in pixels, to check that the model was built for it.
        objective: the only one to plan for; None weighs exact gradients against ``"feature"``, with and without an exact
            finish.
        exact_share: of a local objective's steps, the share with exact gradients. None: none, and where ``objective`` is None
            two fifths of them (`fastlocal.finish`) as well as none.
        reserve: what of the budget tensors cannot have.
        host_memory: bytes of host memory that may be used; None is all.
        image_dtype: of the images that the training loop hands over; mixed ones (mixup) are torch.float32.
        say: called with a line about what is being done now.
        options: further arguments of `LocalTrainer` (decoder, amp_dtype, ema_decay, optimizer, device, …). ``amp_dtype`` is
            torch.bfloat16 unless given. ``device`` is where training will run: by default a CUDA card, whether there is one
            here or not.

    Raises:
        ValueError: an argument is not one of the above.
    """
    memory, kept = parse_bytes(budget), parse_bytes(reserve, "reserve", least=0)
    host = None if host_memory is None else parse_bytes(host_memory, "host_memory")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if exact_share is not None and not 0 <= exact_share <= 1:
        raise ValueError(f"exact_share must be a share from 0 to 1, got {exact_share}.")
    if exact_share is None:
        shares = [0.0, FINISH] if objective is None else [0.0]
    else:
        shares = [exact_share]
    view = backbone(model)
    if image_size is not None and (view.image.height, view.image.width) != (image_size, image_size):
        raise ValueError(
            f"image_size: the model was built for {view.image.height}×{view.image.width} images, got {image_size}."
        )
    options.setdefault("amp_dtype", torch.bfloat16)
    device = torch.device(options.get("device") or "cuda")
    foreach = device.type == "cuda"
    card = card_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else NOMINAL
    limit = memory - kept
    with dry.dry_run(device):
        ways: list[Plan] = []
        for cut, exact in _cuts(model, batch_size, objective, foreach, options, say):
            own = list(ways_to_train(cut, card, options))
            finish = list(ways_to_train(exact, card, options)) if exact is not None and any(shares) else []
            for share in shares if exact is not None else [0.0]:
                ways += [a.finished_by(b, share) for a, b in zip(own, finish, strict=True)] if share else own
        affordable = [way for way in ways if host is None or way.host <= host]

        def peak(way: Plan) -> int:
            say(f"rehearsing {way.accuracy}, {way.modules} modules, parts of {way.micro_batch}, {way.residency}")
            return rehearse(view, way, options, image_dtype, foreach)

        chosen, rehearsed = _choose(affordable, limit, peak)
    seen = {way: replace(way, peak=size) for way, size in rehearsed.items()}
    smallest = min((way.peak for way in seen.values()), default=min(way.peak for way in ways))
    return Search(
        chosen and seen[chosen],
        memory,
        tuple(_table(ways, chosen, seen, limit, host)),
        tuple(_rivals(ways, seen, limit)),
        smallest if chosen is None else min(smallest, *(way.peak for way in affordable)),
        kept,
        card,
    )


def _choose(ways: Sequence[Plan], limit: int, peak: Callable[[Plan], int]) -> tuple[Plan | None, dict[Plan, int]]:
    """The best of ``ways`` that fits when rehearsed (the leanest is the last to be tried), or None; and the rehearsed peaks."""
    rehearsed: dict[Plan, int] = {}
    off = 1.0  # how far above its estimate the last rehearsal was
    while len(rehearsed) < REHEARSALS:
        open_ways = [
            way
            for way in ways
            if way not in rehearsed
            and way.peak * off <= limit * (CLOSE_PLAIN if way.is_plain else CLOSE if off == 1 else 1)
        ]
        if not open_ways:
            break
        way = min(open_ways, key=_merit)
        rehearsed[way] = peak(way)
        if rehearsed[way] <= limit:
            return way, rehearsed
        off = max(off, rehearsed[way] / way.peak)
    leanest = min(ways, key=lambda way: way.peak, default=None)
    if leanest is not None and leanest not in rehearsed:
        rehearsed[leanest] = peak(leanest)
        if rehearsed[leanest] <= limit:
            return leanest, rehearsed
    return None, rehearsed


def _merit(way: Plan) -> tuple[bool, float, int, int]:
    """Smaller is better: plain training, then time, with a discount for exact gradients, then what is simpler."""
    return not way.is_plain, way.seconds / WORTH ** CERTAINTY[way.accuracy], way.traffic, way.peak


def _cuts(
    model: nn.Module,
    batch_size: int,
    objective: str | None,
    foreach: bool,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> Iterator[tuple[Cut, Cut | None]]:
    """The model, cut in every way worth trying, for each objective; and, for a local one, what its exact steps are."""
    copied = fake_model(model, options)
    view = backbone(copied)
    amp_dtype = options["amp_dtype"]
    profile = Profile(view, amp_dtype, say)
    made_of = module_options(options)
    states = state_share(options.get("optimizer") or adamw)
    extra = average_bytes(copied, options)
    workspaces = dry.cublas_workspaces(options.get("device") or "cuda")
    exact = OBJECTIVES["end-to-end"].name
    for name in dict.fromkeys((exact, "feature") if objective is None else (objective,)):
        if name not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}.")
        target = OBJECTIVES[name](options.get("first_target", "image"))
        for spans in _spans(view, target.exact):
            modules = build_modules(view, spans, view.logits[-1], target, made_of)
            about = (modules, batch_size, states, extra, foreach, workspaces)
            finish = None if target.exact else Cut(profile, OBJECTIVES[exact](target.first_target), *about)
            yield Cut(profile, target, *about), finish


def module_options(options: dict[str, Any]) -> ModuleOptions:
    """What of ``options``, arguments of `LocalTrainer`, local modules are made of."""
    return ModuleOptions(
        options.get("decoder", "linear"),
        options.get("head", AuxiliaryHead),
        options.get("reconstruction", "mse"),
        options.get("normalize_target", False),
        options.get("lookahead", 0),
        "none",
    )


def average_bytes(model: nn.Module, options: dict[str, Any]) -> int:
    """Bytes of the moving average of ``model``, if ``options`` ask for one."""
    return sum(p.nbytes for p in model.parameters()) if options.get("ema_decay") is not None else 0


def state_share(make: Callable[..., torch.optim.Optimizer]) -> float:
    """Bytes of state per byte of weights of the optimizer that ``make`` makes."""
    weight = nn.Parameter(torch.empty(64, 64, device="cpu"))
    weight.grad = torch.empty_like(weight)
    optimizer = make([{"params": [weight], "names": ["weight"], "depths": [0], "deepest": 0}])
    optimizer.step()
    held = optimizer.state[weight].values()
    return sum(value.nbytes for value in held if isinstance(value, torch.Tensor) and value.numel() > 1) / weight.nbytes


def _spans(view: Backbone, exact: bool) -> list[tuple[range, ...]]:
    """The cuts worth trying: into 1 (only for exact gradients), 2, 4, … modules of like cost, up to one per block.

    An exact step runs all modules but the last twice, so there the last may also be half or three quarters of the blocks.
    """
    blocks = len(view.blocks)
    counts = {k for k in (2, 4, 8, 16, 32, 64) if k < blocks} | {blocks} | ({1} if exact else set())
    found = [partition(view, count) for count in sorted(counts)]
    for share in (1 / 2, 3 / 4) if exact else ():
        before = round(blocks * (1 - share))
        for count in (1, 2, 4):
            if count <= before < blocks:
                starts = [round(before * i / count) for i in range(1, count + 1)]
                found.append(partition(view, starts))
    return list(dict.fromkeys(found))


def ways_to_train(cut: Cut, card: Card, options: dict[str, Any]) -> Iterator[Plan]:
    """All ways to train ``cut``."""
    sizes = [cut.batch_size]
    while sizes[-1] > 1 and not cut.needs_whole_batch:  # BatchNorm needs the batch whole
        sizes.append(-(-sizes[-1] // 2))
    kinds = map(get_args, (Recompute, Keep, Home, Weights))
    for recompute, residency, boundaries, weights, prefetch in product(*kinds, (True, False)):
        if weights == "low" and (residency != "module" or options["amp_dtype"] is None):
            continue
        if not cut.cuts and boundaries == "host":
            continue
        if not prefetch and (residency != "module" or not cut.cuts):
            continue  # there is nothing to fetch
        if recompute == "block" and len(cut.cuts) + 1 == len(cut.profile.blocks):
            continue  # a module's last block is never recomputed
        for size in sizes:
            yield cut.plan(size, recompute, residency, boundaries, weights, prefetch, card)


def _table(
    ways: Sequence[Plan], chosen: Plan | None, seen: dict[Plan, Plan], limit: int, host: int | None
) -> Iterator[Candidate]:
    """The chosen plan, what was rehearsed in vain, and the best that fits for each class of accuracy and number of modules."""
    if chosen is not None:
        yield Candidate(seen[chosen], CHOSEN)
    shown = {(chosen.accuracy, chosen.modules)} if chosen is not None else set()
    groups: dict[tuple[str, int], list[Plan]] = {}
    for way in ways:
        groups.setdefault((way.accuracy, way.modules), []).append(way)
    others = []
    for key, group in groups.items():
        fitting = [w for w in group if w not in seen and w.peak <= limit and (host is None or w.host <= host)]
        if key in shown:
            continue
        if fitting:
            others.append(Candidate(min(fitting, key=_merit), SLOWER, measured=False))
        else:
            least = min(group, key=lambda w: w.peak)
            reason = (
                f"over by {format_bytes(least.peak - limit)}" if least.peak > limit else "needs too much host memory"
            )
            others.append(Candidate(seen.get(least, least), reason, measured=least in seen))
    yield from sorted(
        others, key=lambda c: (c.verdict != SLOWER, _merit(c.plan) if c.verdict == SLOWER else c.plan.peak)
    )


def _rivals(ways: Sequence[Plan], seen: dict[Plan, Plan], limit: int) -> Iterator[Candidate]:
    """Plain training, checkpointing, accumulation and both, with the largest parts that fit."""
    ordinary = [way for way in ways if way.accuracy == "exact" and not way.cuts and way.residency == "all"]
    for recompute in get_args(Recompute):
        for accumulates in (False, True):
            sized = [
                seen.get(way, way)
                for way in ordinary
                if way.recompute == recompute and (way.micro_batch < way.batch_size) == accumulates
            ]
            if not sized:
                continue
            fitting = [way for way in sized if way.peak <= limit]
            way = max(fitting, key=lambda w: w.micro_batch) if fitting else min(sized, key=lambda w: w.peak)
            verdict = FITS if fitting else f"over by {format_bytes(way.peak - limit)}"
            yield Candidate(way, verdict, measured=way in seen.values())
