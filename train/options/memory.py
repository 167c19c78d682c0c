"""Where things live, and the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from fastlocal.train.errors import UserError
from fastlocal.train.options import values
from fastlocal.train.options.values import Options, option

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class MemoryOptions(Options):
    """Where things live, and the arithmetic."""

    budget: str | None = option(
        None,
        "memory of the card, such as 4GiB: the planner sets --modules, --micro-batch, --recompute, --residency,"
        " --boundaries and --weights",
        values.amount,
        flag="memory",
    )
    reserve: str = option(
        "512MiB", "what of --memory tensors cannot have: CUDA's context, cuBLAS, the allocator's rounding"
    )
    host_memory: str | None = option(None, "host memory that a plan may use, such as 16GiB; default: any")
    micro_batch: int | None = option(
        None, "images per part of a batch; default: the whole batch", values.whole, at_least=1
    )
    recompute: str = option("none", "what the backward pass computes again", choices=("none", "block"))
    residency: str = option(
        "all", "what of the idle modules stays on the device", choices=("all", "optimizer", "module")
    )
    boundaries: str = option(
        "device", "where what stands between two modules lives, images included", choices=("device", "host")
    )
    weights: str = option(
        "full", "with --residency module, 'low': weights arrive cast to the low precision", choices=("full", "low")
    )
    prefetch: bool = option(
        True, "with --residency module, fetch the next module's weights ahead of time, which holds both", values.switch
    )
    kernels: str = option("auto", "fused ops", choices=("auto", "triton", "reference"))
    device: str = option("auto", "torch device; auto: cuda if there is one, else cpu")
    torchcompile: bool = option(False, "compile each module with torch.compile", values.switch)
    torchcompile_mode: str | None = option(
        None, "its mode; reduce-overhead and max-autotune replay CUDA graphs", choices=COMPILE_MODES
    )
    amp: bool = option(False, "mixed precision", values.switch)
    amp_dtype: str = option(
        "auto",
        "auto: bfloat16 where the device has it, else float16, on a CPU float32",
        choices=("auto", "bfloat16", "float16"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.torchcompile_mode is not None and not self.torchcompile:
            raise UserError(f"--torchcompile-mode {self.torchcompile_mode} needs --torchcompile.")
