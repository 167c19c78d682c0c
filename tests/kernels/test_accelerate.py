"""`accelerate` and `restore`: timm's models with fused attention are timm's models."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from fastlocal.kernels import accelerate, restore, use_kernels

ErrorOf = Callable[[Tensor, Tensor], float]

# name: timm's name, arguments, image side, layers to swap
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (2, 2, 2, 2)}, 64, 8),  # every stage pads
    "swin-window4": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "depths": (1, 2, 1)},
        32,
        4,
    ),
    "swin-free-size": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "depths": (2, 2), "strict_img_size": False, "always_partition": True},
        72,
        4,
    ),
    "swin-v2": ("swinv2_tiny_window8_256", {"img_size": 96, "depths": (2, 2)}, 96, 4),
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, 64, 2),
    "vit-qk-norm": (
        "vit_tiny_patch16_224",
        {"img_size": 64, "depth": 2, "qk_norm": True, "scale_attn_norm": True},
        64,
        2,
    ),
    "deit": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2}, 64, 2),
    "beit": ("beit_base_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 192, "num_heads": 3}, 64, 2),
    "beit-shared-bias": (
        "beit_base_patch16_224",
        {
            "img_size": 64,
            "depth": 2,
            "embed_dim": 192,
            "num_heads": 3,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
        },
        64,
        2,
    ),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}, 56, 2),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 3}, 64, 2),
    "vit-8-channel-heads": (
        "vit_tiny_patch16_224",
        {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 6},
        64,
        1,
    ),
    "vit-relpos": ("vit_relpos_small_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 96}, 64, 2),
    "vit-shared-relpos": ("vit_srelpos_small_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 96}, 64, 2),
    "maxvit": ("maxvit_rmlp_pico_rw_256", {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1)}, 64, 4),
    "maxvit-tf": ("maxvit_tiny_tf_224", {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1)}, 64, 4),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, int]:
    """A model whose every parameter matters (Swin-V2 starts with its norms at zero), images, and the layers to swap."""
    architecture, arguments, side, layers = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=10, **arguments)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias_table") or not parameter.any():
            nn.init.normal_(parameter)
    return model.to(dtype), torch.randn(2, 3, side, side, dtype=dtype), layers


def gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)  # the same paths are dropped each time
    out = model(images)
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_model_is_the_same(name: str, training: bool, relative_error: ErrorOf) -> None:
    model, images, layers = build(name)
    model.train(training)
    out, expected = gradients(model, images)
    assert accelerate(model) == layers
    fused_out, found = gradients(model, images)
    assert relative_error(fused_out, out) < 1e-12
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for parameter, gradient in expected.items():
        assert (found[parameter] - gradient).norm() < 1e-12 * whole, parameter


@pytest.mark.parametrize("name", ["swin", "vit", "beit", "eva"])
def test_restore_leaves_nothing_behind(name: str) -> None:
    model, images, layers = build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {module_name: set(vars(module)) for module_name, module in model.named_modules()}
    parameters = [id(parameter) for parameter in model.parameters()]
    out, _ = gradients(model, images)
    accelerate(model)
    assert list(model.state_dict()) == list(state)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert restore(model) == layers
    assert restore(model) == 0
    assert {module_name: set(vars(module)) for module_name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(gradients(model, images)[0], out)


def test_twice_is_once() -> None:
    model, _, layers = build("swin-window4")
    assert accelerate(model) == accelerate(model) == layers
    assert restore(model) == layers


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_models_of_their_own(duplicate: str) -> None:
    model, images, layers = build("swin-window4")
    model.eval()
    accelerate(model)
    out = model(images)
    if duplicate == "deepcopy":
        copied = copy.deepcopy(model)
    elif duplicate == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert torch.equal(copied(images), out)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    assert torch.equal(model(images), out)
    assert not torch.equal(copied(images), out)
    assert restore(copied) == layers


@pytest.mark.parametrize("name", ["swin-window4", "vit", "beit", "eva", "maxvit"])
def test_shallow_copies_compute_with_what_they_hold(name: str) -> None:
    """copy.copy and the replicas of DataParallel: parameters put into the copy are the ones it uses."""
    model, images, _ = build(name)
    model.eval()
    accelerate(model)
    out = model(images)
    layer = next(
        m for m in model.modules() if type(m).__module__ == "fastlocal.kernels.fused_layers" and hasattr(m, "qkv")
    )
    for replica in (copy.copy(layer), layer._replicate_for_data_parallel()):
        assert type(replica) is type(layer)
        assert not any(callable(value) and getattr(value, "args", None) for value in vars(replica).values())
    copied = copy.copy(layer)
    copied._modules = dict(layer._modules, proj=nn.Identity())  # type: ignore[assignment]
    for parent in model.modules():
        for child_name, child in parent.named_children():
            if child is layer:
                setattr(parent, child_name, copied)
    assert not torch.equal(model(images), out)


def test_layers_with_a_forward_of_their_own_keep_it() -> None:
    """Somebody's patch stays in use, is not counted, and outlives `restore`."""
    model, images, layers = build("vit")
    calls = []
    layer = model.blocks[0].attn
    original = layer.forward
    layer.forward = patched = lambda x, *args, **kwargs: calls.append(1) or original(x, *args, **kwargs)
    assert accelerate(model) == layers - 1
    model(images)
    assert calls == [1]
    assert restore(model) == layers - 1
    assert layer.forward is patched


def test_hooks_on_the_attention_of_a_window_block_fire() -> None:
    """As fully_shard(block.attn) needs, whose hook gathers the parameters."""
    model, images, layers = build("swin-window4")
    accelerate(model)
    fired = []
    for block in (block for stage in model.layers for block in stage.blocks):
        block.attn.register_forward_pre_hook(lambda *_: fired.append(1))
    model(images)
    assert len(fired) == layers


@pytest.mark.parametrize("name", ["swin-window4", "swin-v2", "vit", "maxvit"])
def test_dropout_turned_on_later_is_refused(name: str) -> None:
    model, images, _ = build(name)
    accelerate(model)
    for module in model.modules():
        if hasattr(module, "attn_drop"):
            module.attn_drop.p = 0.1
    with pytest.raises(
        RuntimeError, match=r"has attention dropout 0\.1, which the fused ops do not apply: set it to 0"
    ):
        model.train()(images)
    model.eval()(images)


def test_a_class_changed_since_cannot_be_restored() -> None:
    model, _, _ = build("vit")
    accelerate(model)
    layer = model.blocks[0].attn
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(ValueError, match=r"blocks\.0\.attn has become a Sharded since accelerate"):
        restore(model)


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
def test_torchvisions_swin(name: str, relative_error: ErrorOf) -> None:
    torch.manual_seed(0)
    window = [8, 8] if "v2" in name else [7, 7]
    arguments: dict[str, Any] = {"embed_dim": 24, "depths": [2, 2], "num_heads": [1, 2], "window_size": window}
    if "v2" in name:
        arguments |= {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    model = SwinTransformer(patch_size=[4, 4], num_classes=10, stochastic_depth_prob=0.0, **arguments).double()
    images = torch.randn(2, 3, 72, 72, dtype=torch.float64)  # both stages pad
    out, expected = gradients(model, images)
    assert accelerate(model) == 4
    fused_out, found = gradients(model, images)
    assert relative_error(fused_out, out) < 1e-12
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert all((found[parameter] - gradient).norm() < 1e-12 * whole for parameter, gradient in expected.items())
    assert restore(model) == 4


def test_windows_of_384_pixel_models(relative_error: ErrorOf) -> None:
    """Swin-V2's largest windows, 24 × 24, hold 576 tokens."""
    torch.manual_seed(0)
    block = SwinTransformerV2Block(8, (24, 24), 2, window_size=24).double().eval()
    x = torch.randn(1, 24, 24, 8, dtype=torch.float64)
    expected = block(x)
    assert accelerate(block) == 1
    assert relative_error(block(x), expected) < 1e-12


def test_state_dict_travels_both_ways() -> None:
    plain, images, _ = build("swin-window4")
    fused, _, _ = build("swin-window4")
    accelerate(fused)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.01)
    fused.load_state_dict(plain.state_dict())
    assert torch.allclose(fused.eval()(images), plain.eval()(images), rtol=1e-12)


def test_a_part_of_a_model() -> None:
    model, _, _ = build("swin-window4")
    assert accelerate(model.layers[1]) == 2
    assert accelerate(model.layers[1].blocks[0]) == 1
    assert restore(model) == 2


def test_calls_the_fused_ops() -> None:
    """Not only equal to timm: it is the ops that run."""
    rotations = [(name, "rotary_embedding", 2) for name in ("eva", "dinov3")]
    for name, op, times in (
        ("swin", "window_attention", 1),
        ("vit", "attention", 1),
        ("beit", "attention", 1),
        *rotations,
    ):
        model, images, layers = build(name)
        accelerate(model)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(images)
        assert {event.key: event.count for event in profile.key_averages()}[f"fastlocal::{op}"] == times * layers


def test_mask_of_the_caller_runs_timms_code() -> None:
    model, _, _ = build("vit")
    attention = model.blocks[0].attn
    tokens = torch.randn(2, 5, 192, dtype=torch.float64)
    mask = torch.zeros(5, 5, dtype=torch.bool).fill_diagonal_(True)
    expected = attention(tokens, attn_mask=mask)
    accelerate(model)
    assert torch.equal(attention(tokens, attn_mask=mask), expected)
    assert not torch.equal(attention(tokens), expected)


@pytest.mark.parametrize("name", ["swin-window4", "swin-v2", "vit", "beit", "eva"])
def test_accelerated_block_compiles_as_one_graph(name: str, relative_error: ErrorOf) -> None:
    model, images, _ = build(name, torch.float32)
    model.eval()
    accelerate(model)
    inputs: list[tuple[Any, Any]] = []
    block = model.layers[1].blocks[1] if name.startswith("swin") else model.blocks[1]
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    model(images)
    hook.remove()
    args, kwargs = inputs[0]
    args = (args[0].detach().requires_grad_(), *args[1:])
    kwargs = {key: value.detach() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    found = []
    for step in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out = step(*args, **kwargs)
        found.append((out, *torch.autograd.grad(out.square().sum(), [args[0], block.attn.proj.weight])))
    for eager, compiled in zip(*found, strict=True):
        assert relative_error(compiled, eager) < 1e-5


def test_autocast_matches_timm(relative_error: ErrorOf) -> None:
    for name in MODELS:
        model, images, _ = build(name, torch.float32)
        model.eval()
        exact = model(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            plain = model(images)
            accelerate(model)
            fused = model(images)
        assert fused.dtype == plain.dtype
        assert relative_error(fused, exact) < 2 * relative_error(plain, exact) + 1e-2, name


# --- Whole models through the interpreted kernels ---------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "side"), [("swin_tiny_patch4_window7_224", 64), ("vit_tiny_patch16_224", 64)])
def test_whole_model_through_the_kernels(architecture: str, side: int, relative_error: ErrorOf) -> None:
    """Swin-T and ViT-Ti, forward and backward, at full depth and width on a small image."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=10, img_size=side).eval()
    images = torch.randn(1, 3, side, side)
    out, expected = gradients(model, images)
    assert accelerate(model) == 12
    with use_kernels("triton"):
        fused_out, found = gradients(model, images)
    assert relative_error(fused_out, out) < 1e-5
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient.norm() > 1e-6:  # the bias table of a window of one token has none
            assert relative_error(found[name], gradient) < 1e-4, name


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_nothing_to_swap() -> None:
    with pytest.raises(ValueError, match=r"model must contain layers .*, got Sequential without one\."):
        accelerate(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="got ResNet without one"):
        accelerate(timm.create_model("resnet10t"))


def test_refusal_names_the_attention_that_was_found() -> None:
    with pytest.raises(
        ValueError, match=r"got ModuleList without one; it has torch\.nn\.modules\.activation\.Multihead"
    ):
        accelerate(nn.ModuleList([nn.MultiheadAttention(16, 2)]))


def test_subclasses_are_left_alone() -> None:
    class Special(SwinTransformerBlock):  # type: ignore[misc]
        pass

    with pytest.raises(ValueError, match="got Special without one"):
        accelerate(Special(32, (8, 8), 2, window_size=4))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"attn_drop": 0.1}, r"blocks\.1 has attention dropout 0\.1, which the fused ops do not apply"),
        ({"num_heads": 1}, r"blocks\.1 has 192 channels per head, and the fused op takes at most 128"),
    ],
)
def test_what_the_ops_cannot_do(block: dict[str, Any], reason: str) -> None:
    good = SwinTransformerBlock(192, (48, 48), 6, window_size=4)
    bad = SwinTransformerBlock(192, (48, 48), **{"num_heads": 6, "window_size": 4, **block})
    model = nn.ModuleDict({"blocks": nn.Sequential(good, bad)})
    with pytest.raises(ValueError, match=f"model cannot be accelerated: {reason}") as error:
        accelerate(model)
    assert "\n" not in str(error.value)
    assert restore(model) == 0  # not half of it either
