"""Counts floating point operations as torch does: matrix products, convolutions and attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def count(step: Callable[[], object]) -> int:
    """FLOPs of the operations that ``step`` runs, on real tensors or in a dry run."""
    aten = torch.ops.aten
    attention = {  # the CPU's flash attention, which torch's table leaves out
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda d_out, q, k, v, *_, **__: sdpa_backward_flop_count(d_out, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        step()
    return counter.get_total_flops()
