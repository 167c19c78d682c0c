"""Copies between host and device: the one mechanism by which weights, optimizer states and boundaries move.

        host memory, pinned           device memory
        weights ────────────────────▶ a module's weights             `Residency.on_device`
        weights, states ────────────▶ a slice of both, stepped ──┐   `Residency.step`
                        ◀────────────────────────────────────────┘
        boundaries ─────────────────▶ one part ──▶ module ──┐        `Boundary.parts`
                   ◀────────────────────────────────────────┘        `Boundary.write`

On CUDA the two directions have a stream each, because the bus carries both at once; the compute stream waits for what it
asked for, and nothing else waits. On a CPU the same code runs with the host as a second pool of the same memory, which is
how it is tested, and how memory and bus traffic are predicted without a GPU.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from pathlib import Path

import torch
from torch import Tensor

from fastlocal import memory


class Bus:
    """Moves tensors between host memory and ``device``.

    Attributes:
        moved: bytes that have crossed so far, both ways together.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moved = 0
        card = device.type == "cuda"
        self._incoming = torch.cuda.Stream(device) if card else None
        self._outgoing = torch.cuda.Stream(device) if card else None
        self._idle: list[Tensor] = []

    def host(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Uninitialized host memory [elements], pinned if the device is a card and the system allows it.

        Memory is pinned where it lies: torch's own pinned allocations round each request up to a power of two.
        """
        value = memory.on_host(torch.empty(elements, dtype=dtype, device="cpu"))
        if self._incoming is not None and elements and not memory.is_dry_run():
            self._pin(value)
        return value

    def borrow(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Host memory for a while, taken from what `give_back` returned if something there is large enough."""
        elements = shape.numel()
        nbytes = elements * dtype.itemsize
        fitting = [buffer for buffer in self._idle if buffer.nbytes >= nbytes]
        if fitting:
            buffer = min(fitting, key=lambda one: one.nbytes)
            self._idle = [one for one in self._idle if one is not buffer]
        else:
            buffer = self.host(nbytes, torch.uint8)
        return buffer[:nbytes].view(dtype).view(shape)

    def give_back(self, value: Tensor) -> None:
        """Let `borrow` hand out the memory of ``value`` again."""
        self._idle.append(torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage()))

    def fetch(self, host: Tensor) -> Tensor:
        """A copy of ``host`` on the device, on its way; `arrive` before it is used."""
        self.moved += host.nbytes
        if self._incoming is None:
            return host.clone()
        # Allocated on the compute stream, so it may be freed there at any time. The copy waits for the work queued so far,
        # which may still read what this memory held before.
        value = torch.empty_like(host, device=self.device)
        self._incoming.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._incoming):
            value.copy_(host, non_blocking=True)
        return value

    def arrive(self) -> None:
        """Whatever is computed from here on waits for all that was fetched."""
        if self._incoming is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._incoming)

    def store(self, value: Tensor, host: Tensor) -> None:
        """Copy ``value``, once it is computed, to ``host``; `settle` or `synchronize` before that is read."""
        self.moved += host.nbytes
        if self._outgoing is None:
            host.copy_(value)
            return
        self._outgoing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._outgoing):
            host.copy_(value, non_blocking=True)
        value.record_stream(self._outgoing)

    def settle(self) -> None:
        """Whatever is fetched from here on waits for all that was stored."""
        if self._incoming is not None and self._outgoing is not None:
            self._incoming.wait_stream(self._outgoing)

    def synchronize(self) -> None:
        """Wait until all that was stored is there, so that the CPU may read it."""
        if self._outgoing is not None:
            self._outgoing.synchronize()

    def _pin(self, value: Tensor) -> None:
        runtime = torch.cuda.cudart()
        address = value.data_ptr()
        failed = int(runtime.cudaHostRegister(address, value.nbytes, 0)) != 0
        if failed:
            with contextlib.suppress(RuntimeError):  # the error stays until something reports it: let this be the one
                torch.zeros(1, device=self.device)
            warnings.warn(
                f"{value.nbytes / 2**20:.0f} MiB of host memory could not be pinned (some systems, WSL2 among them, allow"
                " little): copies from and to it are slower and hide nothing.",
                stacklevel=2,
            )
        else:
            weakref.finalize(value.untyped_storage(), runtime.cudaHostUnregister, address)


def host_available() -> int | None:
    """Bytes of host memory that can be had without swapping, as Linux says; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
