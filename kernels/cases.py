"""One shipped configuration of one Triton kernel, as data: what the compile report compiles ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class CompileCase:
    """Everything ``triton.compile(ASTSource(...))`` needs to build what a launcher would launch.

    Every pointer is 16-byte aligned, as torch allocates it; integer arguments are not specialized.
    """

    name: str  # unique, e.g. "window_attention forward, 3 heads of 32, window 7x7, shifted, bfloat16"
    kernel: Any  # the @triton.jit function
    signature: Mapping[str, str]  # argument -> "*bf16", "i32", "fp32"; constexpr arguments are absent
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    dtype: torch.dtype  # of the tensors the kernel reads
    has_dot: bool  # needs tensor cores, so compute capability 8.0


# Triton's functions of these names take microseconds a call on the host, and an op calls a dozen.


def cdiv(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not less than ``number``, which is positive."""
    return 1 << (number - 1).bit_length()


WIDE_WARP = 64  # lanes of a wavefront on AMD's CDNA; every other card has 32


def narrower(num_warps: int, lanes: int) -> int:
    """Warps of a block, chosen for 32 lanes, on a card with ``lanes``: 4 wide ones have 512 registers a lane, 8 have
    256, and the kernels would spill."""
    return min(num_warps, 4) if lanes == WIDE_WARP else num_warps


@functools.cache
def _lanes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


# A product and a sum are one operation, rounded once: Triton's default up to 3.9, which says that it will not be from 3.10 on.
FUSION = {"enable_fp_fusion": True}


def launch_options(device: torch.device, num_warps: int, num_stages: int) -> dict[str, Any]:
    """What to launch a kernel with on ``device``, for warps of 32 lanes."""
    return {"num_warps": narrower(num_warps, _lanes(device)), "num_stages": num_stages, **FUSION}
