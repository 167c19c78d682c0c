"""LocalTrainer: metrics, mixed precision, what is saved, and what is refused."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import fastlocal
from fastlocal.decoders import DECODERS
from fastlocal.objectives import OBJECTIVES

Build = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]


def weights(trainer: fastlocal.LocalTrainer) -> dict[str, Tensor]:
    state = trainer.state_dict()
    return {name: value.clone().cpu() for name, value in {**state["model"], **state["heads"]}.items()}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("modules", [2, 4, "all"])
@pytest.mark.parametrize("family", ["swin", "vit"])
@pytest.mark.parametrize("objective", ["feature", "image"])
def test_every_decoder_trains_at_any_number_of_modules(
    build: Build, batch: Batch, objective: str, family: str, modules: int | str, decoder: str
) -> None:
    count = (8 if family == "swin" else 5) if modules == "all" else modules
    trainer = fastlocal.LocalTrainer(build(family), modules=count, objective=objective, decoder=decoder)
    before = weights(trainer)
    metrics = trainer.step(*batch)
    assert metrics.loss.shape == metrics.correct.shape == metrics.regularizer.shape == (count,)
    assert (metrics.regularizer[:-1] > 0).all()
    assert metrics.regularizer[-1] == 0
    assert metrics.gradient_norm.shape == (count,)
    assert not metrics.skipped.any()
    unchanged = [name for name, value in weights(trainer).items() if torch.equal(value, before[name])]
    # With InfoPro's weights the first of several modules has classification weight 0.
    silent = ["0.auxiliary.classifier", "0.auxiliary.norm"] if objective == "image" and count != 2 else []
    assert [name for name in unchanged if not name.startswith(tuple(silent))] == []


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_learns(build: Build, batch: Batch, objective: str) -> None:
    trainer = fastlocal.LocalTrainer(
        build("swin", drop_path_rate=0.0),
        objective=objective,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3),
    )
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    batch = (
        batch[0] + 2 * torch.randn(8, 3, 1, 1, generator=generator),
        batch[1],
    )  # pooled noise is all alike; colours are not
    first = trainer.step(*batch)
    for _ in range(30):
        last = trainer.step(*batch)
    assert (last.loss[1:] < 0.5 * first.loss[1:]).all()
    assert last.loss[-1] < 0.3 * first.loss[-1]
    assert trainer.predict(batch[0])[-1].argmax(dim=1).eq(batch[1]).sum() >= 5


def test_metrics_are_means_over_the_batch(build: Build, batch: Batch) -> None:
    whole = fastlocal.LocalTrainer(build("vit"), modules=3).step(*batch)
    parts = fastlocal.LocalTrainer(build("vit"), modules=3, micro_batch=3)
    torch.testing.assert_close(parts.step(*batch).loss, whole.loss)
    model = build("vit").train()
    plain = fastlocal.LocalTrainer(copy.deepcopy(model), modules=3, objective="end-to-end").step(*batch)
    torch.testing.assert_close(plain.loss[0], F.cross_entropy(model(batch[0]), batch[1]))
    assert plain.correct[0] == (model(batch[0]).argmax(dim=1) == batch[1]).sum()


def test_uint8_images_are_normalized_part_by_part(build: Build, batch: Batch) -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    floating = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for objective in ("feature", "image", "end-to-end"):
        options: dict[str, Any] = {"objective": objective, "micro_batch": 3, "normalize": (mean, std)}
        ours = fastlocal.LocalTrainer(build("swin"), **options).step(images, batch[1])
        theirs = fastlocal.LocalTrainer(build("swin"), **options).step(floating, batch[1])
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.regularizer, theirs.regularizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mixed_precision_is_close_to_full(build: Build, batch: Batch, objective: str, dtype: torch.dtype) -> None:
    full = fastlocal.LocalTrainer(build("swin"), objective=objective)
    mixed = fastlocal.LocalTrainer(build("swin"), objective=objective, amp_dtype=dtype)
    mixed.model.load_state_dict(full.model.state_dict())
    for seed in range(3):
        torch.manual_seed(seed)  # for both alike: the same blocks are dropped
        a = full.step(*batch)
        torch.manual_seed(seed)
        b = mixed.step(*batch)
    torch.testing.assert_close(a.loss, b.loss, rtol=0.03, atol=0.03)
    assert not torch.equal(a.loss, b.loss)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())


def test_a_non_finite_gradient_skips_its_module_only(build: Build, batch: Batch) -> None:
    trainer = fastlocal.LocalTrainer(build("vit"), modules=[2, 4], amp_dtype=torch.float16, clip_grad=1.0)
    trainer.step(*batch)
    scale = trainer.scaler.get_scale()
    before = weights(trainer)
    trainer.modules[1].auxiliary.classifier.weight.register_hook(lambda gradient: gradient * float("inf"))
    metrics = trainer.step(*batch)
    assert metrics.skipped.tolist() == [False, True, False]
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("blocks.2", "blocks.3", "1.")) for name in changed)
    assert {name.split(".")[1] for name in changed if name.startswith("blocks")} == {"0", "1", "4"}
    assert trainer.scaler.get_scale() == scale / 2  # one update, once


def test_loss_scaling_updates_once_per_step(build: Build, batch: Batch) -> None:
    trainer = fastlocal.LocalTrainer(build("vit"), modules=5, amp_dtype=torch.float16)
    trainer.engine.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(3):
        trainer.step(*batch)
    assert trainer.scaler.state_dict()["_growth_tracker"] == 3


def test_no_weight_decay_keeps_its_whole_model_names(build: Build) -> None:
    decays: dict[int, float] = {}

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)
        decays.update({id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]})
        return made

    model = build("swin")
    fastlocal.LocalTrainer(model, modules=4, optimizer=optimizer)
    for name, p in model.named_parameters():
        free = p.ndim <= 1 or "relative_position_bias_table" in name
        assert decays[id(p)] == (0.0 if free else 0.05), name


def test_each_parameter_has_one_optimizer(build: Build) -> None:
    trainer = fastlocal.LocalTrainer(build("swin"), modules=4, lookahead=1)
    owned = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned))
    assert {id(p) for p in trainer.model.parameters()} <= set(owned)


def test_clipping_is_per_module(build: Build, batch: Batch) -> None:
    def lose(clip: float | None) -> list[float]:
        trainer = fastlocal.LocalTrainer(
            build("vit"), modules=2, clip_grad=clip, optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0)
        )
        before = [[p.detach().clone() for p in module.parameters()] for module in trainer.modules]
        trainer.step(*batch)
        return [
            float(torch.stack([(a - b.detach()).norm() for a, b in zip(old, module.parameters(), strict=True)]).norm())
            for old, module in zip(before, trainer.modules, strict=True)
        ]

    assert all(norm > 0.02 for norm in lose(None))
    assert lose(0.01) == pytest.approx([0.01, 0.01], rel=1e-3)


def test_moving_average_follows_the_model(build: Build, batch: Batch) -> None:
    trainer = fastlocal.LocalTrainer(build("swin"), ema_decay=0.5)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.step(*batch)  # the first update copies
    first = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.step(*batch)
    average = trainer.ema_state_dict()
    assert average is not None
    for name, value in trainer.model.state_dict().items():
        # timm's warm-up: the decay rises with the steps, 1 - (1 + step)^(-2/3)
        torch.testing.assert_close(average[name], (1 - 2 ** (-2 / 3)) * first[name] + 2 ** (-2 / 3) * value)
        assert not torch.equal(first[name], start[name]) or name.endswith("index")
    logits = trainer.predict(batch[0], ema=True)
    assert logits.shape == (1, 8, 10)
    assert not torch.equal(logits[0], trainer.predict(batch[0])[-1])


@pytest.mark.parametrize("lookahead", [1, 3])
def test_lookahead_trains_the_next_blocks_too(build: Build, batch: Batch, lookahead: int) -> None:
    trainer = fastlocal.LocalTrainer(
        build("vit"), modules=[2, 4], lookahead=lookahead, objective="cross-entropy", residency="module", micro_batch=3
    )
    assert [len(module.lookahead) for module in trainer.modules] == [min(lookahead, 2), 1, 0]
    plain = fastlocal.LocalTrainer(
        build("vit"), modules=[2, 4], lookahead=lookahead, objective="cross-entropy", micro_batch=3
    )
    plain.load_state_dict(trainer.state_dict())
    for _ in range(2):
        ours, theirs = trainer.step(*batch), plain.step(*batch)
    assert torch.equal(ours.loss, theirs.loss)
    alone = fastlocal.LocalTrainer(build("vit"), modules=[2, 4], objective="cross-entropy", micro_batch=3)
    # The first blocks of module 2 get gradient from both losses, so its gradient norm differs.
    assert alone.step(*batch).gradient_norm[1] != theirs.gradient_norm[1]
    assert trainer.predict(batch[0]).shape == (3, 8, 10)


def test_frozen_parameters_stay(build: Build, batch: Batch) -> None:
    for objective in ("feature", "end-to-end"):
        model = build("vit")
        for p in model.patch_embed.parameters():
            p.requires_grad_(False)
        for block in model.blocks[:2]:
            block.requires_grad_(False)
        model.cls_token.requires_grad_(False)
        model.pos_embed.requires_grad_(False)
        before = {name: p.detach().clone().cpu() for name, p in model.named_parameters()}
        trainer = fastlocal.LocalTrainer(model, modules=[2], objective=objective, residency="module")
        trainer.step(*batch)
        for name, p in model.named_parameters():
            assert torch.equal(p.cpu(), before[name]) == (not p.requires_grad), name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("residency", ["all", "module"])
def test_state_continues_bit_for_bit(build: Build, batch: Batch, objective: str, residency: str) -> None:
    options: dict[str, Any] = {
        "objective": objective, "amp_dtype": torch.float16, "ema_decay": 0.9, "clip_grad": 1.0, "micro_batch": 5,
    }  # fmt: skip
    straight = fastlocal.LocalTrainer(build("swin", drop_path_rate=0.0), **options)
    for _ in range(2):
        straight.step(*batch)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    for _ in range(2):
        straight.step(*batch)

    file.seek(0)
    resumed = fastlocal.LocalTrainer(build("swin", drop_path_rate=0.0, num_classes=10), residency=residency, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        resumed.step(*batch)
    assert resumed.steps == straight.steps == 4
    ours, theirs = weights(resumed), weights(straight)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    for name, value in straight.ema_state_dict().items():
        assert torch.equal(resumed.ema_state_dict()[name].cpu(), value.cpu()), name
    assert resumed.scaler.state_dict() == straight.scaler.state_dict()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"modules": 2}, "its cuts is"),
        ({"objective": "image"}, "its objective is 'feature', and this trainer's is 'image'"),
        ({"decoder": "mlp"}, "heads parameter"),
        ({"ema_decay": 0.9}, "another ema_decay"),
    ],
)
def test_a_state_of_another_training_is_refused(build: Build, options: dict, sentence: str) -> None:
    state = fastlocal.LocalTrainer(build("swin")).state_dict()
    trainer = fastlocal.LocalTrainer(build("swin"), **options)
    before = weights(trainer)
    with pytest.raises(ValueError, match=sentence):
        trainer.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_a_state_of_another_model_is_refused(build: Build) -> None:
    state = fastlocal.LocalTrainer(build("swin")).state_dict()
    with pytest.raises(ValueError, match="it is of another model"):
        fastlocal.LocalTrainer(build("swin", embed_dim=32)).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"objective": "featur"}, "objective must be one of .*; did you mean 'feature'"),
        ({"decoder": "lienar"}, "decoder must be one of .*; did you mean 'linear'"),
        ({"recompute": "all"}, "recompute must be one of none, block"),
        ({"residency": "disk"}, "residency must be one of all, optimizer, module"),
        ({"kernels": "cuda"}, "kernels must be one of auto, triton, reference"),
        ({"first_target": "labels"}, "first_target must be one of image, patch"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"lookahead": -1}, "lookahead must be at least 0"),
        ({"compile": "reduce-overheads"}, "compile must be one of .*; did you mean 'reduce-overhead'"),
        ({"compile": "reduce-overhead", "residency": "module"}, "residency must be 'all' or 'optimizer', got 'module'"),
        ({"modules": 9}, "modules must be from 1 to 8"),
        ({"amp_dtype": torch.int8}, "amp_dtype must be torch.bfloat16, torch.float16 or None"),
        ({"regularizer_weight": [1.0]}, "regularizer_weight needs one number, or one for each of the 3 local modules"),
        ({"classification_weight": [1.0] * 4}, "classification_weight needs one number"),
        ({"normalize": ((0.5,), (0.5,))}, "normalize must be"),
        ({"normalize": ((0.5,) * 3, (0.0,) * 3)}, "normalize must be"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(build: Build, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        fastlocal.LocalTrainer(build("swin"), **options)
    assert "\n" not in str(error.value)


def test_a_model_without_classes_is_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="num_classes=0"):
        fastlocal.LocalTrainer(build("vit", num_classes=0))


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (torch.rand(4, 3, 64, 64), torch.zeros(4).long(), r"images must be \[batch, 3×32×32\] for this model"),
        (torch.rand(4, 1, 32, 32), torch.zeros(4).long(), "images must be"),
        (torch.rand(0, 3, 32, 32), torch.zeros(0).long(), "images must be"),
        (torch.ones(4, 3, 32, 32).long(), torch.zeros(4).long(), "images must be floating or uint8"),
        (torch.full((4, 3, 32, 32), float("nan")), torch.zeros(4).long(), "a pixel is NaN or infinite"),
        (torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 10]), "labels must be from 0 to 9 for this model, got 10"),
        (torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, -1]), "got -1"),
        (torch.rand(4, 3, 32, 32), torch.zeros(3).long(), "labels must be 4 int64 class indices"),
        (torch.rand(4, 3, 32, 32), torch.rand(4, 9), r"labels must be \[4, 10\] probabilities"),
    ],
)
def test_bad_batches_are_refused_and_change_nothing(
    build: Build, images: Tensor, labels: Tensor, sentence: str
) -> None:
    trainer = fastlocal.LocalTrainer(build("swin"))
    before = weights(trainer)
    with pytest.raises(ValueError, match=sentence):
        trainer.step(images, labels)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_modules_compile(build: Build, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the engine must get right is what is traced; generating code for it takes minutes and is PyTorch's part.
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    options: dict[str, Any] = {"modules": [2], "recompute": "block", "micro_batch": 4}
    eager = fastlocal.LocalTrainer(build("vit", depth=3), **options)
    compiled = fastlocal.LocalTrainer(build("vit", depth=3), compile=True, **options)
    compiled.load_state_dict(eager.state_dict())
    torch.testing.assert_close(
        compiled.step(*batch).gradient_norm, eager.step(*batch).gradient_norm, rtol=1e-3, atol=1e-5
    )
    assert list(compiled.state_dict()["heads"]) == list(eager.state_dict()["heads"])


def _graphs() -> Callable[..., Any]:
    """A backend whose compiled functions keep their results as CUDA graphs do, in one pool: a forward ends their life."""
    pool: list[Tensor] = []

    def compiler(module: torch.fx.GraphModule, _: Any, *, forward: bool) -> Any:
        buffers: list[Any] = []

        def replay(*arguments: Any) -> list[Any]:
            results = module(*arguments)
            if not buffers:
                buffers.extend(r.clone() if isinstance(r, Tensor) else r for r in results)
                pool.extend(b for b in buffers if isinstance(b, Tensor) and b.is_floating_point())
            for buffer in pool if forward else ():
                buffer.fill_(float("nan"))
            for buffer, result in zip(buffers, results, strict=True):
                if isinstance(buffer, Tensor):
                    buffer.copy_(result)
            return [b.detach() if isinstance(b, Tensor) else b for b in buffers]

        return make_boxed_func(replay)

    forward = functools.partial(compiler, forward=True)
    return aot_autograd(
        fw_compiler=forward, bw_compiler=functools.partial(compiler, forward=False), inference_compiler=forward
    )


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("objective", ["feature", "end-to-end"])
def test_nothing_that_is_needed_lies_where_a_cuda_graph_writes_again(
    build: Build, batch: Batch, objective: str, micro_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, original = _graphs(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: original(self, backend=backend, fullgraph=True))
    options: dict[str, Any] = {"modules": [2, 3], "objective": objective, "micro_batch": micro_batch}
    eager = fastlocal.LocalTrainer(build("vit", depth=4), **options)
    replayed = fastlocal.LocalTrainer(build("vit", depth=4), compile="reduce-overhead", **options)
    replayed.load_state_dict(eager.state_dict())
    for _ in range(2):
        torch.testing.assert_close(replayed.step(*batch).gradient_norm, eager.step(*batch).gradient_norm)
    torch.testing.assert_close(replayed.predict(batch[0]), eager.predict(batch[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residency", ["all", "module"])
@pytest.mark.parametrize("objective", ["feature", "end-to-end"])
def test_out_of_memory_halves_the_parts_and_goes_on(
    build: Build, batch: Batch, objective: str, residency: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = fastlocal.LocalTrainer(build("vit"), modules=[2, 4], objective=objective, residency=residency)
    trainer.step(*batch)
    largest = 3

    def backward(loss: Tensor, share: float) -> None:
        if share * 8 > largest:
            raise torch.OutOfMemoryError("no memory for this many samples")
        (loss * share).backward()

    monkeypatch.setattr(trainer.engine, "backward", backward)
    with pytest.warns(UserWarning, match="out of memory with parts of") as told:
        metrics = trainer.step(*batch)
    assert len(told) == 2
    assert trainer.micro_batch == 2
    assert not metrics.skipped.any()
    assert torch.isfinite(metrics.loss).all()
    trainer.step(*batch)
    assert all(p.grad is None for p in trainer.model.parameters())
    largest = 0
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out of memory"):
        trainer.step(*batch)


def test_what_cannot_teach_is_refused(build: Build, batch: Batch) -> None:
    import timm

    small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    with pytest.raises(ValueError, match="num_classes=1, with which there is nothing to tell apart"):
        fastlocal.LocalTrainer(timm.create_model("vit_tiny_patch16_224", num_classes=1, **small), modules=1)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        fastlocal.LocalTrainer(build("vit").requires_grad_(False))
    trainer = fastlocal.LocalTrainer(build("vit"))
    images, labels = (tensor.cpu() for tensor in batch)  # what is on a card is not looked at
    one_hot = F.one_hot(labels, 10).float()
    for rows in (0 * one_hot, 2 * one_hot, -one_hot, torch.randn_like(one_hot)):
        with pytest.raises(ValueError, match="a row holds no probabilities"):
            trainer.step(images, rows)
    assert trainer.step(images, torch.full_like(one_hot, 0.1)).loss.isfinite().all()
