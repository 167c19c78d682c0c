"""The memory, the compute and the bus traffic of a step, added up from the costs of its parts, for any way to train.

Good enough to rank by and to know what to rehearse; what is said of the chosen plan comes from the rehearsal.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fastlocal.boundary import Home
from fastlocal.hosted import SLICE
from fastlocal.module import LocalModule, Recompute
from fastlocal.objectives import Objective
from fastlocal.planner.cards import USED, Card
from fastlocal.planner.profile import Cost, Profile
from fastlocal.residency import Keep, Weights

Accuracy = Literal["exact", "local + exact finish", "local"]


@dataclass(frozen=True)
class Plan:
    """A way to train, and what it needs.

    Attributes:
        objective: as for `LocalTrainer`.
        cuts: index of the first block of the second, third, … module; empty for one module.
        batch_size: samples per step.
        micro_batch: samples per part.
        recompute, residency, boundaries, weights, prefetch: as for `LocalTrainer`.
        peak: bytes of tensors on the device at the peak of a step, and of cuBLAS's workspaces.
        host: bytes of weights, optimizer states and boundaries in host memory.
        compute: FLOPs of a step, as a multiple of a plain end-to-end step's.
        traffic: bytes that cross the host bus per step, both ways together.
        seconds: the estimate that candidates are ranked by; not a promise.
        exact_share: of a local objective's steps, the share that are `LocalTrainer.step` with ``exact=True``, at the end of
            training. Then ``peak`` and ``host`` are those of the kind of step that needs more, ``compute``, ``traffic`` and
            ``seconds`` the mean of all steps.
    """

    objective: str
    cuts: tuple[int, ...]
    batch_size: int
    micro_batch: int
    recompute: Recompute
    residency: Keep
    boundaries: Home
    weights: Weights
    prefetch: bool
    peak: int
    host: int
    compute: float
    traffic: int
    seconds: float
    exact_share: float = 0.0

    @property
    def modules(self) -> int:
        """The number of modules, K."""
        return len(self.cuts) + 1

    @property
    def accuracy(self) -> Accuracy:
        """Whether gradients are those of backpropagation, of each module's own loss, or first of that and then exact."""
        if self.objective == "end-to-end":
            return "exact"
        return "local + exact finish" if self.exact_share else "local"

    @property
    def is_plain(self) -> bool:
        """Whether this is plain training: one module, one part, nothing recomputed or moved."""
        one = self.accuracy == "exact" and not self.cuts and self.micro_batch == self.batch_size
        return one and (self.recompute, self.residency, self.boundaries) == ("none", "all", "device")

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that make a `LocalTrainer` follow this plan."""
        return {
            "objective": self.objective,
            "modules": list(self.cuts),
            "micro_batch": self.micro_batch,
            "recompute": self.recompute,
            "residency": self.residency,
            "boundaries": self.boundaries,
            "weights": self.weights,
            "prefetch": self.prefetch,
        }

    def finished_by(self, exact: Plan, share: float) -> Plan:
        """This plan of a local objective with ``share`` of its steps as in ``exact``, the plan of its exact steps."""

        def mean(name: str) -> float:
            return (1 - share) * getattr(self, name) + share * getattr(exact, name)

        return replace(
            self,
            peak=max(self.peak, exact.peak),
            host=max(self.host, exact.host),
            compute=mean("compute"),
            traffic=round(mean("traffic")),
            seconds=mean("seconds"),
            exact_share=share,
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for a run's configuration."""
        return {**asdict(self), "cuts": list(self.cuts)}


class Cut:
    """The parts of a model, cut into ``modules``, and what a step over them costs.

    Args:
        modules: consecutive ones; all of the model's, or those that one of several devices has.
        states: bytes of optimizer state per byte of trained weights.
        extra: bytes on the device whatever the plan (a moving average, say), or on the host with residency="module".
        foreach: whether the optimizer steps on all parameters at once, with temporaries as large as they are.
        buffers: bytes on the device whatever the plan: cuBLAS's workspaces; messages to and from other devices, what enters
            the first module and images among them if that is not the model's first.
        passes_images: whether a module on a later device reads the images.
    """

    def __init__(
        self,
        profile: Profile,
        objective: Objective,
        modules: Sequence[LocalModule],
        batch_size: int,
        states: float,
        extra: int,
        foreach: bool,
        buffers: int = 0,
        passes_images: bool = False,
    ) -> None:
        self.needs_whole_batch = any(module.batch_norms for module in modules)
        self.profile, self.objective, self.batch_size = profile, objective, batch_size
        self.spans = [module.span for module in modules]
        self.states, self.extra, self.foreach, self.buffers = states, extra, foreach, buffers
        self.reads_image = [module.reads_image for module in modules]
        self._passes_images = passes_images
        self.measures_residual = [module.measure_residual for module in modules]
        self._heads = [profile.heads(module, objective) if module.heads else None for module in modules]
        self.parts = [self._parts(k) for k in range(len(modules))]
        # The same for many ways to train.
        self._graphs, self._standings = functools.cache(self._graph), functools.cache(self._standing)

    @property
    def cuts(self) -> tuple[int, ...]:
        """First blocks of all modules but the first."""
        return tuple(span.start for span in self.spans[1:])

    def _parts(self, k: int) -> list[Cost]:
        """Stem, blocks and heads of module ``k``."""
        span = self.spans[k]
        heads = self.profile.head if self._is_last(k) else self._heads[k]
        blocks = [self.profile.blocks[i] for i in span]
        return [*([self.profile.stem] if span.start == 0 else []), *blocks, *([heads] if heads is not None else [])]

    def plan(
        self,
        micro_batch: int,
        recompute: Recompute,
        residency: Keep,
        boundaries: Home,
        weights: Weights,
        prefetch: bool,
        card: Card,
    ) -> Plan:
        """The way to train with these options, its needs and cost estimated."""
        traffic = self._traffic(residency, boundaries, weights)
        waited = 0 if prefetch else self._fetched(residency, weights)
        flops, plain = self._flops(recompute), self._plain
        launched = -(-self.batch_size // micro_batch) * len(self.profile.blocks) * flops / plain
        saved = sum(part.saved.per_sample for parts in self.parts for part in parts) * self.batch_size
        # Kernels that only move memory touch what autograd saves some six times; the optimizer reads and writes all state.
        moved = 6 * saved * flops / plain + (3 + 2 * self.states) * sum(self._owned)
        computing = flops * self.batch_size / (USED * card.flops) + moved / card.bandwidth
        return Plan(
            objective=self.objective.name,
            cuts=self.cuts,
            batch_size=self.batch_size,
            micro_batch=micro_batch,
            recompute=recompute,
            residency=residency,
            boundaries=boundaries,
            weights=weights,
            prefetch=prefetch,
            peak=round(self._peak(micro_batch, recompute, residency, boundaries, weights, prefetch)),
            host=round(self._host(residency, boundaries, weights)),
            compute=flops / plain,
            traffic=round(traffic),
            # The card, the bus and the processor that launches kernels work side by side, so the slowest counts, and a
            # tenth of what bus and processor take, each way of the bus by itself, is taken to be waited for; weights that
            # are not prefetched are waited for whole.
            seconds=max(computing, traffic / 2 / card.bus, launched * card.launching)
            + (0.05 * traffic + waited) / card.bus
            + 0.1 * launched * card.launching,
        )

    def _fetched(self, residency: Keep, weights: Weights) -> float:
        """Bytes of weights that come to the device: each module's once, with exact gradients twice, but for the last and those
        that are only run."""
        if residency != "module":
            return 0.0
        sizes = [own - c / 2 * (weights == "low") for own, c in zip(self._owned, self._castable, strict=True)]
        return sum(sizes) + (sum(sizes[self._first : -1]) if self.objective.exact else 0)

    # Memory

    @functools.cached_property
    def _castable(self) -> list[int]:
        return [sum(part.castable for part in parts) for parts in self.parts]

    @functools.cached_property
    def _owned(self) -> list[int]:
        return [sum(part.weights for part in parts) for parts in self.parts]

    @functools.cached_property
    def _trained(self) -> list[int]:
        return [sum(part.trained for part in parts) for parts in self.parts]

    @functools.cached_property
    def _first(self) -> int:
        """The first module that trains anything; those before it are only run."""
        return next((k for k, trained in enumerate(self._trained) if trained), len(self.parts) - 1)

    def _is_last(self, k: int) -> bool:
        """Whether module ``k`` is the model's last."""
        return self.spans[k].stop == len(self.profile.blocks)

    def _boundary(self, k: int) -> int:
        """Bytes of a sample of what enters module ``k``."""
        start = self.spans[k].start
        return self.profile.boundary(start) if start else self.profile.image

    def _peak(
        self,
        micro_batch: int,
        recompute: Recompute,
        residency: Keep,
        boundaries: Home,
        weights: Weights,
        prefetch: bool,
    ) -> float:
        modules = range(len(self.parts))
        held: list[float] = list(self._owned)
        if weights == "low":
            held = [own - castable / 2 for own, castable in zip(held, self._castable, strict=True)]
        everything: float = self.buffers + (self.extra if residency != "module" else 0)
        everything += {"all": sum(self._owned) + self.states * sum(self._trained), "optimizer": sum(self._owned)}.get(
            residency, 0
        )
        peak = 0.0
        for k in modules:
            computing = self._graphs(k, micro_batch, recompute, weights)
            temporaries = self._trained[k] if self.foreach else max(part.trained for part in self.parts[k]) / 4
            if residency != "all":  # two slices of the states and of the master, and temporaries of one
                temporaries = min(4 * SLICE, self._trained[k] / 2) * (2 * self.states + 1 + 2 * (weights == "low"))
            neighbour = (k - 1 if self.objective.exact and k else k + 1) if len(modules) > 1 else k
            here = held[k] + (held[neighbour] if prefetch and neighbour != k and neighbour < len(held) else 0)
            here = here if residency == "module" else 0
            standing = self._standings(k, micro_batch, boundaries)
            peak = max(peak, everything + here + self._trained[k] + max(computing, temporaries) + standing)
        return peak

    def _graph(self, k: int, micro_batch: int, recompute: Recompute, weights: Weights) -> float:
        """Bytes of what autograd saves for module ``k`` on one part, and of the work on it."""
        span, parts = self.spans[k], self.parts[k]
        saved = [part.saved.at(micro_batch) - (part.castable / 2 if weights == "low" else 0) for part in parts]
        work = max(part.work.at(micro_batch) for part in parts)
        if k < self._first:
            return self.profile.boundary(span.stop) * micro_batch * 2 + work
        outputs = sum(self.profile.boundary(i + 1) for i in span) * micro_batch
        if recompute == "block" and not self.measures_residual[k]:
            inputs = outputs + self.profile.boundary(span.start) * micro_batch
            return inputs + max(saved) + work
        return sum(saved) + self.profile.boundary(span.stop) * micro_batch * 2 + work

    def _standing(self, k: int, micro_batch: int, boundaries: Home) -> float:
        """Bytes of the boundaries that are on the device while module ``k`` learns."""
        received = self.spans[0].start > 0  # then what enters the first module, and the images, lie in a buffer
        entering = 0 if received and k == 0 else self._boundary(k)
        following = 0 if self._is_last(k) else self.profile.boundary(self.spans[k].stop)
        if boundaries == "host":
            return micro_batch * (2 * entering + 2 * following)
        if not self.objective.exact:
            read = self._passes_images or any(self.reads_image[k:])
            images = self.profile.image if k and read and not received else 0
            return self.batch_size * (images + entering + following)
        alive = sum(self._boundary(i) for i in range(k + 1))
        return self.batch_size * (alive + following + (entering if k else 0))

    def _host(self, residency: Keep, boundaries: Home, weights: Weights) -> float:
        total = 0.0 if residency == "all" else self.states * sum(self._trained)
        if residency == "module":
            total += sum(self._owned) + self.extra
            if weights == "low":
                total += sum(self._castable) / 2
        if boundaries == "host":
            standing = [self._boundary(k) for k in range(len(self.spans))]
            total += self.batch_size * (sum(standing) + max(standing) if self.objective.exact else 3 * max(standing))
        return total

    # Cost

    @functools.cached_property
    def _plain(self) -> float:
        parts = (self.profile.stem, *self.profile.blocks, self.profile.head)
        return sum(part.forward for part in parts) + _backward(parts)

    def _flops(self, recompute: Recompute) -> float:
        """FLOPs per sample."""
        total = sum(part.forward for parts in self.parts for part in parts)
        learns = enumerate(self.parts[self._first :])
        total += sum(_backward(parts, entered=self.objective.exact and k > 0) for k, parts in learns)
        learning = self.spans[self._first :]
        if self.objective.exact:  # one more forward of those but the last, without what a local objective adds to them
            again = [self.profile.blocks[i] for span in learning[:-1] for i in span]
            total += sum(part.forward for part in again)
            total += self.profile.stem.forward if again and learning[0].start == 0 else 0.0
        if recompute == "block":
            total += sum(self.profile.blocks[i].forward for span in learning for i in span[:-1])
        return total

    def _traffic(self, residency: Keep, boundaries: Home, weights: Weights) -> float:
        """Bytes over the bus, both ways together."""
        total = 0.0 if residency == "all" else 2 * self.states * sum(self._trained)
        if residency == "module":
            total += self._fetched(residency, weights) + sum(self._trained)
            if weights == "low":  # the fp32 master comes for the update, and the cast goes back with it
                total += 1.5 * sum(part.recast for parts in self.parts for part in parts)
        if boundaries == "host":
            standing = sum(self._boundary(k) for k in range(1, len(self.spans)))
            crossings = 5 if self.objective.exact else 2
            total += self.batch_size * (crossings * standing + self.profile.image * (1 + self.objective.exact))
        return total


def _backward(parts: Sequence[Cost], entered: bool = False) -> float:
    """FLOPs per sample of the backward through ``parts``: to the first that is trained, or to what ``entered`` them."""
    first = 0 if entered else next((i for i, part in enumerate(parts) if part.trained), len(parts))
    return sum(part.backward for part in parts[first:])
