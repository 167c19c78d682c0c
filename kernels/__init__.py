"""Fused ops for training vision transformers. Needs torch (and Triton for the Triton kernels), nothing of ours."""

from fastlocal.kernels.attention import attention
from fastlocal.kernels.dispatch import set_kernels, use_kernels
from fastlocal.kernels.reconstruction_loss import reconstruction_loss

__all__ = ["attention", "reconstruction_loss", "set_kernels", "use_kernels"]
