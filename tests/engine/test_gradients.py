"""The promises about gradients: exact where they claim to be, local where they claim to be, one graph at a time."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlocal
from fastlocal.kernels import accelerate, dispatch
from fastlocal.objectives import OBJECTIVES

Build = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]
LOCAL = [name for name in OBJECTIVES if name != "end-to-end"]
STOCHASTIC = {"drop_path_rate": 0.3, "proj_drop_rate": 0.2}


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1.0)


def gradients(model: nn.Module, batch: Batch, seed: int = 5, exact: bool = False, **options: Any) -> dict[str, Tensor]:
    """The gradients of one step, by whole-model name: with SGD at rate 1 they are what the parameters lose."""
    model = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    trainer = fastlocal.LocalTrainer(
        model, optimizer=lambda groups: torch.optim.SGD([{**g, "weight_decay": 0.0} for g in groups], lr=1.0), **options
    )
    torch.manual_seed(seed)
    trainer.step(*batch, exact=exact)
    return {name: before[name] - p.detach().to(before[name].device) for name, p in model.named_parameters()}


def backpropagated(model: nn.Module, batch: Batch, seed: int = 5) -> dict[str, Tensor]:
    model = copy.deepcopy(model).train()
    if dispatch.implementation(batch[0].device) == "triton":  # as in the trainer: fused layers draw masks of their own
        accelerate(model)
    torch.manual_seed(seed)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative error of all gradients together."""
    assert ours.keys() == theirs.keys()
    difference = sum((ours[name] - theirs[name]).double().square().sum() for name in ours)
    return float((difference / sum(theirs[name].double().square().sum() for name in theirs)) ** 0.5)


@pytest.mark.parametrize("family", ["swin", "vit"])
def test_one_module_end_to_end_is_plain_training_bit_for_bit(build: Build, family: str) -> None:
    model, plain = build(family, **STOCHASTIC), build(family, **STOCHASTIC).train()
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    images, labels = (
        torch.randn(5, 8, 3, 32, 32, generator=generator),
        torch.randint(0, 10, (5, 8), generator=generator),
    )

    trainer = fastlocal.LocalTrainer(model, modules=1, objective="end-to-end", clip_grad=1.0, kernels="reference")
    torch.manual_seed(4)
    for x, y in zip(images, labels, strict=True):
        trainer.step(x, y)

    skipped = plain.no_weight_decay()
    free = [n for n, p in plain.named_parameters() if p.ndim <= 1 or any(n.endswith(s) for s in skipped)]
    groups = [
        {"params": [p for n, p in plain.named_parameters() if n not in free]},
        {"params": [p for n, p in plain.named_parameters() if n in free], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, weight_decay=0.05)
    torch.manual_seed(4)
    for x, y in zip(images, labels, strict=True):
        loss = F.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for (name, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("modules", [2, 4])
@pytest.mark.parametrize("family", ["swin", "vit"])
def test_end_to_end_gradients_are_backpropagation(
    build: Build, batch: Batch, family: str, modules: int, recompute: str
) -> None:
    # Drop-path and dropout on: the second forward of each module must draw the first one's masks.
    model = build(family, **STOCHASTIC)
    expected = backpropagated(model, batch)
    ours = gradients(model, batch, objective="end-to-end", modules=modules, recompute=recompute)
    assert error(ours, expected) < 1e-6  # fp32 rounding of parameter minus gradient


@pytest.mark.parametrize("family", ["swin", "vit"])
def test_end_to_end_gradients_in_double_precision(build: Build, batch: Batch, family: str) -> None:
    model = build(family, **STOCHASTIC).double()
    batch = batch[0].double(), batch[1]
    expected = backpropagated(model, batch)
    for modules in (2, 4):
        assert error(gradients(model, batch, objective="end-to-end", modules=modules), expected) < 1e-9


@pytest.mark.parametrize(
    "options", [{}, {"micro_batch": 3, "recompute": "block"}, {"lookahead": 1, "residency": "module"}]
)
@pytest.mark.parametrize("objective", LOCAL)
@pytest.mark.parametrize("family", ["swin", "vit"])
def test_an_exact_step_of_a_local_objective_is_backpropagation(
    build: Build, batch: Batch, family: str, objective: str, options: dict[str, Any]
) -> None:
    model = build(family, **STOCHASTIC if "micro_batch" not in options else {"drop_path_rate": 0.0})
    ours = gradients(model, batch, exact=True, objective=objective, modules=4, **options)
    assert error(ours, backpropagated(model, batch)) < 1e-6


def test_an_exact_step_goes_on_where_local_steps_were(build: Build, batch: Batch) -> None:
    trainer = fastlocal.LocalTrainer(build("swin"), objective="feature", lookahead=1)
    local = trainer.step(*batch)
    heads = {f"{k}.{n}": v.clone() for k, m in enumerate(trainer.modules) for n, v in m.heads.state_dict().items()}
    exact = trainer.step(*batch, exact=True)
    assert local.loss.shape == exact.loss.shape == exact.correct.shape == (4,)  # early exits are measured as ever
    assert (exact.loss > 0).all()
    assert not exact.regularizer.any()
    changed = {
        name
        for k, module in enumerate(trainer.modules)
        for name, value in ((f"{k}.{n}", v) for n, v in module.heads.state_dict().items())
        if not torch.equal(value, heads[name])
    }
    assert changed == {name for name in heads if ".auxiliary." in name}  # they learn, the decoders rest
    for module, optimizer in zip(trainer.modules, trainer.optimizers, strict=True):
        steps = {p: int(state["step"]) for p, state in optimizer.state.items()}
        assert {steps[p] for p in module.blocks.parameters()} == {2}


@pytest.mark.parametrize("objective", LOCAL)
@pytest.mark.parametrize("family", ["swin", "vit"])
def test_a_module_does_not_feel_the_later_ones(build: Build, batch: Batch, family: str, objective: str) -> None:
    cuts = [2, 4]
    first = gradients(build(family), batch, objective=objective, modules=cuts)
    changed = build(family)
    with torch.no_grad():
        for name, p in changed.named_parameters():
            if name.startswith(("layers.2", "layers.3", "blocks.4", "norm", "head")):
                p.mul_(-3).add_(0.1)
    second = gradients(changed, batch, objective=objective, modules=cuts)
    early = [n for n in first if not n.startswith(("layers.2", "layers.3", "blocks.4", "norm", "head", "fc_norm"))]
    assert early
    assert any(first[name].abs().sum() > 0 for name in early)
    for name in early:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["swin", "vit"])
def test_micro_batches_give_the_gradients_of_the_batch(build: Build, batch: Batch, family: str, objective: str) -> None:
    model = build(family, drop_path_rate=0.0)
    soft = F.one_hot(batch[1], 10).float() * 0.8 + 0.02
    whole = gradients(model, (batch[0], soft), objective=objective, modules=4)
    for micro_batch in (1, 3, 8):  # 3 leaves an uneven last part
        parts = gradients(model, (batch[0], soft), objective=objective, modules=4, micro_batch=micro_batch)
        assert error(parts, whole) < 2e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["swin", "vit"])
def test_recomputation_changes_nothing(build: Build, batch: Batch, family: str, objective: str) -> None:
    model = build(family, **STOCHASTIC)
    options = {"objective": objective, "modules": [3], "micro_batch": 3}
    kept = gradients(model, batch, recompute="none", **options)
    recomputed = gradients(model, batch, recompute="block", **options)
    for name, value in kept.items():
        assert torch.equal(value, recomputed[name]), name
    # The masks do matter: another seed gives other gradients.
    assert error(gradients(model, batch, seed=6, recompute="none", **options), kept) > 1e-3


@contextmanager
def saved_tensors() -> Iterator[dict[int, int]]:
    """Bytes that autograd holds, counted live: storages are added when saved and removed when let go."""
    live: dict[int, int] = {}
    peak = {"bytes": 0}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in live:
            live[key] = storage.nbytes()
            copied = tensor.detach()
            weakref.finalize(copied, live.pop, key, None)
            peak["bytes"] = max(peak["bytes"], sum(live.values()))
            return copied
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield peak


@pytest.mark.parametrize("objective", ["feature", "end-to-end"])
def test_only_one_graph_is_alive(build: Build, batch: Batch, objective: str) -> None:
    """With K modules, as many saved bytes are alive at once as the largest module alone needs, not their sum."""
    model = build("vit", depth=8)

    def peak(modules: list[int], micro_batch: int | None = None) -> int:
        trainer = fastlocal.LocalTrainer(
            copy.deepcopy(model), modules=modules, objective=objective, micro_batch=micro_batch, optimizer=sgd
        )
        gc.collect()
        with saved_tensors() as counted:
            trainer.step(*batch)
        return counted["bytes"]

    whole, halves, quarters, eighths = peak([]), peak([4]), peak([2, 4, 6]), peak(list(range(1, 8)))
    weights = sum(p.nbytes for p in model.parameters())  # saved by reference, whatever the partition
    assert whole - weights > 1.8 * (halves - weights / 2) > 3.0 * (quarters - weights / 4)
    assert eighths < 0.2 * whole
    assert peak([], micro_batch=2) < 0.5 * whole
