"""stem → blocks → head reproduces the model's own forward bit for bit, and trains, for every name that is served."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from engine.smaller import SMALL_VIT, smaller
from torch import Tensor, nn

import fastlocal
from fastlocal.backbones import Backbone, backbone

# What every name of timm's with attention came to when it was last built; made by `make families`.
with Path(__file__).with_name("families.csv").open(newline="") as file:
    FAMILIES = list(csv.DictReader(file))

# Beside the names: options that none of them has.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {**SMALL_VIT, "drop_path_rate": 0.2, "proj_drop_rate": 0.1}),
    ("eva02_tiny_patch14_224", {**SMALL_VIT, "drop_path_rate": 0.2}),
    ("deit3_small_patch16_224", {**SMALL_VIT, "drop_path_rate": 0.2}),
]
# Added to a whole row of scores, which softmax takes out again: its gradient is rounding.
UNSEEN = "rel_pos.mlp.fc2.bias"


def build(name: str, **options: Any) -> tuple[nn.Module, Backbone]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options)
    return model, backbone(model, options.get("img_size"))


CASES = [
    pytest.param(partial(smaller, row["name"], row["class"]), id=row["name"]) for row in FAMILIES if not row["refused"]
]
CASES += [pytest.param(partial(build, name, **options), id=f"{name}, with options") for name, options in VARIANTS]


def assert_parity(model: nn.Module, view: Backbone, call: Any = None) -> None:
    images = torch.randn(2, *view.image.shape)
    for training in (True, False):
        model.train(training)
        state = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            torch.manual_seed(1)
            expected = (call or model)(images)
            model.load_state_dict(state)
            torch.manual_seed(1)
            x = view.stem(images)
            for geometry, block in zip(view.boundaries, view.blocks, strict=False):
                assert tuple(x.shape[1:]) == geometry.shape
                assert geometry.to_grid(x).shape[1:] == (geometry.height, geometry.width, geometry.channels)
                _, x = block(x)
            assert tuple(x.shape[1:]) == view.boundaries[-1].shape
            assert torch.equal(view.head(x), expected)
        model.load_state_dict(state)
    owned = [id(p) for part in (view.stem, *view.blocks, view.head) for p in part.parameters()]
    assert len(owned) == len(set(owned))
    read = {id(p) for p in view.model.parameters()} & set(owned)
    unread = [name for name, p in view.model.named_parameters() if id(p) not in read]
    assert all("mask_token" in name or "vision_model.head" in name for name in unread), unread  # of pretraining


def step(view: Backbone, batch: tuple[Tensor, Tensor], **options: Any) -> dict[str, Tensor]:
    """What one step of SGD at rate 1 takes off each parameter: its gradient."""
    before = {name: p.detach().clone() for name, p in view.model.named_parameters()}
    trainer = fastlocal.LocalTrainer(
        view, optimizer=lambda groups: torch.optim.SGD([{**g, "weight_decay": 0.0} for g in groups], lr=1.0), **options
    )
    torch.manual_seed(5)
    assert torch.isfinite(trainer.step(*batch).loss).all()
    return {name: before[name] - p.detach() for name, p in view.model.named_parameters()}


@pytest.mark.parametrize("make", CASES)
def test_the_parts_are_the_model_and_train(make: Callable[[], tuple[nn.Module, Backbone]]) -> None:
    model, view = make()
    assert_parity(model, view)
    # All blocks' rotary frequencies in one parameter; a stage's convolutions used by each of its blocks.
    assert bool(view.shared) == (getattr(model, "rope_mixed", False) or type(model).__name__ == "CoaT")

    start = copy.deepcopy(model.train().state_dict())
    batch = torch.randn(2, *view.image.shape), torch.tensor([1, 4])
    torch.manual_seed(5)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    plain = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()

    model.load_state_dict(start)
    exact = step(view, batch, objective="end-to-end", modules=2, recompute="block")
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in exact.items():
        assert (gradient - plain[name]).abs().max() <= 1e-4 * largest, name
    for name, buffer in model.named_buffers():  # BatchNorm ran up to three times, and counted once
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-5, atol=1e-6)

    model.load_state_dict(start)
    learned: set[int] = set()

    class Recording(torch.optim.SGD):
        """Notes what gets a gradient: that of EdgeNeXt's layers, scaled by 1e-6, is too small to be seen in a weight, and
        so is that of EfficientFormerV2's biases, which the BatchNorm after them takes out again."""

        def step(self, closure: Any = None) -> None:
            for parameter in (p for group in self.param_groups for p in group["params"]):
                if parameter.grad is not None and bool(parameter.grad.any()):
                    learned.add(id(parameter))

    trainer = fastlocal.LocalTrainer(view, modules=2, objective="feature", optimizer=lambda groups: Recording(groups))
    torch.manual_seed(5)
    assert torch.isfinite(trainer.step(*batch).loss).all()
    named = dict(view.model.named_parameters())
    still = [name for name, gradient in plain.items() if bool(gradient.any()) and id(named[name]) not in learned]
    assert [name for name in still if not name.endswith(UNSEEN)] == []


def torchvision_models() -> dict[str, Any]:
    models = pytest.importorskip("torchvision.models")
    swin = models.swin_transformer
    options: dict[str, Any] = {
        "patch_size": [4, 4],
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "num_classes": 7,
    }
    return {
        "swin": lambda: swin.SwinTransformer(window_size=[4, 4], **options),
        "swin v2": lambda: swin.SwinTransformer(
            window_size=[4, 4], block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2, **options
        ),
        "vit": lambda: models.VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=7),
    }


@pytest.mark.parametrize("family", ["swin", "swin v2", "vit"])
def test_torchvision(family: str) -> None:
    torch.manual_seed(0)
    model = torchvision_models()[family]()
    view = backbone(model, 64)
    assert_parity(model, view)
    step(view, (torch.randn(2, 3, 64, 64), torch.tensor([1, 4])), modules=2)


def hugging_face_models() -> dict[str, Any]:
    hf = pytest.importorskip("transformers")
    size: dict[str, Any] = {"image_size": 64, "num_labels": 7}
    column = {**size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    pyramid = {**size, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    siglip = hf.SiglipConfig(
        vision_config={**column, "patch_size": 16},
        text_config={"hidden_size": 32, "num_hidden_layers": 1},
        num_labels=7,
    )
    return {
        "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**column)),
        "DINOv2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**column, patch_size=16)),
        "BEiT": lambda: hf.BeitForImageClassification(hf.BeitConfig(**column, use_relative_position_bias=True)),
        "Swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(**pyramid)),
        "Swin-V2": lambda: hf.Swinv2ForImageClassification(hf.Swinv2Config(**pyramid)),
        "SigLIP": lambda: hf.SiglipForImageClassification(siglip),
        "TimmWrapper": lambda: hf.TimmWrapperForImageClassification(
            hf.TimmWrapperConfig(architecture="test_vit", num_labels=7, model_args={"img_size": 64})
        ),
    }


@pytest.mark.parametrize("family", ["ViT", "DINOv2", "BEiT", "Swin", "Swin-V2", "SigLIP", "TimmWrapper"])
def test_hugging_face(family: str) -> None:
    torch.manual_seed(0)
    model = hugging_face_models()[family]()
    view = backbone(model)
    assert_parity(model, view, call=lambda images: model(images).logits)
    step(view, (torch.randn(2, *view.image.shape), torch.tensor([1, 4])), modules=2)


class Layer(nn.Module):
    """A block that returns a tuple, as many a library's does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x)
        return x + y, weights


class Stem(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images).flatten(2).transpose(1, 2)


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x.mean(dim=1))


def own(**options: Any) -> Backbone:
    layers = [Layer(16) for _ in range(3)]
    return Backbone(Stem(16), layers, Head(16), (3, 32, 32), **{"output_of": lambda y: y[0], **options})


def test_a_backbone_of_ones_own_trains_and_is_planned() -> None:
    view = own()
    before = copy.deepcopy(view.model.state_dict())
    trainer = fastlocal.LocalTrainer(view, modules=3)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 4])
    trainer.step(images, labels)
    assert trainer.model is view.model
    assert all(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    trainer.model.eval()
    torch.testing.assert_close(trainer.predict(images)[-1], trainer.model(images))
    plan = fastlocal.plan(view.model, batch_size=4, memory="1GiB", amp_dtype=None)
    assert plan.batch_size == 4


def test_a_registered_class_and_its_heirs_are_known() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = Stem(16), Head(16)
            self.blocks = nn.ModuleList([Layer(16), Layer(16)])

        def forward(self, images: Tensor) -> Tensor:
            x = self.stem(images)
            for block in self.blocks:
                x = block(x)[0]
            return self.head(x)

    class Heir(Mine):
        pass

    class Stranger(Mine):
        def forward(self, images: Tensor) -> Tensor:
            return -super().forward(images)

    @fastlocal.register_backbone(Mine)
    def mine(model: Any, image: tuple[int, int, int]) -> Backbone:
        blocks = [lambda x, block=block: block(x)[0] for block in model.blocks]
        return Backbone(model.stem, blocks, model.head, image, model=model)

    model = Heir()
    assert_parity(model, backbone(model, 32))
    with pytest.raises(ValueError, match="Stranger has a forward of its own"):
        backbone(Stranger(), 32)


def test_a_layer_used_twice_is_trained_by_the_first_module_that_has_it() -> None:
    layer = Layer(16)
    view = Backbone(Stem(16), [layer, layer], Head(16), (3, 32, 32), output_of=lambda y: y[0])
    assert {name.split(".")[1] for name in view.shared} == {"0"}
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 4])
    F.cross_entropy(view.model(images), labels).backward()
    plain = {name: p.grad for name, p in view.model.named_parameters()}
    view.model.zero_grad()
    start = copy.deepcopy(view.model.state_dict())
    for residency in ("all", "module"):
        exact = step(view, (images, labels), objective="end-to-end", modules=2, residency=residency, micro_batch=2)
        for name, gradient in exact.items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)
        view.model.load_state_dict(start)


def test_parts_do_not_change_what_batch_norm_sees() -> None:
    _, view = build("levit_128s")
    trainer = fastlocal.LocalTrainer(view, modules=2, micro_batch=1)
    with pytest.raises(ValueError, match="BatchNorm layers normalize over what they are given together"):
        trainer.step(torch.randn(2, *view.image.shape), torch.tensor([1, 4]))


REFUSED = [
    (lambda: backbone(timm.create_model("resnet18")), "ResNet is not supported"),
    (lambda: backbone(timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5)), "patch dropout"),
    (lambda: backbone(timm.create_model("coat_tiny")), "read four resolutions at once"),
    (lambda: own(output_of=None), "block 0 must return tokens"),
    (lambda: own(prefix=1), "no grid of 32×32 images; prefix must be"),
    (lambda: Backbone(lambda x: x, [nn.Identity()], nn.Identity(), (3, 32, 32)), "stem must be an nn.Module"),
    (lambda: Backbone(nn.Identity(), [nn.Identity()], nn.Flatten(), (32, 32, 32)), "layout must be 'NHWC' or 'NCHW'"),
    (
        lambda: fastlocal.LocalTrainer(timm.create_model("mvitv2_tiny", img_size=64), modules=2, objective="transport"),
        "returns another shape than it reads",
    ),
    (lambda: fastlocal.LocalTrainer(timm.create_model("test_vit", num_classes=0)), "nothing to tell apart"),
    (lambda: backbone(timm.create_model("vit_srelpos_small_patch16_224")), "once for all blocks"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_cannot_be_cut_is_refused_in_one_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_readme_says_what_the_table_says() -> None:
    root = Path(__file__).parents[2]
    served = sum(not row["refused"] for row in FAMILIES)
    sentence = f"{served} of the {len(FAMILIES)} names in timm 1.0.31 that contain attention"
    assert sentence in (root / "README.md").read_text()
    assert sentence in (root / "docs" / "families.md").read_text()
    assert served >= 0.85 * len(FAMILIES)
