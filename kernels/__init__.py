"""Fused ops for training vision transformers. Needs torch (and Triton for the Triton kernels), nothing of ours."""

from fastlocal.kernels.accelerate import accelerate, restore
from fastlocal.kernels.attention import attention
from fastlocal.kernels.dispatch import set_kernels, use_kernels
from fastlocal.kernels.reconstruction_loss import reconstruction_loss
from fastlocal.kernels.rotary_embedding import rotary_embedding
from fastlocal.kernels.window_attention import window_attention

__all__ = [
    "accelerate",
    "attention",
    "reconstruction_loss",
    "restore",
    "rotary_embedding",
    "set_kernels",
    "use_kernels",
    "window_attention",
]
