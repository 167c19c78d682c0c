"""From a configuration to the model and its trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import timm
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import fastlocal
from fastlocal.backbones import backbone
from fastlocal.bus import host_available
from fastlocal.kernels.dispatch import why_not_triton
from fastlocal.optimizers import layer_decay
from fastlocal.planner import format_bytes, state_share
from fastlocal.train.config import OPTIONS, TrainConfig
from fastlocal.train.cpu import has_bfloat16
from fastlocal.train.errors import UserError, nearest, printable
from fastlocal.train.options.learning import LearningOptions
from fastlocal.train.options.optimization import OptimizationOptions
from fastlocal.train.options.values import flag
from fastlocal.train.ranks import processes
from fastlocal.train.recipes import GEOMETRY

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
FAMILIES = ["swin*", "vit*", "deit*", "beit*", "eva02*"]


def pretrained_configuration(model: str) -> dict[str, Any]:
    """What timm knows of the weights of ``model``: the size of its input, mean, std, crop, interpolation.

    Raises:
        UserError: timm has no such model or no such weights; what comes nearest is suggested.
    """
    name, _, tag = model.partition(".")
    if not timm.is_model(name):
        raise UserError(f"--model {model!r} is not known to timm{nearest(model, timm.list_models(FAMILIES))}")
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if tag:
        tags = [entry.partition(".")[2] for entry in timm.list_pretrained(f"{name}.*")]
        if tag not in tags:
            raise UserError(
                f"--model {model!r}: timm has no weights {tag!r} for {name}{nearest(tag, tags)[:-1]}"
                f" (it has {', '.join(tags) or 'none'})."
            )
        known = timm.get_pretrained_cfg(model)
    found = known.to_dict() if known else {}
    return {**found, "input_size": found.get("input_size") or (3, 224, 224)}


def build_device(config: TrainConfig) -> torch.device:
    """The device of ``config``.

    Raises:
        UserError: there is no such device, or its kernels cannot be the ones asked for.
    """
    if config.memory.device == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and processes() > 1:
            number = int(os.environ.get("LOCAL_RANK", "0"))
            if number >= torch.cuda.device_count():
                raise UserError(
                    f"--nproc-per-node of torchrun is more than the {torch.cuda.device_count()} cards of this machine."
                )
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
    else:
        try:
            device = torch.device(config.memory.device)
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"--device {config.memory.device} cannot be used: {reason}.") from None
    obstacle = why_not_triton(device)
    if config.memory.kernels == "triton" and obstacle is not None:
        raise UserError(f"--kernels triton was asked for, but {obstacle[0].lower()}{obstacle[1:]}")
    return device


def build_model(
    config: TrainConfig,
    classes: int,
    image_size: tuple[int, int],
    *,
    start: bool = False,
    weights: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The timm model for images of ``image_size``, height and width in pixels.

    Args:
        start: with the weights that ``--pretrained`` names, if it is given; else untrained.
        weights: arguments of `start.fitted`, which load others.

    Raises:
        UserError: the architecture is not supported, refuses an argument, does not fit the image size, or there are no
            such weights.
    """
    pretrained_configuration(config.model.name)  # a name of timm's, and no address that it would open
    arguments = {
        "drop_path_rate": config.model.drop_path,
        **config.model.model_kwargs,
        **input_arguments(config, image_size),
    }
    if start and config.model.pretrained:
        arguments["pretrained"] = True
    arguments |= weights or {}
    try:
        model = _create(config.model.name, classes, arguments)
    except Exception as error:  # timm checks its arguments with whatever the layers raise
        backbone(timm.create_model(config.model.name))  # an unsupported architecture is the better explanation
        given = " ".join(f"{name}={value}" for name, value in arguments.items() if name != "pretrained_cfg_overlay")
        raise UserError(
            f"--model {config.model.name} cannot be built with {given}: {' '.join(str(error).split()).rstrip('.')}."
        ) from None
    cast(Any, model).pretrained_cfg.pop("state_dict", None)  # weights that were loaded would be kept twice
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    patch = (patch, patch) if isinstance(patch, int) else patch
    if any(side % step for side, step in zip(image_size, patch, strict=True)):
        raise UserError(
            f"--model {config.model.name} does not fit images of {pixels(image_size)} pixels, which is no multiple of its patch"
            f" size, {max(patch)}; change either with --img-size or --model-kwargs patch_size=…."
        )
    backbone(model)  # refuses an unsupported architecture
    freeze(model, config.learning)
    if not config.model.model_kwargs.keys() & GEOMETRY and config.model.img_size is None:
        _check_geometry(config.model.name, model, image_size)
    return model


def _check_geometry(name: str, model: nn.Module, image_size: tuple[int, int]) -> None:
    """Refuse a design for large images that has next to nothing to look at in small ones, or looks mostly at padding.

    Raises:
        UserError: the sentence says which arguments to add.
    """
    made = cast(Any, model)
    enlarged = f"or img_size={pretrained_configuration(name)['input_size'][-1]} to enlarge the images"
    grid = getattr(getattr(made, "patch_embed", None), "grid_size", None)
    if grid is None:
        return
    height, width = grid
    fitting = f"patch_size={max(min(image_size) // 8, 1)}"
    problem = (
        f"makes {height} × {width} tokens of images of {pixels(image_size)} pixels" if height * width < 16 else None
    )
    if name.startswith("swin"):
        fitting = f"patch_size={max(min(image_size) // 16, 1)} window_size=4"
        for stage in getattr(made, "layers", ()):
            (height, width), window = stage.blocks[0].input_resolution, stage.blocks[0].window_size
            padded = [-(-side // w) * w for side, w in zip((height, width), window, strict=True)]
            if padded[0] * padded[1] > 2 * height * width:
                problem = f"pads a grid of {height} × {width} tokens to {padded[0]} × {padded[1]}"
                break
    if problem is not None:
        raise UserError(
            f"--model {name} {problem}; add --model-kwargs {fitting} to train on them as they are, {enlarged}."
        )


def input_arguments(config: TrainConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` that say what the model sees."""
    square = image_size[0] == image_size[1]
    channels = {"in_chans": config.model.in_chans} if config.model.in_chans != 3 else {}
    return {"img_size": image_size[0] if square else image_size, **channels}


def pixels(image_size: tuple[int, int]) -> str:
    """``224`` or ``192×256``."""
    return str(image_size[0]) if image_size[0] == image_size[1] else "×".join(map(str, image_size))


def _create(name: str, classes: int, arguments: dict[str, Any]) -> nn.Module:
    """The timm model, which says where the engine looks how large images will be; some take any and know no ``img_size``."""
    try:
        model = timm.create_model(name, num_classes=classes, **arguments)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        without = {key: value for key, value in arguments.items() if key != "img_size"}
        model = timm.create_model(name, num_classes=classes, **without)
    size = arguments["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    channels = arguments.get("in_chans", 3)
    made = cast(Any, model)
    made.pretrained_cfg = {**made.pretrained_cfg, "input_size": (channels, height, width)}
    return model


def build_trainer(
    config: TrainConfig,
    model: nn.Module,
    device: torch.device,
    normalize: Normalization | None,
    loss: nn.Module | None = None,
    mesh: DeviceMesh | None = None,
) -> fastlocal.LocalTrainer:
    """The engine with the options of ``config``, on ``mesh`` if there are several processes.

    Raises:
        UserError: an unknown optimizer; the nearest name is suggested. Or host memory does not hold the idle modules.
        ValueError: what the engine refuses, such as more modules than blocks.
    """
    _check_host_memory(config, model)
    if config.memory.weights == "low" and config.memory.amp and amp_dtype(config, device) is None:
        raise UserError(f"--weights low has nothing to cast to, for {NO_BFLOAT16}; --amp-dtype bfloat16 emulates it.")
    checked = cast(Any, config.memory)  # MemoryOptions knows the choices that the engine's types spell out
    return fastlocal.LocalTrainer(
        model,
        modules=config.learning.modules
        if isinstance(config.learning.modules, int | str)
        else list(config.learning.modules),
        objective=config.learning.objective,
        micro_batch=config.memory.micro_batch,
        recompute=checked.recompute,
        residency=checked.residency,
        boundaries=checked.boundaries,
        weights=checked.weights,
        prefetch=config.memory.prefetch,
        normalize=normalize,
        loss=loss,
        compile=(config.memory.torchcompile_mode or True) if config.memory.torchcompile else False,
        mesh=mesh,
        rank_cuts=config.devices.rank_cuts if mesh is not None and config.devices.parallel == "modules" else None,
        queue=config.devices.queue,
        timeout=config.devices.timeout,
        **unplanned_options(config, device),
    )


def _check_host_memory(config: TrainConfig, model: nn.Module) -> None:
    """Refuse, before it is filled, host memory that does not hold the optimizer states and weights of the idle modules."""
    available = host_available()
    if config.memory.residency == "all" or available is None:
        return
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    needed = round(
        state_share(optimizer_factory(config.optimization)) * trained + weights / 2 * (config.memory.weights == "low")
    )
    if needed > available:
        raise UserError(
            f"--residency {config.memory.residency} keeps {format_bytes(needed, up=True)} more on the host than the weights,"
            f" which has {format_bytes(available)} free: close other programs, take an optimizer with less state (--opt sgd,"
            " lion), or --residency all."
        )


def follow_plan(config: TrainConfig, model: nn.Module, device: torch.device) -> TrainConfig:
    """``config`` with what `fastlocal.plan` chooses for its memory, objective and batch size.

    Raises:
        ValueError: nothing fits, or the memory is not a size.
    """
    assert config.memory.budget is not None
    if config.memory.torchcompile:
        print("planning: what compiled modules need beyond eager ones is not in the plan", file=sys.stderr)
    plan = fastlocal.plan(
        model,
        batch_size=config.optimization.batch_size,
        memory=config.memory.budget,
        objective=config.learning.objective,
        exact_share=config.exact_share,
        **planned_for(config),
        **unplanned_options(config, device),
    )
    chosen = plan.arguments()
    return config.changed(**{**chosen, "modules": plan.cuts or 1})


def planned_for(config: TrainConfig) -> dict[str, Any]:
    """The arguments of `fastlocal.plan` that say what a plan must leave room for, and who hears of the progress."""
    return {
        "reserve": config.memory.reserve,
        "host_memory": config.memory.host_memory,
        "image_dtype": torch.float32 if config.augmentation.mixes else torch.uint8,  # mixed images are no whole numbers
        "say": lambda text: print(f"planning: {text}", file=sys.stderr),
    }


def unplanned_options(config: TrainConfig, device: torch.device | None) -> dict[str, Any]:
    """The arguments of `LocalTrainer` that a plan leaves alone; ``device`` is None for a card that is not here."""
    learning, settings = config.learning, config.optimization
    return {
        "optimizer": optimizer_factory(settings),
        "decoder": learning.decoder,
        "first_target": learning.first_target,
        "reconstruction": learning.reconstruction,
        "normalize_target": learning.normalize_target,
        "regularizer_weight": learning.regularizer_weight,
        "classification_weight": learning.classification_weight,
        "lookahead": learning.lookahead,
        "amp_dtype": amp_dtype(config, device),
        "clip_grad": settings.clip_grad,
        "clip_mode": settings.clip_mode,
        "label_smoothing": 0.0 if config.augmentation.mixes else settings.smoothing,  # mixup smooths its own labels
        "ema_decay": settings.model_ema_decay if settings.model_ema else None,
        "kernels": config.memory.kernels,
        "device": device,
    }


# Optimizers of timm's that cannot work a module at a time, and why.
NOT_BY_MODULE = {"adahessian": "it differentiates the gradients, whose graph is gone when a module is updated"}


def optimizer_factory(options: OptimizationOptions) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """What makes timm's optimizer ``options.opt`` for the parameter groups of a module.

    Raises:
        UserError: timm has no such optimizer (the nearest name is suggested), it cannot work a module at a time, lacks a
            package or a device, or does not take an argument.
    """
    known = [str(name) for name in list_optimizers()]
    if options.opt in NOT_BY_MODULE:
        raise UserError(f"--opt {options.opt} cannot train one module at a time: {NOT_BY_MODULE[options.opt]}.")
    if options.opt.startswith("lookahead_"):
        raise UserError(
            f"--opt {options.opt}: timm's Lookahead keeps weights that no checkpoint holds; name it without."
        )
    if options.opt not in known:
        raise UserError(f"--opt {options.opt!r} is not known to timm{nearest(options.opt, known)}")
    about = get_optimizer_info(options.opt)
    for name, value, known_to_it in (
        ("opt_betas", options.opt_betas, about.has_betas),
        ("opt_eps", options.opt_eps, about.has_eps),
        ("momentum", None if options.momentum == OPTIONS["momentum"].field.default else 1, about.has_momentum),
    ):
        if value is not None and not known_to_it:
            raise UserError(f"{flag(name)} would do nothing: --opt {options.opt} has none.")
    if options.opt_betas is not None and len(options.opt_betas) != about.num_betas and about.num_betas > 1:
        raise UserError(
            f"--opt-betas takes {about.num_betas} numbers for --opt {options.opt}; got {len(options.opt_betas)}."
        )
    given: dict[str, Any] = {"betas": options.opt_betas, "eps": options.opt_eps}
    given = {name: value for name, value in given.items() if value is not None} | dict(options.opt_kwargs)

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if options.layer_decay is not None:
            groups = layer_decay(groups, options.layer_decay, options.layer_decay_min_scale)
        try:
            return create_optimizer_v2(
                groups,
                opt=options.opt,
                lr=options.lr,
                weight_decay=options.weight_decay,
                momentum=options.momentum,
                **given,
            )
        except (TypeError, ValueError, AssertionError, ImportError) as error:  # each optimizer has its own checks
            said = "".join(f" {name}={value}" for name, value in given.items())
            reason = printable(str(error), 200).rstrip(".") or type(error).__name__
            raise UserError(f"--opt {options.opt}{' with' * bool(said)}{said} cannot be made: {reason}.") from None

    return make


def freeze(model: nn.Module, options: LearningOptions) -> None:
    """Take ``requires_grad`` from what ``options`` say is not trained.

    Raises:
        UserError: a name is none of the model's; the nearest one is suggested.
    """
    names = [name for name, _ in model.named_parameters()]
    if options.linear_probe:
        classifier = cast(Any, model).pretrained_cfg.get("classifier", "head")
        trained = [classifier] if isinstance(classifier, str) else list(classifier)
    else:
        trained = list(options.train)
    for given, prefixes in (("--freeze", options.freeze), ("--train", options.train)):
        for prefix in prefixes:
            if not any(_below(name, prefix) for name in names):
                holders = {
                    ".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)
                }
                raise UserError(
                    f"{given} {printable(prefix, 80)}: the model has nothing of that name{nearest(prefix, holders)}"
                )
    for name, parameter in model.named_parameters():
        wanted = any(_below(name, prefix) for prefix in trained) if trained else True
        parameter.requires_grad_(wanted and not any(_below(name, prefix) for prefix in options.freeze))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("--freeze names the whole model, so there is nothing to train.")


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix.removesuffix('.')}.")


NO_BFLOAT16 = "--amp computes in float32: this CPU has no units for bfloat16"


def amp_dtype(config: TrainConfig, device: torch.device | None) -> torch.dtype | None:
    """What autocast computes in; None is float32, throughout.

    "auto" is what the device has units for. A CPU that has none for bfloat16 emulates it, ten times slower than float32.

    Args:
        device: None for a card that is not here.
    """
    if not config.memory.amp:
        return None
    if config.memory.amp_dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}[config.memory.amp_dtype]
    if device is not None and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16 if device is None or device.type != "cpu" or has_bfloat16() else None
