"""What this CPU can do."""

from __future__ import annotations

import torch


def has_bfloat16() -> bool:
    """Whether it has instructions that multiply bfloat16, such as AVX512-BF16 or AMX; without, torch emulates them."""
    return any(bool(value) for name, value in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
