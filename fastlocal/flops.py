"""Counts floating point operations as torch does: matrix products, convolutions and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(d_out.shape, q.shape, k.shape, v.shape)


# The CPU's flash attention, which torch's table leaves out.
_ATTENTION_ON_CPU: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
for _function in _ATTENTION_ON_CPU.values():
    _function._get_raw = True  # torch's mark of a formula that takes tensors, not shapes


def formula(op: Any) -> Callable[..., int] | None:
    """The FLOPs of a call of ``op`` (an overload packet) as a function of its arguments and ``out_val``, its result."""
    return flop_registry.get(op) or _ATTENTION_ON_CPU.get(op)


def count(run: Callable[[], object]) -> int:
    """FLOPs of the operations of ``run``, on real tensors or in a dry run."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as counter:
        run()
    return counter.get_total_flops()
