"""What ``fastlocal doctor`` looks at."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch

from fastlocal.kernels import dispatch

OPS = ("window_attention", "attention", "reconstruction_loss")


def findings() -> Iterator[tuple[str, str]]:
    """Name and one line each: versions, devices, and which kernels run on each device."""
    yield "python", f"{platform.python_version()} on {platform.system()}, {os.cpu_count()} cores"
    for package in ("fastlocal", "torch", "torchvision", "timm", "triton"):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
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
    for device in [*devices, torch.device("cpu")]:
        reason = dispatch.why_not_triton(device) or "Interpreted Triton runs only where it is asked for."
        runs = "Triton" if dispatch.implementation(device) == "triton" else f"PyTorch. {reason}"
        yield f"kernels on {device}", f"{', '.join(OPS)}: {runs}"
