"""What is compared: ways to train a model, ours and those that a user would think of first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

MIB = 2**20
CLASSES = 10

Family = Literal["rival", "local", "exact"]
Exact = Literal["yes", "nearly", "another model", "one block a step", "local"]


@dataclass(frozen=True)
class Method:
    """Something that a rival adds to plain training with checkpointing.

    Attributes:
        name: as the table shows it.
        exact: whether a step is one of plain training; ``"nearly"`` where only the optimizer's state is rounded.
        code: what a user writes more than for plain training, part of the comparison as much as the bytes are.
    """

    name: str
    exact: Exact
    code: str

    @property
    def lines(self) -> int:
        """Lines of user code."""
        return len(self.code.strip().splitlines())


CHECKPOINTING = "model.set_grad_checkpointing()"
ACCUMULATION = """
for part in range(0, len(images), size):
    ...  # indent the forward and the backward
    (loss * share).backward()
"""
_FSDP = """
mesh = init_device_mesh("cuda", (1,))  # after init_process_group
policy = CPUOffloadPolicy()
for block in model.blocks:
    fully_shard(block, mesh=mesh, offload_policy=policy)
fully_shard(model, mesh=mesh, offload_policy=policy)
"""
_MIXED = """
precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16)  # and mp_policy=precision in both calls
"""
_SAVED = """
with torch.autograd.graph.save_on_cpu(pin_memory=True):  # around the forward
"""

METHODS: dict[str, Method] = {
    "in-backward": Method(
        "AdamW inside the backward",
        "yes",
        """
optimizers = {p: torch.optim.AdamW([p]) for p in model.parameters()}
def step(parameter):
    optimizers[parameter].step()
    optimizers[parameter].zero_grad()
for parameter in model.parameters():
    parameter.register_post_accumulate_grad_hook(step)
""",
    ),
    "torchao": Method(
        "torchao CPUOffloadOptimizer, gradients too",
        "yes",
        "optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, offload_gradients=True)",
    ),
    "8-bit": Method("8-bit AdamW", "nearly", "optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())"),
    "lora": Method(
        "LoRA r=16, bf16 base",
        "another model",
        """
adapters = peft.LoraConfig(r=16, target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["head"])
model = peft.get_peft_model(model.bfloat16(), adapters)
""",
    ),
    "badam": Method(
        "BAdam, bf16 weights",
        "one block a step",
        """
model.bfloat16()
optimizer = BlockOptimizer(optimizer, model.named_parameters(), block_prefix_list=blocks, switch_block_every=100)
""",
    ),
    "fsdp": Method("FSDP2 CPUOffloadPolicy", "yes", _FSDP),
    "fsdp bf16": Method("FSDP2 CPUOffloadPolicy, bf16", "yes", _FSDP + _MIXED),
    "fsdp saved": Method("FSDP2 CPUOffloadPolicy, save_on_cpu", "yes", _FSDP + _SAVED),
    "fsdp bf16 saved": Method("FSDP2 CPUOffloadPolicy, bf16, save_on_cpu", "yes", _FSDP + _MIXED + _SAVED),
}


@dataclass(frozen=True)
class Setup:
    """One way to train: a line of the table.

    Attributes:
        family: ``"rival"``, an ordinary loop over the whole model; ``"local"``, LocalTrainer; ``"exact"``, LocalTrainer
            with end-to-end gradients.
        micro_batch: samples in a part; None is the whole batch.
        recompute: recompute each block in the backward (for a rival, timm's gradient checkpointing).
        tuned: what few loops do and ours does: images wait on the device as uint8 and are normalized part by part, and
            autocast keeps no copies of the weights. Otherwise all images are there in fp32, and autocast is as it is.
        boundaries, weights, prefetch: as for `LocalTrainer`.
        method: what a rival adds to this: a name in `METHODS`, or nothing.
        kernels: ours: ``"reference"``, timm's own attention, or ``"triton"``, the fused one.
    """

    family: Family
    micro_batch: int | None
    recompute: bool
    modules: int = 1
    objective: str = "end-to-end"
    decoder: str = ""
    residency: str = "all"
    tuned: bool = True
    method: str = ""
    boundaries: str = "device"
    weights: str = "full"
    prefetch: bool = True
    kernels: str = "reference"

    @property
    def name(self) -> str:
        """As the table shows it."""
        if self.method:
            return METHODS[self.method].name
        if self.family == "rival":
            parts = ["E2E", "checkpointing" * self.recompute, "accumulation" * (self.micro_batch is not None)]
            return " + ".join(filter(None, parts)) + (", tuned" if self.tuned else "")
        return f"local, {self.objective}" if self.family == "local" else "exact, one module at a time"

    @property
    def label(self) -> str:
        """The name, with what else tells it from others."""
        modules = f", K={self.modules}" if self.family != "rival" else ""
        parts = f", parts of {self.micro_batch}" if self.micro_batch is not None else ""
        host = ", boundaries on the host" if self.boundaries == "host" else ""
        low = ", low weights" if self.weights == "low" else ""
        alone = "" if self.prefetch else ", no prefetch"
        return f"{self.name}{modules}{parts}{host}{low}{alone}"

    @property
    def exact(self) -> Exact:
        """Whether a step is one of plain training."""
        return METHODS[self.method].exact if self.method else "local" if self.family == "local" else "yes"

    @property
    def lines(self) -> int:
        """Lines of user code beyond plain training's; one of ours is a call with an argument a line."""
        if self.family != "rival":
            chosen = (self.micro_batch, self.recompute, self.residency != "all", self.boundaries == "host")
            return 4 + sum(
                map(bool, (*chosen, self.weights == "low", not self.prefetch))
            )  # the call, modules, objective and amp_dtype
        accumulation = len(ACCUMULATION.strip().splitlines()) if self.micro_batch is not None else 0
        added = METHODS[self.method].lines if self.method else 0
        return added + accumulation + (len(CHECKPOINTING.splitlines()) if self.recompute else 0)


def rivals(batch_size: int, micro_batch: int, methods: Sequence[str] = tuple(METHODS)) -> list[Setup]:
    """Plain training, + checkpointing, + accumulation, + both, at ``micro_batch`` and at the smallest that helps, 1; and
    each of ``methods`` (names in `METHODS`) with checkpointing, in parts where it can add gradients up."""
    setups = [Setup("rival", None, recompute, tuned=False) for recompute in (False, True)]
    for size in sorted({min(micro_batch, batch_size), 1}, reverse=True):
        setups += [Setup("rival", size, recompute, tuned=False) for recompute in (False, True)]
        setups += [Setup("rival", size, True)]
    whole = ("in-backward", "torchao")  # neither may run between two backwards
    setups += [Setup("rival", None if name in whole else micro_batch, True, method=name) for name in methods]
    return setups + [Setup("rival", 1, True, method="fsdp") for name in methods if name == "fsdp"]


def ours(modules: Sequence[int], objectives: Sequence[str], decoders: Sequence[str], micro_batch: int) -> list[Setup]:
    """The paper's setting, then one axis at a time from 4 modules: K, residency, recompute, objective, decoder."""
    base = Setup("local", micro_batch, True, 4, "feature", "linear", "module")
    four = [count for count in modules if count == 4]
    setups = [
        replace(base, modules=count, micro_batch=None, recompute=False, residency="all")
        for count in modules
        if count in (2, 4)
    ]
    setups += [replace(base, modules=count) for count in modules]
    setups += [replace(base, family="exact", objective="end-to-end", decoder="", modules=count) for count in modules]
    leanest = [count for count in modules if count == max(modules)]
    setups += [replace(base, micro_batch=1, modules=count) for count in leanest]
    for family in (base, replace(base, family="exact", objective="end-to-end", decoder="")):
        host = [replace(family, modules=count, boundaries="host") for count in leanest]
        low = [replace(setup, weights="low") for setup in host]
        # The budget buys either larger parts, which keep a card busier, or the next weights on their way.
        smaller = [replace(setup, micro_batch=max(1, micro_batch // n)) for setup in low for n in (2, 4)]
        setups += [*host, *low, *smaller, *(replace(setup, prefetch=False) for setup in smaller)]
    if four:
        setups += [replace(base, residency=residency) for residency in ("all", "optimizer")]
        exact = replace(base, family="exact", objective="end-to-end", decoder="")
        setups += [replace(exact, residency="all")]
        fewer = max(1, micro_batch // 4)
        setups += [replace(s, residency="all", boundaries="host", micro_batch=fewer) for s in (base, exact)]
        setups += [replace(base, recompute=False)]
        setups += [
            replace(base, objective=name, decoder="linear" if name == "image" else "")
            for name in objectives
            if name != "feature"
        ]
        setups += [replace(base, decoder=name) for name in decoders if name != "linear"]
    return list(dict.fromkeys(setups))
