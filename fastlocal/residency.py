"""What of the idle modules stays on the device.

Parameters and optimizer state of an idle module can live in host memory. A module's parameters come in when its turn comes
(and the next module's are prefetched behind its compute); its optimizer state comes in a bucket at a time while the optimizer
steps, and goes out again with the updated parameters. So the device never holds more than the parameters of two modules, the
gradients of one, and two buckets of optimizer state, and each byte crosses the bus once each way per step.

On CUDA, host copies are pinned and all copies run on a stream of their own. On a CPU the same code runs with the host as a
second pool of the same memory, which is how it is tested and how memory is predicted without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from fastlocal import memory
from fastlocal.checks import check_choice
from fastlocal.module import LocalModule

Keep = Literal["all", "optimizer", "module"]

# Optimizer state moves in buckets of consecutive parameters: large enough to fill the bus, small enough not to matter.
BUCKET_BYTES = 16 * 2**20


class Residency:
    """Moves the state of ``modules`` between host and ``device``.

    Args:
        keep: ``"all"`` moves nothing; ``"optimizer"`` keeps the optimizer state of all modules on the host except while
            they step; ``"module"`` keeps the parameters there as well.
        optimizers: one per module, None for a module with nothing to train. With ``keep`` other than ``"all"`` an optimizer
            sees a bucket of parameters at a time, so it must treat each parameter on its own, as SGD, AdamW or Lion do.

    Raises:
        ValueError: ``keep`` is none of the three.
    """

    def __init__(
        self,
        modules: Sequence[LocalModule],
        optimizers: Sequence[torch.optim.Optimizer | None],
        keep: Keep,
        device: torch.device,
    ) -> None:
        check_choice("residency", keep, get_args(Keep))
        self.keep = keep
        self.device = device
        self.optimizers = optimizers
        self._needed = [[*m.parameters(), *(p for b in m.lookahead for p in b.parameters())] for m in modules]
        self._host: dict[nn.Parameter, Tensor] = {}
        self._host_state: dict[tuple[nn.Parameter, str], Tensor] = {}
        self._on_device: set[nn.Parameter] = set()
        # Separate streams, because the bus carries both directions at once.
        self._incoming: torch.cuda.Stream | None
        self._outgoing: torch.cuda.Stream | None
        self._incoming, self._outgoing = (
            (torch.cuda.Stream(device), torch.cuda.Stream(device))
            if device.type == "cuda" and keep != "all"
            else (None, None)
        )
        if keep == "module":
            for parameter in dict.fromkeys(p for needed in self._needed for p in needed):
                self._host[parameter] = self._new_host(parameter.data)
                parameter.data = self._host[parameter]

    @contextmanager
    def on_device(self, index: int, upcoming: int | None) -> Iterator[None]:
        """Hold the parameters of module ``index`` on the device in this block, and prefetch those of ``upcoming``."""
        if self.keep != "module":
            yield
            return
        self._fetch(self._needed[index])
        self._await_copies()
        if upcoming is not None:
            self._fetch(self._needed[upcoming])
        try:
            yield
        finally:
            staying = set(self._needed[upcoming]) if upcoming is not None else set()
            for parameter in self._needed[index]:
                if parameter in self._on_device and parameter not in staying:
                    self._drop(parameter)

    def step(self, index: int) -> None:
        """Step the optimizer of module ``index`` on the gradients that its parameters hold, and set those to None."""
        optimizer = self.optimizers[index]
        if optimizer is None:
            return
        if self.keep == "all":
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return
        gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        optimizer.zero_grad(set_to_none=True)
        buckets = _buckets(list(gradients))
        if buckets:
            self._fetch_state(optimizer, buckets[0])
        for current, following in zip(buckets, [*buckets[1:], []], strict=True):
            self._await_copies()
            self._fetch_state(optimizer, following)
            for parameter in current:
                parameter.grad = gradients.pop(parameter)
            optimizer.step()
            for parameter in current:
                parameter.grad = None
                self._return_state(optimizer, parameter)
                if parameter in self._on_device:
                    self._write_back(parameter)

    def exchange(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Exchange the values of parameters, none of them in use now, with those of others that are kept where they are."""
        for parameter, other in pairs:
            if parameter in self._host:
                self._host[parameter] = other.data
            parameter.data, other.data = other.data, parameter.data

    def park(self) -> None:
        """Move home whatever is on the device and need not be, after a checkpoint was loaded or a step was cut off."""
        self._await_copies()  # else a prefetch under way would write to memory that is free again
        for parameter in list(self._on_device):
            self._drop(parameter)
        for optimizer in self.optimizers if self.keep != "all" else ():
            if optimizer is not None:
                for trained in list(optimizer.state):
                    self._return_state(optimizer, cast(nn.Parameter, trained))
        self.synchronize()

    def release(self) -> None:
        """Bring everything to the device for good, so that another `Residency` may take over."""
        for parameter in list(self._host):
            if parameter not in self._on_device:
                parameter.data = self._to_device(self._host[parameter])
        self._host.clear()
        self._on_device.clear()
        for optimizer in self.optimizers:
            for state in optimizer.state.values() if optimizer is not None and self.keep != "all" else ():
                for key, value in _large(state):
                    state[key] = self._to_device(value)
        self._await_copies()

    def synchronize(self) -> None:
        """Wait until the host copies are up to date, so that the CPU may read them."""
        if self._outgoing is not None:
            self._outgoing.synchronize()

    # Parameters

    def _fetch(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter not in self._on_device:
                parameter.data = self._to_device(self._host[parameter])
                self._on_device.add(parameter)

    def _write_back(self, parameter: nn.Parameter) -> None:
        self._copy_out(parameter.data, self._host[parameter])
        self._drop(parameter)

    def _drop(self, parameter: nn.Parameter) -> None:
        parameter.data = self._host[parameter]
        self._on_device.remove(parameter)

    # Optimizer state

    def _fetch_state(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            state = optimizer.state.get(parameter, {})
            for key, value in _large(state):
                self._host_state[parameter, key] = value
                state[key] = self._to_device(value)

    def _return_state(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        state = optimizer.state.get(parameter, {})  # plain [] would make an entry
        for key, value in _large(state):
            host = self._host_state.pop((parameter, key), None)
            if host is None:
                host = self._new_host(value)
            else:
                self._copy_out(value, host)
            state[key] = host

    # Copies

    def _new_host(self, value: Tensor) -> Tensor:
        host = torch.empty_like(value, device="cpu", pin_memory=self._outgoing is not None)
        memory.on_host(host)
        host.copy_(value)
        return host

    def _to_device(self, host: Tensor) -> Tensor:
        if self._incoming is None:
            return host.clone()
        # Allocated on the compute stream, so it may be freed there at any time. The copy waits for the work queued so far,
        # which may still read what this memory held before.
        value = torch.empty_like(host, device=self.device)
        self._incoming.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._incoming):
            value.copy_(host, non_blocking=True)
        return value

    def _copy_out(self, value: Tensor, host: Tensor) -> None:
        if self._outgoing is None:
            host.copy_(value)
            return
        self._outgoing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._outgoing):
            host.copy_(value, non_blocking=True)
        value.record_stream(self._outgoing)

    def _await_copies(self) -> None:
        if self._incoming is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._incoming)


def _large(state: dict[str, object]) -> list[tuple[str, Tensor]]:
    """The tensors of an optimizer state that are worth moving; step counters stay where the optimizer put them."""
    return [(key, value) for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1]


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    size = BUCKET_BYTES
    for parameter in parameters:
        if size + parameter.nbytes > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets
