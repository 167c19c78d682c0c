"""Where a run's options come from, and what they may be."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fastlocal.train.config import GROUPS, OPTIONS, TrainConfig, to_yaml
from fastlocal.train.errors import UserError
from fastlocal.train.options import values
from fastlocal.train.options.data import ARRAYS
from fastlocal.train.options.files import read_file
from fastlocal.train.options.learning import DECODERS, OBJECTIVES
from fastlocal.train.options.memory import COMPILE_MODES
from fastlocal.train.recipes import GEOMETRY, RECIPES


def test_recipe_then_file_then_flags(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lr: 3e-4\nbatch-size: 32\nmodel_kwargs: {depths: [1, 1, 1, 1]}\n")
    config = TrainConfig.of(**{**read_file(tmp_path / "run.yaml"), "batch_size": "64"})
    assert config.data.name == "digits"
    assert config.optimization.epochs == RECIPES["digits"]["epochs"]  # the recipe
    assert config.optimization.lr == 3e-4  # the file, where YAML reads 3e-4 as a text
    assert config.optimization.batch_size == 64  # the flag
    assert config.optimization.momentum == 0.9  # the default


def test_model_kwargs_extend_the_recipe_of_its_own_model_only() -> None:
    recipe = RECIPES["cifar10"]["model_kwargs"]
    assert TrainConfig.of(data="cifar10", model_kwargs=["embed_dim=48"]).model.model_kwargs == {
        **recipe,
        "embed_dim": 48,
    }
    assert TrainConfig.of(data="cifar10", model="vit_tiny_patch16_224").model.model_kwargs == {"patch_size": 4}


def test_flag_texts_become_values() -> None:
    config = TrainConfig.of(
        modules="2,4,6",
        classification_weight="0.2,0.5,1",
        model_kwargs=["img_size=32", "depths=2,2,2,2", "norm_layer=rmsnorm"],
    )
    assert config.learning.modules == (2, 4, 6)
    assert config.learning.classification_weight == (0.2, 0.5, 1.0)
    assert config.model.model_kwargs["depths"] == (2, 2, 2, 2)
    assert config.model.model_kwargs["norm_layer"] == "rmsnorm"
    assert TrainConfig.of(modules="stages").learning.modules == "stages"
    assert TrainConfig.of(modules="3").learning.modules == 3


@pytest.mark.parametrize("data", [*ARRAYS, "folder:some/path", "hfds/cifar10"])
def test_a_written_configuration_reads_back_equal(tmp_path: Path, data: str) -> None:
    config = TrainConfig.of(data=data, modules=(1, 2), lr=1e-5, clip_grad=0.5, regularizer_weight=(0.5, 1.0))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert TrainConfig.of(**read_file(tmp_path / "config.yaml")) == config


def test_a_plain_configuration_loads_with_weights_only(tmp_path: Path) -> None:
    config = TrainConfig.of(data="cifar10")
    torch.save(config.to_dict(), tmp_path / "config.pt")
    assert TrainConfig.of(**torch.load(tmp_path / "config.pt", weights_only=True)) == config


def test_warmup_is_a_tenth_of_the_run_unless_given() -> None:
    assert TrainConfig.of(data="synthetic", epochs=20).optimization.warmup_epochs == 2.0
    assert TrainConfig.of(data="synthetic", epochs=300).optimization.warmup_epochs == 5.0
    assert TrainConfig.of(data="synthetic", epochs=20, warmup_epochs=0).optimization.warmup_epochs == 0.0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"dat": "digits"}, "unknown option 'dat'; did you mean 'data'?"),
        ({"data": "cifar"}, "did you mean 'cifar10'?"),
        ({"data": "folder:"}, "--data folder: is not one of"),
        ({"objective": "featur"}, "did you mean 'feature'?"),
        ({"decoder": "transfomer"}, "did you mean 'transformer'?"),
        ({"residency": "disk"}, "--residency disk is not one of all, optimizer, module"),
        ({"epochs": "ten"}, "--epochs must be a whole number, got 'ten'."),
        ({"epochs": 1.5}, "--epochs must be a whole number, got 1.5."),
        ({"epochs": 0}, "--epochs must be at least 1, got 0."),
        ({"lr": "-1"}, "--lr must be above 0, got -1.0."),
        ({"lr": "nan"}, "--lr must be a finite number, got 'nan'."),
        ({"drop_path": 1}, "--drop-path must be below 1, got 1.0."),
        ({"amp": "yes"}, "--amp must be true or false, got 'yes'."),
        ({"modules": "two"}, "--modules must be a number of modules, 'stages', or cut points"),
        ({"model_kwargs": ["img_size"]}, "--model-kwargs must be name=value pairs"),
        ({"batch_size": None}, "--batch-size must be a whole number, got None."),
        ({"mixup": 0.8, "batch_size": 33}, "--batch-size must be even for --mixup and --cutmix, got 33."),
        ({"epochs": 2, "warmup_epochs": 3}, "--warmup-epochs must be at most --epochs, 2; got 3.0."),
    ],
)
def test_a_wrong_value_is_told_in_one_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as mistake:
        TrainConfig.of(**given)
    assert sentence in str(mistake.value)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("- 1\n", "must hold a mapping"), ("a: [1\n", "is not valid YAML or JSON"), (None, "cannot be read")],
)
def test_a_wrong_file_is_told_in_one_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_file(tmp_path / "run.yaml")


def test_choices_are_the_engines() -> None:
    from fastlocal import decoders, engine, kernels, module, objectives, residency

    assert set(OBJECTIVES) == set(objectives.OBJECTIVES)
    assert set(DECODERS) == set(decoders.DECODERS)
    assert set(COMPILE_MODES) == set(engine.COMPILE_MODES)
    choices = {name: set(option.field.metadata["choices"]) for name, option in OPTIONS.items()}
    assert choices["kernels"] == set(kernels.dispatch.CHOICES)
    assert choices["recompute"] == set(get_args(module.Recompute))
    assert choices["residency"] == set(get_args(residency.Keep))
    assert choices["reconstruction"] == set(get_args(decoders.Kind))


@pytest.mark.parametrize(("data", "size"), [("cifar10", 32), ("fashion-mnist", 28), ("stl10", 96), ("digits", 8)])
def test_every_recipe_takes_a_step(data: str, size: int) -> None:
    from fastlocal.train.build import build_model, build_trainer

    config = TrainConfig.of(data=data)
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    trainer = build_trainer(
        config, build_model(config, 10, (size, size)), torch.device("cpu"), ((0.5,) * 3, (0.25,) * 3)
    )
    metrics = trainer.step(images, torch.tensor([3, 7]))
    assert metrics.loss.shape == (4,)
    assert metrics.loss.isfinite().all()


def test_exact_steps_come_at_the_end_or_regularly() -> None:
    last = TrainConfig.of(epochs=10, exact_epochs=2)
    assert [epoch for epoch in range(10) if last.is_exact(epoch, 7 * epoch)] == [8, 9]
    regular = TrainConfig.of(epochs=10, exact_every=3)
    assert [step for step in range(10) if regular.is_exact(0, step)] == [2, 5, 8]
    without = TrainConfig.of(epochs=10, exact_epochs=0)
    assert not any(without.is_exact(epoch, epoch) for epoch in range(10))
    for wrong, sentence in (
        ({"exact_epochs": 11}, "--exact-epochs must be at most --epochs, 10; got 11"),
        ({"exact_epochs": 1, "objective": "end-to-end"}, "end-to-end is exact throughout"),
        ({"exact_every": 2, "objective": "end-to-end"}, "end-to-end is exact throughout"),
        ({"exact_every": -1}, "--exact-every must be at least 0, got -1"),
    ):
        with pytest.raises(UserError, match=sentence):
            TrainConfig.of(epochs=10, **wrong)


def test_a_local_run_ends_with_exact_gradients_unless_told_otherwise() -> None:
    """The finish that the study chose; what cannot have one, or has asked for another, trains as it did."""
    assert [TrainConfig.of(epochs=epochs).exact_epochs for epochs in (1, 2, 3, 10, 30, 300)] == [0, 1, 1, 4, 12, 120]
    assert TrainConfig.of(epochs=30).to_dict()["exact_epochs"] == 12  # a run that goes on has the same
    assert [TrainConfig.of(epochs=30, modules=k).exact_share for k in ("stages", (2, 4))] == [0.4, 0.4]
    for without in (
        {"objective": "end-to-end"},
        {"modules": 1},
        {"linear_probe": True},
        {"exact_every": 5},
        {"parallel": "modules"},
        {"exact_epochs": 0},
    ):
        assert TrainConfig.of(epochs=30, **without).exact_epochs == 0


@pytest.mark.parametrize("weights", [{"pretrained": True}, {"initial_checkpoint": "x.safetensors"}])
def test_weights_are_trained_on_with_exact_gradients_unless_told_otherwise(weights: dict[str, Any]) -> None:
    """In the study's fine-tuning local objectives fell behind."""
    config = TrainConfig.of(data="synthetic", **weights)
    assert (config.learning.objective, config.exact_epochs) == ("end-to-end", 0)
    told = config.changed(decoder="mlp").without_effect(["decoder"])["decoder"]
    assert told.endswith(": --objective end-to-end, the default for a model with weights, has none.")
    assert TrainConfig.of(**weights, objective="feature", epochs=10).exact_epochs == 4
    with pytest.raises(UserError, match=r"use --parallel data, .* or a local objective"):
        TrainConfig.of(**weights, parallel="modules")


@pytest.mark.parametrize("data", ["digits", "cifar10", "fashion-mnist", "stl10"])
def test_a_model_made_for_large_images_is_fitted_to_small_ones(data: str) -> None:
    swin = TrainConfig.of(data=data, model="swin_tiny_patch4_window7_224")
    assert swin.model.model_kwargs == {n: v for n, v in RECIPES[data]["model_kwargs"].items() if n in GEOMETRY}
    assert TrainConfig.of(data=data, model="vit_base_patch16_224").model.model_kwargs.keys() == {"patch_size"}
    for decided in (
        {"img_size": 224},
        {"model_kwargs": {"patch_size": 1}},
        {"pretrained": True},
        {"initial_checkpoint": "x.safetensors"},
        {"data": "folder:x"},
    ):
        given = {"data": data, "model": "swin_tiny_patch4_window7_224", **decided}
        assert TrainConfig.of(**given).model.model_kwargs == decided.get("model_kwargs", {})
    chosen = TrainConfig.of(data=data, model="vit_base_patch16_224")
    assert TrainConfig.of(**chosen.to_dict()) == chosen


def test_groups_are_for_code_alone() -> None:
    given = {
        "data": "synthetic",
        "model": "test_vit",
        "memory": "1GiB",
        "opt": "lion",
        "reprob": 0.5,
        "experiment": "x",
    }
    config = TrainConfig.of(**given)
    assert (config.data.name, config.model.name, config.memory.budget) == ("synthetic", "test_vit", "1GiB")
    assert len(OPTIONS) == sum(len(fields(group)) for group in GROUPS.values())  # no name stands for two
    flat = config.to_dict()
    assert {name: flat[name] for name in given} == given
    assert list(flat) == list(OPTIONS)
    assert TrainConfig.of(**flat) == config
    other = config.changed(memory=None, opt="adamw")
    assert (other.memory.budget, other.optimization.opt, other.augmentation) == (None, "adamw", config.augmentation)


def test_what_every_option_accepts_can_be_told() -> None:
    assert all(entry.metadata["parse"] in values._ACCEPTED for _, entry in OPTIONS.values())
    with pytest.raises(UserError, match=r"must be whole numbers such as 1 or 1,3, got 'x'"):
        TrainConfig.of(rank_cuts="x")


STRANGE = [
    [],
    (),
    {},
    "",
    " ",
    [[]],
    [None],
    [""],
    {"": 1},
    {1: 2},
    {"a": []},
    True,
    b"1",
    object(),
    float("nan"),
    [float("inf")],
]
STRANGE += [10**400, -(10**5000), [10**400], "1" * 5000, "1e999", [1] * 1000, {"img_size": 10**400}, {"depths": [[[]]]}]


@pytest.mark.parametrize("name", OPTIONS)
def test_any_value_of_an_option_is_read_or_refused_in_a_sentence(name: str) -> None:
    sentences = []
    for value in STRANGE:
        try:
            TrainConfig.of(**{name: value})
        except UserError as error:
            sentences.append(str(error))
    assert [sentence for sentence in sentences if "\n" in sentence or len(sentence) > 1000] == []
