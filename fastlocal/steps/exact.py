"""The exact step: backpropagation, with one module's graph at a time.

    x[0] = images
    for module in modules but the last: x[next] = module(x)      # no graph; only boundaries stay
    for module in reversed(modules):
        for part of x[module]:
            run the module again, with the random numbers it drew; backward from the part's gradient
            gradient of x[module][part] → the next gradient      # the graph is gone before the next part
        update the module                                        # its gradients and state are gone before the next one

The last module needs no second run, and modules before the first that trains anything no backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlocal.boundary import Boundary
from fastlocal.engine import Engine
from fastlocal.metrics import Recorder

_GeneratorState = tuple[Tensor, Tensor | None]


@dataclass
class _Drawn:
    """The parts of a module's first run, and the state of the random generators before each of them and after the last."""

    parts: list[slice]
    states: list[_GeneratorState] = field(default_factory=list)

    @property
    def nothing(self) -> bool:
        pairs = zip(self.states[0], self.states[-1], strict=True)
        return all(before is None or after is None or torch.equal(before, after) for before, after in pairs)


class ExactStep:
    """One exact step on a batch. Arguments as for `LocalStep`."""

    def __init__(self, engine: Engine, images: Tensor, labels: Tensor, record: Recorder) -> None:
        self._engine = engine
        self._labels = labels
        self._record = record
        self._last = len(engine.modules) - 1
        self._updated: set[int] = set()
        self._entering = [engine.images(images)]
        self._restart()

    def _restart(self) -> None:
        del self._entering[1:]
        self._drawn: list[_Drawn] = []
        self._gradient: Boundary | None = None
        self._k = self._last  # the module that is backpropagated next

    def run(self) -> None:
        """Train every module; after an out-of-memory error, call it again to go on at the module that failed.

        A module that drew random numbers must repeat them in parts of the size it drew them in. If it failed with those,
        the batch is run through again; modules that had been updated keep to that.
        """
        failed = self._drawn[self._k] if self._k < self._last else None
        if failed is not None and not failed.nothing and failed.parts != self._engine.parts(len(self._labels)):
            self._restart()
        while len(self._entering) <= self._last and self._k == self._last:
            self._forward(len(self._entering) - 1)
        while self._k >= self._engine.first:
            self._backpropagate(self._k)
            self._k -= 1
        self._engine.settle(self._record)

    def _forward(self, k: int) -> None:
        """Module ``k`` without a graph: from ``entering[k]`` to ``entering[k + 1]``."""
        engine = self._engine
        batch = len(self._labels)
        drawn, output = _Drawn(engine.parts(batch)), engine.boundary(batch)
        inputs = self._entering[k].parts(drawn.parts)
        with engine.residency.on_device(k, k + 1):
            for part in drawn.parts:
                drawn.states.append(_generator_state(engine.device))
                output.write(part, engine.infer(k, next(inputs), classify=False)[0])
        drawn.states.append(_generator_state(engine.device))
        del self._drawn[k:]
        self._drawn.append(drawn)
        self._entering.append(output)

    def _backpropagate(self, k: int) -> None:
        """Gradients and update of module ``k``; the gradient of what entered it takes the place of that of its output."""
        engine = self._engine
        batch = len(self._labels)
        parts = engine.parts(batch)
        drawn = self._drawn[k] if k < self._last else None
        if drawn is not None and not (drawn.parts == parts or drawn.nothing):
            parts = drawn.parts
        repeat = drawn is not None and drawn.parts == parts
        inputs = self._entering[k].parts(parts)
        upstream = self._gradient.parts(parts) if self._gradient is not None else None
        gradient = engine.boundary(batch)
        with engine.learning(k, k - 1 if k > engine.first else None, self._record, update=k not in self._updated):
            self._record.begin(k)
            for i, part in enumerate(parts):
                x = engine.enter(k, next(inputs)).detach().requires_grad_(k > engine.first)
                if upstream is None:
                    self._backpropagate_loss(x, self._labels[part])
                else:
                    state = drawn.states[i] if drawn is not None and repeat else None
                    with _replayed(state, engine.device):
                        self._backpropagate_part(k, x, next(upstream), self._labels[part])
                if x.grad is not None:
                    gradient.write(part, x.grad)
                del x
        self._updated.add(k)
        if k > 0:
            self._entering.pop().release()
        if self._gradient is not None:
            self._gradient.release()
        self._gradient = gradient

    def _backpropagate_loss(self, x: Tensor, labels: Tensor) -> None:
        """The last module on one part: loss and backward."""
        engine, k = self._engine, self._last
        with engine.autocast():
            logits = engine.modules[k].classify(engine.modules[k](x).output)
        loss = engine.criterion(logits, labels)
        self._record.add(k, loss, logits, labels, None)
        engine.backward(loss, len(labels) / self._record.samples)

    def _backpropagate_part(self, k: int, x: Tensor, gradient: Tensor, labels: Tensor) -> None:
        """Run module ``k`` on one part again and backpropagate ``gradient``, that of its output.

        An auxiliary head, which a local objective has, learns from the output as well, and passes nothing on.
        """
        engine = self._engine
        with engine.autocast():
            output = engine.modules[k](x).output
        if output.requires_grad:
            output.backward(gradient.to(output.dtype))
        if engine.modules[k].auxiliary is not None:
            loss = engine.auxiliary_loss(k, output.detach(), labels, self._record)
            engine.backward(loss, len(labels) / self._record.samples)


def _generator_state(device: torch.device) -> _GeneratorState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _replayed(state: _GeneratorState | None, device: torch.device) -> Iterator[None]:
    """Draw the random numbers that were drawn after ``state`` again, and then go on as if nothing had happened."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
