"""What ``fastlocal doctor`` looks at."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator

import torch

from fastlocal.bus import Bus, host_available
from fastlocal.kernels import dispatch
from fastlocal.train.cpu import has_bfloat16

OPS = ("window_attention", "attention", "rotary_embedding", "reconstruction_loss")


def findings() -> Iterator[tuple[str, str]]:
    """Name and one line each: versions, devices, and which kernels run on each device."""
    yield "python", f"{platform.python_version()} on {platform.system()}, {os.cpu_count()} cores"
    for package in ("fastlocal", "torch", "torchvision", "timm", "triton"):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    has, without = "has units for bfloat16", "no units for bfloat16: --amp computes in float32"
    yield "cpu", has if has_bfloat16() else without
    available = host_available()
    if available is not None:
        yield "host memory", f"{available / 2**30:.1f} GiB free"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not devices:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield "GPU", f"none found ({built})"
    for device in devices:
        card = torch.cuda.get_device_properties(device)
        half = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16, no bfloat16"
        yield (
            str(device),
            f"{card.name}, {card.total_memory / 2**30:.1f} GiB, capability {card.major}.{card.minor}, {half}",
        )
        yield f"bus of {device}", _bus(device)
    for device in [*devices, torch.device("cpu")]:
        reason = dispatch.why_not_triton(device) or "Interpreted Triton runs only where it is asked for."
        runs = "Triton" if dispatch.implementation(device) == "triton" else f"PyTorch. {reason}"
        yield f"kernels on {device}", f"{', '.join(OPS)}: {runs}"


MOST_PINNED = 2**33  # bytes that are tried
COPIED = 2**28  # bytes of each copy that is timed


def _bus(device: torch.device) -> str:
    """How much host memory can be pinned, tried by doubling up to half of what is free, and how fast copies are."""
    pinned, tried = 0, COPIED
    limit = min(MOST_PINNED, (host_available() or MOST_PINNED) // 2)
    bus, host = Bus(device), torch.empty(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what cannot be pinned is warned of
        while tried <= limit:
            try:
                host = torch.empty(0)  # the smaller one goes first
                host = bus.host(tried, torch.uint8)
            except UserWarning:
                break
            pinned, tried = tried, 2 * tried
    at_least = " or more" if tried > limit else ""
    if not pinned:
        return "no host memory can be pinned: copies hide nothing behind the compute"
    host = bus.host(COPIED, torch.uint8)
    value = host.to(device)
    speeds = [_speed(device, lambda: value.copy_(host, non_blocking=True))]
    speeds.append(_speed(device, lambda: host.copy_(value, non_blocking=True)))
    to, back = (f"{speed / 1e9:.1f} GB/s" for speed in speeds)
    return f"{to} to the card, {back} back; {pinned / 2**30:.2f} GiB{at_least} of host memory can be pinned"


def _speed(device: torch.device, copy: Callable[[], object]) -> float:
    """Bytes per second of the fastest of five copies."""
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        copy()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return COPIED / min(seconds)
