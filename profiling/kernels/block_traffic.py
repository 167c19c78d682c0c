"""Bytes one transformer block moves in a training step, by source: what is left worth fusing? Needs no GPU.

Everything runs on fake tensors at the real batch. Eager ops are counted as `traffic` counts them; for torch.compile,
its own scheduler says what each kernel it would generate reads and writes.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.module_tracker import ModuleTracker

from fastlocal.profiling import results
from fastlocal.profiling.kernels.traffic import CountTraffic, CudaAutocastPolicy

BATCH = 64
AUTOCAST = torch.bfloat16
EAGER, EAGER_FUSED, COMPILED, COMPILED_FUSED = "eager", "eager + fused ops", "compiled", "compiled + fused ops"
OWN = "the block itself"  # shift, windows and reverse, residual sums
VARIANTS = (EAGER, EAGER_FUSED, COMPILED, COMPILED_FUSED)


@dataclass(frozen=True)
class BlockTraffic:
    """Bytes of one block in one variant, by source: a submodule, or a kernel of torch.compile."""

    block: str
    variant: str
    forward: dict[str, int]
    backward: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.forward.values()) + sum(self.backward.values())


def _swin_block() -> tuple[nn.Module, tuple[int, ...]]:
    from timm.models.swin_transformer import SwinTransformerBlock

    block = SwinTransformerBlock(96, (56, 56), 3, window_size=7, shift_size=3, drop_path=0.1)
    return block, (BATCH, 56, 56, 96)


def _vit_block() -> tuple[nn.Module, tuple[int, ...]]:
    from timm.models.vision_transformer import Block

    block: Any = Block(768, 12, qkv_bias=True, drop_path=0.1)
    block.attn.fused_attn = False
    return block, (BATCH, 197, 768)


BLOCKS = {"Swin-T stage 1, shifted": _swin_block, "ViT-B/16": _vit_block}


def block_traffic() -> list[BlockTraffic]:
    """Every block in every variant."""
    counts = []
    for name in BLOCKS:
        for variant in VARIANTS:
            count = count_compiled if variant in (COMPILED, COMPILED_FUSED) else count_eager
            counts.append(count(name, variant))
            print(f"{name}, {variant}: {_mebi(counts[-1].total)} MiB", file=sys.stderr, flush=True)
    return counts


def _make(name: str, variant: str) -> tuple[nn.Module, tuple[int, ...]]:
    block, shape = BLOCKS[name]()
    if variant in (EAGER_FUSED, COMPILED_FUSED):
        from fastlocal.kernels import accelerate

        accelerate(block)
    return block.train(), shape


# --- Eager ------------------------------------------------------------------------------------------------------------


def count_eager(name: str, variant: str) -> BlockTraffic:
    """Count the ops of one training step under CUDA's autocast rules, by the submodule that ran them."""
    with FakeTensorMode(), CudaAutocastPolicy():
        block, shape = _make(name, variant)
        x = torch.randn(shape, requires_grad=True)
        with ModuleTracker() as tracker, torch.autocast("cpu", AUTOCAST), _CountBySource(tracker) as counter:
            out = block(x)
        forward, counter.sources = counter.sources, defaultdict(int)
        d_out = torch.randn_like(out)
        with counter:
            out.backward(d_out)
    return BlockTraffic(name, variant, dict(forward), dict(counter.sources))


class _CountBySource(CountTraffic):
    """Sums traffic by submodule; a backward op counts for the submodule whose forward made its autograd node."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.sources: dict[str, int] = defaultdict(int)
        self.source_of_node: dict[int, str] = {}  # by the number autograd gives each node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node = torch._C._current_autograd_node()
        if node is None:
            innermost = max(self.tracker.parents, key=lambda name: -1 if name == "Global" else name.count("."))
            source = innermost.partition(".")[2] or OWN
            self.source_of_node.setdefault(torch.autograd._get_sequence_nr() - 1, source)
        else:
            source = self.source_of_node.get(node._sequence_nr(), "weight gradients")
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for entry in self.entries:
            self.sources[source] += entry.traffic.every
        self.entries.clear()
        return out


# --- torch.compile ----------------------------------------------------------------------------------------------------


def count_compiled(name: str, variant: str) -> BlockTraffic:
    """Ask torch.compile's scheduler what the kernels of one training step would read and write; nothing is run.

    It plans for the CPU here, the one device at hand; which ops it fuses is decided by the same scheduler as on CUDA.
    This reaches into `torch._inductor`, which has no public way to ask.
    """
    block, shape = _make(name, variant)
    kernels: dict[bool, dict[str, int]] = {False: defaultdict(int), True: defaultdict(int)}
    compiled = torch.compile(block, backend=_planning_backend(kernels), dynamic=False)
    x = torch.empty(shape, requires_grad=True)
    with torch.autocast("cpu", AUTOCAST):
        out = compiled(x)
    out.backward(torch.empty_like(out))
    torch._dynamo.reset()
    return BlockTraffic(name, variant, forward=dict(kernels[False]), backward=dict(kernels[True]))


def _planning_backend(kernels: dict[bool, dict[str, int]]) -> Callable[..., Any]:
    """A torch.compile backend that plans kernels, adds up their bytes by source, and makes none."""
    from torch._guards import detect_fake_mode
    from torch._inductor import compile_fx as inductor
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    def plan(module: Any, inputs: Any, is_backward: bool = False, **_: Any) -> Callable[[list[Any]], list[Any]]:
        mode: Any = detect_fake_mode(inputs)
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            inductor._recursive_post_grad_passes(module, is_inference=False)
            inductor.record_original_output_strides(module)
            graph = GraphLowering(module, example_inputs=inputs, shape_env=mode.shape_env, is_backward=is_backward)
            with V.set_graph_handler(graph):
                graph.run(*inputs)
                graph._update_scheduler()
                scheduled: Any = graph.scheduler.nodes
                for kernel in scheduled:
                    origins = {origin for node in kernel.get_nodes() for origin in node.node.get_origins()}
                    source = " + ".join(sorted({_module_of(origin) for origin in origins}))
                    kernels[is_backward][source] += kernel.get_read_write_buffers_sizes()
        results = [getattr(node, "meta", {}).get("val") for node in module.graph.output_node().args[0]]

        def allocate(arguments: list[Any]) -> list[Any]:
            arguments.clear()
            return [
                torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
                if isinstance(value, Tensor)
                else value
                for value in results
            ]

        allocate._boxed_call = True  # type: ignore[attr-defined]  # torch reads it from the function
        return allocate

    compile_fx: Any = inductor.compile_fx
    return lambda module, inputs: compile_fx(module, inputs, inner_compile=plan)


def _module_of(node: Any) -> str:
    """The submodule whose forward made a node of the graph, or whose backward it is."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    paths = [path.partition("L['self'].")[2] for path, _ in stack.values()]
    return (paths[-1] if paths else "") or OWN


# --- Tables -----------------------------------------------------------------------------------------------------------


def tables(counts: list[BlockTraffic]) -> str:
    """For each block: the variants' totals, then the sources of the eager ones, largest first."""
    parts = []
    for block in dict.fromkeys(count.block for count in counts):
        variants = {count.variant: count for count in counts if count.block == block}
        eager = variants[EAGER]
        totals = [
            {
                "variant": name,
                "forward MiB": _mebi(sum(count.forward.values())),
                "backward MiB": _mebi(sum(count.backward.values())),
                "total MiB": _mebi(count.total),
                "of eager": count.total / eager.total,
            }
            for name, count in variants.items()
        ]
        sources = sorted(
            {
                source
                for count in variants.values()
                for source in count.forward
                if count.variant in (EAGER, EAGER_FUSED)
            },
            # By name where as many bytes move: the order of a set is another in every process.
            key=lambda source: (-eager.forward.get(source, 0) - eager.backward.get(source, 0), source),
        )
        rows = [
            {"source": source}
            | {
                f"{variant}, {direction}": _mebi(getattr(variants[variant], direction).get(source, 0))
                for variant in (EAGER, EAGER_FUSED)
                for direction in ("forward", "backward")
            }
            for source in sources
        ]
        parts += [
            f"**{block}**, batch {BATCH}, bfloat16 autocast, forward and backward of one block",
            results.markdown_table(totals),
            results.markdown_table(rows),
            f"The largest of what is left, {COMPILED_FUSED}:",
            results.markdown_table(_largest(variants[COMPILED_FUSED])),
        ]
    return "\n\n".join(parts)


def _largest(count: BlockTraffic, rows: int = 8) -> list[dict[str, str | int | float]]:
    found = [
        {"direction": direction, "source": source, "MiB": _mebi(size), "share": size / count.total}
        for direction in ("forward", "backward")
        for source, size in getattr(count, direction).items()
    ]
    return sorted(found, key=lambda row: -row["MiB"])[:rows]


def _mebi(size: int) -> int:
    return round(size / 2**20)
