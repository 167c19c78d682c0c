"""Fused ops for training vision transformers. Needs torch (and Triton for the Triton kernels), nothing of ours."""

from fastlocal.kernels.dispatch import set_kernels, use_kernels

__all__ = ["set_kernels", "use_kernels"]
