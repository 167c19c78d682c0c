"""One shipped configuration of one Triton kernel, as data: what the compile report compiles ahead of time."""

from __future__ import annotations

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
