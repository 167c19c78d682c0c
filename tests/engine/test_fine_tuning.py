"""Fine-tuning: what is frozen costs nothing, groups have names and depths, gradients are clipped as timm clips them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.utils import dispatch_clip_grad
from torch import nn

import fastlocal
from fastlocal import memory
from fastlocal.backbones import backbone
from fastlocal.optimizers import depths, layer_decay

Build = Callable[..., nn.Module]
Batch = tuple[torch.Tensor, torch.Tensor]


def _freeze(model: nn.Module, blocks: int) -> nn.Module:
    made: Any = model
    for part in (made.patch_embed, *made.blocks[:blocks]):
        part.requires_grad_(False)
    made.cls_token.requires_grad_(False)
    made.pos_embed.requires_grad_(False)
    return model


@pytest.mark.parametrize("objective", ["feature", "end-to-end"])
@pytest.mark.parametrize("residency", ["all", "optimizer", "module"])
def test_a_frozen_prefix_is_only_run(build: Build, batch: Batch, objective: str, residency: str) -> None:
    model = _freeze(build("vit"), 3)
    trainer = fastlocal.LocalTrainer(model, modules=[1, 3, 4], objective=objective, residency=residency)
    assert trainer.engine.first == 2
    assert trainer.engine.optimizers[:2] == [None, None]
    assert not any(len(module.heads) for module in trainer.modules[:2])
    assert trainer.exit_names == (["module 3", "module 4"] if objective == "feature" else ["module 4"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    graphs = []
    for block in model.blocks[:3]:
        block.register_forward_hook(lambda _, __, output: graphs.append(output.requires_grad))
    trainer.step(*batch)
    moved = trainer.engine.bus.moved
    metrics = trainer.step(*batch)
    moved = trainer.engine.bus.moved - moved
    assert graphs == [False] * 6
    assert metrics.loss.shape == (len(trainer.exit_names),)
    assert trainer.predict(batch[0]).shape == (len(trainer.exit_names), 8, 10)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name
        assert p.grad is None
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    trained += sum(p.nbytes for module in trainer.modules for p in module.heads.parameters())
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    # Moments come and go; weights too under "module", exact steps fetching those that both passes need twice.
    again = sum(p.nbytes for p in model.blocks[3].parameters()) if objective == "end-to-end" else 0
    expected = {"all": 0, "optimizer": 4 * trained, "module": 4 * trained + 2 * trained + again + frozen}
    assert moved == pytest.approx(expected[residency], rel=0.03)  # a slab pads its parameters


@pytest.mark.parametrize("weights", ["full", "low"])
@pytest.mark.parametrize("frozen", [("patch_embed", "blocks.0", "blocks.1"), (".qkv.",)])
def test_what_is_frozen_comes_and_never_goes_back(
    build: Build, batch: Batch, weights: str, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored is what was trained: its values, two moments, and with low weights their cast; a prefix comes once."""
    model = build("vit")
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in (*frozen, "pos_embed", "cls_token")))
    trainer = fastlocal.LocalTrainer(
        model, modules=[2, 4], objective="end-to-end", residency="module", weights=weights, amp_dtype=torch.bfloat16
    )
    trainer.step(*batch)
    bus, stored = trainer.engine.bus, list[int]()
    store = bus.store
    monkeypatch.setattr(bus, "store", lambda value, host: stored.append(host.nbytes) or store(value, host))
    before = bus.moved
    trainer.step(*batch)
    linear = [layer.weight for layer in model.modules() if type(layer) in (nn.Linear, nn.Conv2d)]
    cast = {id(p) for p in linear} if weights == "low" else set()

    def size(parameters: Any) -> float:  # as they come
        return sum(p.numel() * (2 if id(p) in cast else 4) for p in parameters)

    trained = [p for p in model.parameters() if p.requires_grad]
    casts = sum(p.numel() * 2 for p in trained if id(p) in cast)
    assert sum(stored) == pytest.approx(3 * 4 * sum(p.numel() for p in trained) + casts, rel=0.03)
    if trainer.engine.first == 1:
        prefix = {id(p) for p in trainer.modules[0].parameters()}
        masters = sum(4 * p.numel() for p in trained if id(p) in cast)
        again = size(trainer.modules[1].parameters())
        fetched = size(model.parameters()) + again + 2 * 4 * sum(p.numel() for p in trained) + masters
        assert bus.moved - before - sum(stored) == pytest.approx(fetched, rel=0.05)
        assert prefix.isdisjoint(map(id, trained))


def test_only_early_blocks_are_trained(build: Build, batch: Batch) -> None:
    """Nothing in the last module learns, its classifier neither; it is run, and its loss is told."""
    for objective in ("cross-entropy", "end-to-end"):
        model: Any = build("vit").requires_grad_(False)
        model.blocks[0].requires_grad_(True)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = fastlocal.LocalTrainer(model, modules=5, objective=objective)
        assert trainer.step(*batch).loss.isfinite().all()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) != name.startswith("blocks.0."), name


def test_the_memory_of_a_frozen_prefix_is_that_of_running_it() -> None:
    def peak(frozen: int) -> dict[str, int]:
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=8)
        with memory.dry_run():
            fake = _freeze(memory.fake_copy(model), frozen) if frozen else memory.fake_copy(model)
            trainer = fastlocal.LocalTrainer(fake, modules=[2, 4, 6])
            images, labels = torch.empty(8, 3, 64, 64), torch.zeros(8, dtype=torch.int64)
            with memory.Meter(trainer.model, *(m.heads for m in trainer.modules)) as meter:
                trainer.step(images, labels)
                held = meter.live_by_kind
        return {str(kind): nbytes for kind, nbytes in held.items()} | {"peak": meter.peak}

    whole, half = peak(0), peak(6)
    assert half["optimizer"] < 0.35 * whole["optimizer"]
    assert half["peak"] < whole["peak"] - (whole["optimizer"] - half["optimizer"])


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("objective", ["feature", "end-to-end"])
def test_layer_decay_is_timms(build: Build, batch: Batch, family: str, objective: str) -> None:
    model = build(family)
    expected = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            model, 0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.7, min_scale=0.2
        )
        for p in group["params"]
    }
    seen: dict[int, tuple[float, float]] = {}
    named: dict[str, nn.Parameter] = {}

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for group in groups:
            named.update(zip(group["names"], group["params"], strict=True))
        made = torch.optim.AdamW(layer_decay(groups, 0.7, 0.2), lr=1e-3, weight_decay=0.1)
        for group in made.param_groups:
            seen.update({id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]})
        return made

    trainer = fastlocal.LocalTrainer(model, optimizer=optimizer, objective=objective, residency="optimizer")
    assert {key: value for key, value in seen.items() if key in expected} == expected
    assert {value for key, value in seen.items() if key not in expected} <= {(1.0, 0.1), (1.0, 0.0)}
    parameters = dict(model.named_parameters())
    assert all(named[name] is parameters[name] for name in parameters)
    trainer.step(*batch)
    state = trainer.state_dict()
    assert not any("names" in group for saved in state["optimizers"] for group in saved["param_groups"])
    trainer.load_state_dict(state)


def test_depths_of_a_model_that_timm_does_not_know() -> None:
    blocks = [nn.Conv2d(4, 4, 1) for _ in range(3)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    view = backbone(fastlocal.Backbone(nn.Conv2d(3, 4, 2, 2), blocks, head, (3, 8, 8), layout="NCHW"))
    assert {name.rpartition(".")[0]: depth for name, depth in depths(view).items()} == {
        "stem": 0, "blocks.0": 1, "blocks.1": 2, "blocks.2": 3, "head.2": 4,
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping_is_timms(build: Build, batch: Batch, mode: str) -> None:
    ours, theirs = build("vit"), build("vit")
    sgd = lambda groups: torch.optim.SGD(groups, lr=0.5)  # noqa: E731
    trainer = fastlocal.LocalTrainer(
        ours, modules=1, objective="end-to-end", optimizer=sgd, clip_grad=0.01, clip_mode=mode
    )
    norm = trainer.step(*batch).gradient_norm
    nn.functional.cross_entropy(theirs.train()(batch[0]), batch[1]).backward()
    torch.testing.assert_close(norm[0], nn.utils.get_total_norm([p.grad for p in theirs.parameters()]))
    dispatch_clip_grad(list(theirs.parameters())[: -2 if mode == "agc" else None], 0.01, mode=mode)
    torch.optim.SGD(theirs.parameters(), lr=0.5).step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}")


class _Adapted(nn.Module):
    """A linear layer with a low-rank update, as peft's LoRA has it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, rank, False), nn.Linear(rank, base.out_features, False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("residency", ["all", "module"])
def test_adapters_alone_are_trained(build: Build, batch: Batch, residency: str) -> None:
    model: Any = build("vit").requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv = _Adapted(block.attn.qkv)
    model.head.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fastlocal.LocalTrainer(model, modules=2, residency=residency, objective="end-to-end")
    for _ in range(2):
        trainer.step(*batch)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".up." in name or ".down." in name or name.startswith("head")}
    assert sum(len(optimizer.state) for optimizer in trainer.optimizers) == len(changed)


LORA = """
import timm, torch, fastlocal
from peft import LoraConfig, PeftModel, get_peft_model

def model():
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=10)
    return timm.create_model("vit_tiny_patch16_224", **shape)

adapted = get_peft_model(model(), LoraConfig(r=4, target_modules=["qkv", "proj"], modules_to_save=["head"]))
frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
trainer = fastlocal.LocalTrainer(adapted, modules=2, residency="module")
images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
for _ in range(2):
    assert trainer.step(images, labels).loss.isfinite().all()
assert all(torch.equal(p, frozen[name]) for name, p in adapted.named_parameters() if name in frozen)
adapted.save_pretrained("adapters")
again = PeftModel.from_pretrained(model(), "adapters").eval()
torch.testing.assert_close(again(images), trainer.predict(images)[-1], rtol=1e-4, atol=1e-5)
assert not torch.allclose(again(images), model().eval()(images), atol=1e-3)
print("the same")
"""


def test_a_peft_model_is_trained_and_its_adapters_are_exported(tmp_path: Path) -> None:
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    # In a folder of its own: transformers takes a folder ``kernels`` in the current one for the package of that name.
    (tmp_path / "lora.py").write_text(LORA)
    outcome = subprocess.run([sys.executable, "lora.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == "the same\n"


def test_only_a_module_that_is_all_frozen_may_have_a_loss_without_a_graph(build: Build, batch: Batch) -> None:
    """It is passed; a loss of the user's that lost its graph must not train nothing without a word."""
    model = build("vit")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("blocks.0."))
    trainer = fastlocal.LocalTrainer(model, modules=2, objective="cross-entropy")
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.step(*batch)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith("blocks.0.") for name in changed)

    def without_a_graph(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.detach(), labels)

    trainer = fastlocal.LocalTrainer(build("vit"), modules=2, objective="cross-entropy", loss=without_a_graph)
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer.step(*batch)
