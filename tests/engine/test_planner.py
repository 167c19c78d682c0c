"""The planner predicts what the meter measures, prefers what is exact, and says why."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fastlocal
from fastlocal import memory
from fastlocal.backbones import backbone
from fastlocal.flops import count
from fastlocal.objectives import OBJECTIVES
from fastlocal.partition import partition
from fastlocal.planner import DoesNotFit, Plan, format_bytes, parse_bytes, search
from fastlocal.planner.cards import CARDS, NOMINAL, card_named
from fastlocal.planner.profile import Profile
from fastlocal.planner.rehearsal import rehearse
from fastlocal.planner.search import _merit

Build = Callable[..., nn.Module]
MIB = 2**20


@pytest.fixture(autouse=True)
def _no_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are smaller than cuBLAS's workspaces."""
    monkeypatch.setattr(memory, "cublas_workspaces", lambda device: 0)


def measured(model: nn.Module, batch_size: int, arguments: dict[str, Any], exact: bool = False) -> memory.Meter:
    """The meter of a whole step, the second one, when optimizer states exist. For use inside a dry run."""
    model = memory.fake_copy(model)
    trainer = fastlocal.LocalTrainer(model, amp_dtype=torch.bfloat16, **arguments)
    images = torch.empty(batch_size, 3, 32, 32, dtype=torch.uint8)
    labels = torch.empty(batch_size, dtype=torch.int64)
    trainer.step(images[:1], labels[:1])
    given = [model, *(m.heads for m in trainer.modules), *trainer.optimizers]
    given += [trainer.ema.module] if trainer.ema is not None else []
    with memory.Meter(*given, images, labels) as meter:
        trainer.step(images, labels, exact=exact)
    return meter


def drawn(draw: random.Random, model: nn.Module) -> Plan:
    """A random way to train ``model``; its figures are not set."""
    view, batch_size = backbone(model), draw.choice([6, 16])
    spans = partition(view, draw.randint(2, len(view.blocks)))
    residency = draw.choice(["all", "optimizer", "module"])
    return Plan(
        objective=draw.choice(list(OBJECTIVES)),
        cuts=tuple(span.start for span in spans[1:]),
        batch_size=batch_size,
        micro_batch=-(-batch_size // draw.choice([1, 2, 3, 4])),
        recompute=draw.choice(["none", "block"]),
        residency=residency,  # type: ignore[arg-type]
        boundaries=draw.choice(["device", "host"]),
        weights=draw.choice(["full", "low"]) if residency == "module" else "full",
        prefetch=draw.choice([True, False]) if residency == "module" else True,
        peak=0,
        host=0,
        compute=0.0,
        traffic=0,
        seconds=0.0,
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(3))
def test_predictions_are_the_meters_over_random_plans(build: Build, seed: int) -> None:
    """Random plans: within 3 % of the measured peak, never under it by more than 1 %."""
    draw = random.Random(seed)
    families = [
        build("swin", depths=(1, 1, 1), embed_dim=32, num_heads=(1, 2, 4)),
        *[build("vit", depth=7, patch_size=8, embed_dim=64)] * 4,
    ]
    models = [draw.choice(families) for _ in range(5)]
    plans = [drawn(draw, model) for model in models]
    views = [backbone(model) for model in models]
    with memory.dry_run():
        for model, view, plan in zip(models, views, plans, strict=True):
            options = {"ema_decay": draw.choice([None, None, 0.9])}
            predicted = rehearse(view, plan, {"amp_dtype": torch.bfloat16, **options}, torch.uint8, foreach=False)
            actual = measured(model, plan.batch_size, {**plan.arguments(), **options}).peak
            assert 0.99 * actual <= predicted <= 1.03 * actual, (type(model).__name__, plan, options, predicted, actual)


@pytest.mark.parametrize("frozen", [0, 2])
def test_estimated_compute_and_traffic_are_those_of_the_step(build: Build, frozen: int) -> None:
    model: Any = build("vit", depth=4, patch_size=8, embed_dim=64)
    if frozen:
        model.requires_grad_(False)
        model.blocks[frozen:].requires_grad_(True)
        model.head.requires_grad_(True)
    found = {}
    for objective in ("end-to-end", "feature"):
        ways = search(model, batch_size=4, budget="1GiB", reserve=0, objective=objective).candidates
        found.update({(way.plan.objective, way.plan.modules): way.plan for way in ways})
    assert {modules for _, modules in found} == {1, 2, 3, 4}
    with memory.dry_run():
        plain = flops_of(model, {"modules": 1, "objective": "end-to-end"})
        for plan in found.values():
            assert plan.compute == pytest.approx(flops_of(model, plan.arguments()) / plain, rel=0.03), plan
            assert plan.traffic == pytest.approx(measured(model, 4, plan.arguments()).traffic, rel=0.1), plan


def flops_of(model: nn.Module, arguments: dict[str, Any], exact: bool = False) -> int:
    trainer = fastlocal.LocalTrainer(memory.fake_copy(model), amp_dtype=torch.bfloat16, **arguments)
    images, labels = torch.empty(4, 3, 32, 32, dtype=torch.uint8), torch.empty(4, dtype=torch.int64)
    return count(lambda: trainer.step(images, labels, exact=exact))


def test_a_cpus_attention_is_counted(build: Build) -> None:
    """Of a block with 17 tokens of 64 channels: four projections, two products of attention and two layers, and 2.5 times
    the attention and twice the rest in the backward. torch's own table has no entry for the CPU's attention."""
    projections, attention = 2 * 17 * (4 + 2 * 4) * 64 * 64, 2 * 2 * 17 * 17 * 64
    model = build("vit", depth=1, patch_size=8, embed_dim=64)
    with memory.dry_run():
        (block,) = Profile(backbone(memory.fake_copy(model)), None, say=lambda _: None).blocks
    assert (block.forward, block.backward) == (projections + attention, 2 * projections + 2.5 * attention)
    assert count(lambda: model.blocks(torch.randn(3, 17, 64))) == 3 * (projections + attention)


def test_an_exact_finish_takes_what_its_two_kinds_of_step_take(build: Build) -> None:
    """The memory of the one that takes more, and the mean of their compute and traffic."""
    model = build("vit", depth=4, patch_size=8, embed_dim=64)
    view = backbone(model)
    ways = search(model, batch_size=4, budget="1GiB", reserve=0, objective="feature", exact_share=0.25).candidates
    assert {way.plan.modules for way in ways} == {2, 4}
    assert {way.plan.accuracy for way in ways} == {"local + exact finish"}
    with memory.dry_run():
        plain = flops_of(model, {"modules": 1, "objective": "end-to-end"})
        for boundaries in ("device", "host"):
            for plan in (replace(way.plan, residency="module", boundaries=boundaries) for way in ways):
                steps = [measured(model, 4, plan.arguments(), exact) for exact in (False, True)]
                peak = max(step.peak for step in steps)
                predicted = rehearse(view, plan, {"amp_dtype": torch.bfloat16}, torch.uint8, foreach=False)
                assert 0.99 * peak <= predicted <= 1.03 * peak, (plan, [step.peak for step in steps])
        for plan in (way.plan for way in ways):
            local, exact = (flops_of(model, plan.arguments(), exact) / plain for exact in (False, True))
            assert plan.compute == pytest.approx(0.75 * local + 0.25 * exact, rel=0.03), plan


def test_local_gradients_are_chosen_with_an_exact_finish(small: nn.Module) -> None:
    """A class of accuracy gives way to the next only where that is a quarter faster."""
    exact = Plan("end-to-end", (), 8, 4, "none", "all", "device", "full", True, 1, 0, 1.3, 0, 1.0)
    local = replace(exact, objective="feature", cuts=(1,), seconds=0.7)
    finish = local.finished_by(exact, 0.2)
    assert min([local, exact, finish], key=_merit) is finish
    assert min([local, finish, replace(exact, seconds=0.85)], key=_merit).accuracy == "exact"
    found = search(small, batch_size=8, budget="1GiB", objective="feature")
    assert {way.plan.accuracy for way in found.candidates} == {"local"}  # asked for by name, it is not another's
    with pytest.raises(ValueError, match="exact_share must be a share from 0 to 1, got 2"):
        search(small, batch_size=8, budget="1GiB", exact_share=2)


@pytest.fixture
def small(build: Build) -> nn.Module:
    return build("vit", depth=2, embed_dim=64)


def test_plain_training_is_chosen_where_it_fits(small: nn.Module) -> None:
    said: list[str] = []
    found = search(small, batch_size=4, budget="1GiB", say=said.append)
    assert found.chosen is not None
    assert found.chosen.is_plain
    assert (found.chosen.compute, found.chosen.traffic) == (pytest.approx(1.0), 0)
    assert found.chosen.accuracy == "exact"
    assert any("rehearsing" in line for line in said)
    assert fastlocal.plan(small, batch_size=4, memory="1GiB", image_size=32) == found.chosen
    assert fastlocal.plan(small, batch_size=4, memory="1GiB", objective="feature").accuracy == "local"


def test_exact_gradients_come_before_local_ones_and_the_plan_trains(small: nn.Module) -> None:
    plain = fastlocal.plan(small, batch_size=8, memory="1GiB", reserve=0)
    found = search(small, batch_size=8, budget=int(0.7 * plain.peak), reserve=0)
    assert found.chosen is not None
    assert found.chosen.peak <= found.limit < plain.peak
    assert found.chosen.accuracy == "exact"
    assert found.candidates[0].plan == found.chosen
    assert found.candidates[0].measured
    assert {c.plan.accuracy for c in found.candidates} == {"exact", "local + exact finish", "local"}
    assert {c.plan.recompute for c in found.rivals} == {"none", "block"}
    trainer = fastlocal.LocalTrainer(small, amp_dtype=torch.bfloat16, **found.chosen.arguments())
    assert trainer.step(torch.randn(8, 3, 32, 32), torch.arange(8)).loss.isfinite().all()
    plain_values = found.chosen.to_dict()
    assert Plan(**{**plain_values, "cuts": tuple(plain_values["cuts"])}) == found.chosen


def test_the_reserve_is_not_for_tensors(small: nn.Module) -> None:
    peak = fastlocal.plan(small, batch_size=8, memory="1GiB").peak
    assert fastlocal.plan(small, batch_size=8, memory=peak + 512 * MIB).is_plain
    assert not fastlocal.plan(small, batch_size=8, memory=peak + 512 * MIB - 1).is_plain


def test_host_memory_is_a_budget_too(small: nn.Module) -> None:
    tight = {"batch_size": 8, "memory": 3 * MIB // 2, "reserve": 0}
    assert fastlocal.plan(small, **tight).host > 0
    with pytest.raises(DoesNotFit):
        fastlocal.plan(small, **tight, host_memory="1KiB")


def test_what_the_optimizer_and_the_average_take_is_rehearsed(small: nn.Module) -> None:
    weights = sum(p.nbytes for p in small.parameters())
    view = backbone(small)
    with memory.dry_run():
        plain = Plan("end-to-end", (), 1, 1, "none", "all", "device", "full", True, 0, 0, 1.0, 0, 0.0)
        options: dict[str, Any] = {"amp_dtype": torch.bfloat16}
        alone = rehearse(view, plain, options, torch.uint8, foreach=False)
        at_once = rehearse(view, plain, options, torch.uint8, foreach=True)  # CUDA's default
        averaged = rehearse(view, plain, {**options, "ema_decay": 0.99}, torch.uint8, foreach=False)
        mixed = rehearse(view, replace(plain, batch_size=64, micro_batch=1), options, torch.float32, foreach=False)
        whole = rehearse(view, replace(plain, batch_size=64, micro_batch=1), options, torch.uint8, foreach=False)
    assert at_once >= alone + 0.5 * weights
    assert averaged >= alone + 0.99 * weights
    assert mixed >= whole + 0.95 * 64 * 3 * 32 * 32 * 3  # four bytes for one


def test_when_nothing_fits_the_smallest_budget_is_named_and_works(small: nn.Module) -> None:
    with pytest.raises(DoesNotFit, match=r"nothing fits 0\.10 MiB .* at batch size 4; the smallest budget") as error:
        fastlocal.plan(small, batch_size=4, memory=MIB // 10, reserve=0)
    smallest = " ".join(str(error.value).rstrip(".").split()[-2:])
    plan = fastlocal.plan(small, batch_size=8, memory=smallest, shrink_batch=True, reserve=0)
    assert plan.batch_size <= 8
    assert plan.peak <= parse_bytes(smallest)
    assert plan.residency != "all"
    assert plan.traffic > 0


def test_cards_are_known_by_the_longest_name() -> None:
    assert card_named("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    assert card_named("NVIDIA A100-SXM4-80GB").name == "A100"
    assert card_named("Abacus") is NOMINAL
    assert all(card.flops > card.bandwidth > card.bus for card in CARDS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4GiB", 4 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("500 MiB", 500 * MIB),
        (12, 12),
        ("7B", 7),
        ("1.5MiB", 3 * 2**19),
    ],
)
def test_sizes(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "four", "4 TiB", "-1GiB", "0", "0GiB", "1.2.3GiB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="memory must be a positive size such as 4GiB or 500MiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["4", "1.5", " 8 "])
def test_a_size_without_unit_is_asked_about(text: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean {text.strip()}GiB\?"):
        parse_bytes(text)


def test_format() -> None:
    assert [format_bytes(v) for v in (5 * 2**30, 20 * MIB, 1234 * MIB)] == ["5.00 GiB", "20.0 MiB", "1.21 GiB"]
    assert format_bytes(5 * 2**30 + 1, up=True) == "5.01 GiB"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0, "memory": "1GiB"}, "batch_size must be at least 1"),
        ({"batch_size": 4, "memory": "1GiB", "image_size": 224}, "built for 32×32 images, got 224"),
        ({"batch_size": 4, "memory": "lots"}, "memory must be a positive size"),
    ],
)
def test_bad_arguments(build: Build, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fastlocal.plan(build("vit"), **options)


def test_a_plan_for_a_card_follows_the_autocast_of_cuda(build: Build) -> None:
    """Whichever is planned first: what the softmax of an attention that is not fused gives is float32 there."""
    model = build("vit", depth=3, patch_size=4, embed_dim=32)
    for block in model.blocks:
        block.attn.fused_attn = False
    options: dict[str, Any] = {"batch_size": 8, "memory": "1GiB", "objective": "end-to-end", "kernels": "reference"}
    options["optimizer"] = functools.partial(torch.optim.AdamW, foreach=False)  # the device is the only difference
    peaks = [fastlocal.plan(model, **options, device=device).peak for device in ("cpu", "cuda", "cpu")]
    view = backbone(model)
    probabilities = 4 * 8 * model.blocks[0].attn.num_heads * view.boundaries[0].shape[0] ** 2
    assert peaks[0] == peaks[2] <= peaks[1] - 3 * probabilities


def test_the_workspaces_of_cublas_are_in_every_peak(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is rehearsed and of what is estimated."""
    without = search(small, batch_size=4, budget="1GiB")
    monkeypatch.setattr(memory, "cublas_workspaces", lambda device: 10 * MIB)
    found = search(small, batch_size=4, budget="1GiB")
    for before, now in zip((*without.candidates, *without.rivals), (*found.candidates, *found.rivals), strict=True):
        assert now.plan == replace(before.plan, peak=before.plan.peak + 10 * MIB)
