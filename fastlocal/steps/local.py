"""The local step: module after module, each from a loss of its own.

x = images
for module in modules:
    for part of x:
        h = module(part); its loss; its backward     # the graph is gone before the next part
        output[part] = h, detached
    update the module                                # its gradients and state are gone before the next module
    x = output

Modules before the first that trains anything (a frozen prefix) are only run, without a graph.

Where there are several modules, each draws its masks from a stream of its own that the step's seed starts, whatever process
it is in, and whatever parts the ones before it were trained in.
"""

from __future__ import annotations

from torch import Tensor

from fastlocal.boundary import Boundary
from fastlocal.engine import Engine, random_stream
from fastlocal.metrics import Recorder


class LocalStep:
    """One local step of this process's modules on a batch.

    Args:
        images: [B, channels, H, W], floating or uint8, where the user has them.
        labels: [B] or [B, classes], on the device.
        x: what enters the first of the process's modules, [B, …], if that is not the images.
        seed: starts the modules' random streams; None leaves them the global one.

    Attributes:
        x: after `run`, what the last of the process's modules passes on.
        images: the images, as long as a module's loss needs them.
    """

    def __init__(
        self,
        engine: Engine,
        images: Tensor | None,
        labels: Tensor,
        record: Recorder,
        x: Tensor | None = None,
        seed: int | None = None,
    ) -> None:
        self._engine = engine
        self._labels = labels
        self._record = record
        self._k = engine.own.start  # the module that is trained next
        self._seed = seed
        self.images = engine.images(images) if images is not None else None
        entering = engine.images(x) if x is not None else self.images
        assert entering is not None
        self.x = entering

    def run(self) -> None:
        """Train every module; after an out-of-memory error, call it again to go on at the module that failed."""
        modules = self._engine.modules
        while self._k < self._engine.own.stop:
            with random_stream(self._seed, self._k, self._engine.device):
                output = (self._train if self._k >= self._engine.first else self._pass)(self._k)
            self._k += 1
            needed = any(module.reads_image for module in modules[self._k :])
            if self.x is not self.images or not needed:
                self.x.release()
            if not needed and self.images is not None:
                self.images.release()
                self.images = None
            self.x = output
        self._engine.settle(self._record)

    def _pass(self, k: int) -> Boundary:
        """Run module ``k``, before which and in which everything is frozen; returns what it passes on."""
        engine, batch = self._engine, len(self._labels)
        parts, output = engine.parts(batch), engine.boundary(batch)
        inputs = self.x.parts(parts)
        with engine.residency.on_device(k, engine.following(k)):
            for part in parts:
                output.write(part, engine.infer(k, next(inputs), classify=False)[0])
        return output

    def _train(self, k: int) -> Boundary:
        """Train module ``k``; returns what it passes on (nothing, if it is the last)."""
        engine, module = self._engine, self._engine.modules[k]
        batch = len(self._labels)
        parts, output = engine.parts(batch), engine.boundary(batch)
        inputs = self.x.parts(parts)
        images = self.images.parts(parts) if module.reads_image and k > 0 and self.images is not None else None
        with engine.learning(k, engine.following(k), self._record):
            self._record.begin(k)
            for part in parts:
                image = next(images) if images is not None else None
                h = self._train_part(k, next(inputs), image, self._labels[part])
                if module.head is None:
                    output.write(part, h)
                del h, image
            for parameter in module.shared:  # the loss of another module than its owner does not train it
                parameter.grad = None
        return output

    def _train_part(self, k: int, x: Tensor, image: Tensor | None, labels: Tensor) -> Tensor:
        """Forward and backward on one part; returns the detached output, and the graph is gone."""
        engine = self._engine
        x = engine.enter(k, x)
        image = x if k == 0 else engine.prepare(image) if image is not None else None
        with engine.autocast():
            features = engine.modules[k](x)
        loss = engine.local_loss(k, features, image, labels, self._record)
        # A module that is all frozen is passed. Any other loss without a graph is a mistake, and torch says so.
        if loss.requires_grad or any(p.requires_grad for p in engine.modules[k].parameters()):
            engine.backward(loss, len(labels) / self._record.samples)
        return features.output.detach()
