"""The flags of the fine-tuning kit, and timm's flags that are called otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from fastlocal.train import cli
from fastlocal.train.build import NOT_BY_MODULE, build_model, build_trainer
from fastlocal.train.config import OPTIONS, TrainConfig
from fastlocal.train.errors import UserError
from fastlocal.train.loop import _mixup
from fastlocal.train.losses import training_loss
from fastlocal.train.recipes import NAMED
from fastlocal.train.timm_flags import ANSWERS

CPU = torch.device("cpu")
VIT: dict[str, Any] = {"data": "synthetic", "model": "test_vit", "img_size": 32, "modules": 2}
TIMM = Path(__file__).with_name("timm_flags.txt").read_text().split()  # of timm 1.0's train.py


def _trainer(**options: Any) -> Any:
    config = TrainConfig.of(**{**VIT, **options})
    loss = training_loss(config, 5, range(5))
    return build_trainer(config, build_model(config, 5, (32, 32)), CPU, None, loss)


def test_every_flag_of_timms_is_ours_or_answered() -> None:
    ours = {f"--{name.replace('_', '-')}" for name in OPTIONS} | {"--config", "--resume", "--preview", "--recipe"}
    assert set(TIMM) <= ours | ANSWERS.keys()
    assert not ours & ANSWERS.keys()
    with pytest.raises(UserError, match=r"no flag --grad-accum-steps as timm's script has: it is --micro-batch"):
        cli.train(["--grad-accum-steps", "4"])


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"freeze": "patch_embed,pos_embed,cls_token,blocks.0"}, ("blocks.1", "blocks.2", "norm", "head")),
        ({"train": ["blocks.5", "head"]}, ("blocks.5", "head")),
        ({"linear_probe": True}, ("head",)),
        ({}, ("",)),
    ],
)
def test_what_is_trained(options: dict[str, Any], trained: tuple[str, ...]) -> None:
    model = build_model(TrainConfig.of(**VIT, **options), 5, (32, 32))
    named = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, wanted in named.items():
        if name.split(".")[0] in ("patch_embed", "pos_embed", "cls_token") or name.startswith("blocks.0"):
            assert wanted == (not options), name
    assert {name for name, wanted in named.items() if wanted} >= {
        name for name in named for prefix in trained if name.startswith(prefix)
    }
    if "train" in options or "linear_probe" in options:
        assert all(name.startswith(trained) for name, wanted in named.items() if wanted)


def test_a_linear_probe_learns_and_the_rest_stays() -> None:
    trainer = _trainer(linear_probe=True, lr=0.1, opt="sgd")
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.step(torch.rand(4, 3, 32, 32), torch.arange(4))
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert trainer.engine.optimizers[0] is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"freeze": "blockz.0"}, "--freeze blockz.0: the model has nothing of that name; did you mean 'blocks.0'"),
        ({"train": "headd"}, "--train headd: the model has nothing of that name; did you mean 'head'"),
        ({"train": "head", "linear_probe": True}, "exclude each other"),
        ({"opt": "adahessian"}, "adahessian cannot train one module at a time"),
        ({"opt": "lookahead_adamw"}, "keeps weights that no checkpoint holds"),
        ({"opt": "adamww"}, "not known to timm; did you mean 'adamw'"),
        ({"opt": "fusedadam"}, "--opt fusedadam cannot be made: "),
        ({"opt_kwargs": {"nesterof": True}, "opt": "sgd"}, "--opt sgd with nesterof=True cannot be made: "),
        ({"opt_kwargs": {"lr": 1.0}}, "lr is what --lr is for"),
        ({"opt_betas": "0.9,1.5"}, "--opt-betas must be below 1"),
        ({"layer_decay": 1.5}, "--layer-decay must be at most 1"),
        ({"lr": 1e-3, "lr_base": 1e-3}, "--lr and --lr-base exclude each other"),
        ({"class_weights": "1,2"}, "one number per class, 5; got 2"),
        ({"class_weights": "balanced", "bce_loss": True}, "exclude each other"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _trainer(**options)


def test_the_optimizer_is_timms() -> None:
    options = {"opt": "adamw", "opt_betas": ["0.8", "0.95"], "opt_eps": 1e-6, "opt_kwargs": ["amsgrad=true"]}
    group = _trainer(**options, layer_decay=0.5, layer_decay_min_scale=0.25).optimizers[0].param_groups[0]
    assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.8, 0.95), 1e-6, True)
    assert group["lr_scale"] == 0.25


def test_the_learning_rate_grows_with_the_batch() -> None:
    for opt, scale, factor in (("sgd", None, 2), ("adamw", None, 2**0.5), ("sgd", "sqrt", 2**0.5)):
        config = TrainConfig.of(data="cifar10", lr_base=1e-3, batch_size=512, opt=opt, lr_base_scale=scale)
        assert config.optimization.lr == pytest.approx(factor * 1e-3)  # as timm: sqrt for ada…
        assert TrainConfig.of(**config.to_dict()) == config


def test_every_optimizer_of_timms_trains_a_module_or_is_refused_by_name() -> None:
    kinds = {}
    for name in timm.optim.list_optimizers():
        kinds.setdefault(timm.optim.get_optimizer_info(name).opt_class, str(name))
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    refused, model = [], {"model_kwargs": {"depth": 2, "embed_dim": 16, "num_heads": 1}}
    for name in [*kinds.values(), "muon"]:
        if name.startswith("kron"):
            continue  # compiles for half a minute
        try:
            trainer = _trainer(opt=name, residency="optimizer" if name == "muon" else "all", **model)
        except UserError as error:
            refused.append((name, str(error)))
            continue
        for _ in range(2):
            assert trainer.step(images, labels).loss.isfinite().all(), name
    assert all(f"--opt {name} c" in sentence for name, sentence in refused)
    assert all(name in NOT_BY_MODULE or name.startswith(("fused", "bnb")) for name, _ in refused)


@pytest.mark.parametrize("soft", [False, True])
def test_losses_are_as_said(soft: bool) -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    targets = F.one_hot(labels, 3).float() * 0.8 + 0.2 / 3 if soft else labels
    base = {"data": "synthetic", "smoothing": 0.1, **({"mixup": 0.2} if soft else {})}
    smoothing = 0.0 if soft else 0.1
    bce = training_loss(TrainConfig.of(**base, bce_loss=True, bce_target_thresh=0.2), 3, labels)
    assert bce is not None
    torch.testing.assert_close(
        bce(logits, targets), BinaryCrossEntropy(smoothing, target_threshold=0.2)(logits, targets)
    )
    balanced = training_loss(TrainConfig.of(**base, class_weights="balanced"), 3, labels)
    assert balanced is not None
    weight = 6 / (3 * torch.tensor([3.0, 2.0, 1.0]))
    each = F.cross_entropy(logits, targets, weight=weight, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(balanced(logits, targets), each.mean())
    assert training_loss(TrainConfig.of(**base), 3, labels) is None


def test_weights_of_classes_do_not_depend_on_the_parts() -> None:
    images, labels = torch.rand(8, 3, 32, 32), torch.tensor([0, 0, 0, 1, 1, 2, 3, 4])
    norms, counted = [], []
    for micro_batch in (8, 3):
        config = TrainConfig.of(**VIT, class_weights="1,2,3,4,5", micro_batch=micro_batch)
        torch.manual_seed(0)
        model = build_model(config, 5, (32, 32))
        trainer = build_trainer(config, model, CPU, None, training_loss(config, 5, labels))
        metrics = trainer.step(images, labels)
        norms.append(metrics.gradient_norm)
        counted.append(metrics.correct)
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-6)
    assert torch.equal(*counted)
    with pytest.raises(ValueError, match="labels"):
        trainer.step(images, labels + 5)  # labels are classes still


def test_mixup_is_timms() -> None:
    options = {
        "mixup": 0.2,
        "mixup_prob": 0.5,
        "mixup_switch_prob": 0.3,
        "mixup_mode": "elem",
        "cutmix_minmax": "0.2,0.8",
    }
    mixup = _mixup(TrainConfig.of(data="synthetic", **options), 5)
    assert mixup is not None
    assert (mixup.mix_prob, mixup.switch_prob, mixup.mode, mixup.cutmix_minmax) == (0.5, 0.3, "elem", (0.2, 0.8))
    assert TrainConfig.of(data="synthetic", mixup_prob=0.5).without_effect(["mixup_prob"]) == {
        "mixup_prob": "--mixup-prob 0.5 would do nothing: it needs --mixup or --cutmix."
    }


@pytest.mark.parametrize("name", NAMED)
def test_recipes_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the smallest model of the family; every recipe says what came of it, how long it takes and how it is called."""
    documentation = NAMED[name].__doc__ or ""
    assert "Result" in documentation
    assert "ime:" in documentation
    assert f"fastlocal train --recipe {name}" in documentation
    configs: list[TrainConfig] = []
    monkeypatch.setattr(
        "fastlocal.train.loop.run", lambda config: configs.append(config) or type("S", (), {"exit_code": 0})
    )
    small = "scratch" in name and "224" not in name
    data = ["--data", "cifar10"] if small else ["--data", "synthetic"]
    assert cli.train(["--recipe", name, *data, "--epochs", "30"]) == 0
    assert configs[0].optimization.epochs == 30  # the flag, over the recipe
    assert configs[0].optimization.clip_grad == NAMED[name]()["clip_grad"]  # the recipe, over the data's
    for key, value in NAMED[name]().items():
        if key not in ("epochs", "model_kwargs"):
            assert configs[0].get(key) == value, key
    tiny = {"img_size": 32, "model": "test_vit"} if "vit" in name else {"img_size": 64}
    if not small:
        tiny["model_kwargs"] = {} if "vit" in name else {"embed_dim": 16, "depths": (1, 1, 1, 1), "window_size": 2}
    config = configs[0].changed(**({} if small else tiny), pretrained=False, amp=False)
    side = 32 if "vit" in name or small else 64
    model = build_model(config, 5, (side, side))
    trainer = build_trainer(config, model, CPU, None, training_loss(config, 5, range(5)))
    assert trainer.step(torch.rand(4, 3, side, side), torch.arange(4)).loss.isfinite().all()


def test_a_recipe_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[TrainConfig] = []
    monkeypatch.setattr(
        "fastlocal.train.loop.run", lambda config: configs.append(config) or type("S", (), {"exit_code": 0})
    )
    cli.train(["--recipe", "finetune-vit", "--data", "synthetic", "--lr", "1e-5", "--initial-checkpoint", "w.pt"])
    assert (configs[0].optimization.lr, configs[0].optimization.lr_base) == (1e-5, None)
    assert not configs[0].model.pretrained
    cli.train(["--recipe", "scratch-224", "--data", "synthetic", "--epochs", "10"])
    assert configs[1].optimization.warmup_epochs == 1  # its own 20 are more than there are
    with pytest.raises(UserError, match=r"--recipe finetune-vitt is not one of .* did you mean 'finetune-vit'"):
        cli.train(["--recipe", "finetune-vitt"])
