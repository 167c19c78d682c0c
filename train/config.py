"""The configuration of a run: one frozen dataclass.

A run's values come, each over the one before, from the defaults below, the recipe of the data set (`RECIPES`), a file
(``--config``) and the flags. Flags that timm's training script has are named as there. Nothing heavy is imported here:
the command line reads this file before it knows whether it will train.
"""

from __future__ import annotations

import difflib
import math
import operator
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """What only the user can mend, told in one sentence; the command line prints it and exits with ``exit_code``."""

    exit_code = 2


def nearest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the one of ``names`` most like ``name``, or ``"."`` if none is."""
    known = {entry.lstrip("-"): entry for entry in names}  # dashes alone are no likeness
    found = difflib.get_close_matches(name[:100].lstrip("-"), known, n=1, cutoff=0.65)
    return f"; did you mean {known[found[0]]!r}?" if found else "."


def shown(value: Any) -> str:
    """``repr(value)``, shortened: what a sentence quotes may come from a file and be of any size."""
    try:
        return printable(_SHORT.repr(value), 100)
    except ValueError:  # Python prints no number of more than 4300 digits
        return f"a value of type {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def printable(text: str, limit: int = 1000) -> str:
    """``text`` in one line without control characters, which a terminal would obey, and of at most ``limit`` characters.

    File names, class names and options may hold anything.
    """
    text = " ".join(text[: 2 * limit].splitlines())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


# How a value is read, a flag's text or a file's value. Each raises ValueError, TypeError or OverflowError for what it
# cannot read.

LONGEST_TEXT = 4096  # characters in an option; Linux's longest path
LARGEST_WHOLE = 2**63 - 1


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or len(str(value)) > 20:
        raise ValueError
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    whole = int(value)
    if abs(whole) > LARGEST_WHOLE:
        raise ValueError
    return whole


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    text = str(value)
    if len(text) > LONGEST_TEXT or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ValueError
    return text


def _name(value: Any) -> str:
    """The name of one folder: neither a path nor hidden, and no longer than file systems take."""
    name = _text(value)
    if name != Path(name).name or "\\" in name or name.startswith(".") or len(os.fsencode(name)) > 200:
        raise ValueError
    return name


def _numbers(value: Any) -> tuple[float, ...]:
    """``"0.5,0.5,0.5"``, a list, or a single number."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return tuple(_number(part) for part in parts)


def _range(value: Any) -> tuple[float, ...]:
    low, high = _numbers(value)
    if not 0 < low <= high:
        raise ValueError
    return low, high


def _size(value: Any) -> tuple[int, int]:
    """``224``, or height and width: ``"192,256"`` or a list."""
    sides = [_whole(side) for side in _numbers(value)]
    if len(sides) > 2 or not all(0 < side <= LARGEST_SIDE for side in sides):
        raise ValueError
    return sides[0], sides[-1]


def _bytes(value: Any) -> str:
    """An amount with a unit. A bare number would be bytes, which nobody means."""
    text = _text(value).strip()
    if text.replace(".", "", 1).isdigit() and float(text) < 2**20:
        raise UserError(f"--memory {text} is {text} bytes; did you mean {text}GiB?")
    return text


def _modules(value: Any) -> int | str | tuple[int, ...]:
    """``4``, ``"stages"`` or cut points: ``"2,4,6"`` or a list."""
    if value == "stages":
        return "stages"
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and (len(parts) > 1 or not isinstance(value, str)):
        return tuple(_whole(part) for part in parts if part != "")  # "8," is one cut, and 8 a number of modules
    return _whole(value)


def _weights(value: Any) -> float | tuple[float, ...]:
    """One number, or one per module: ``"0.2,0.5,1"`` or a list."""
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and len(parts) > 1:
        return tuple(_number(part) for part in parts)
    return _number(value)


# What of timm's models may be asked for by a flag, a file or a checkpoint: their shape. Of what else create_model takes,
# some is opened (checkpoint_path), fetched (pretrained_cfg) or called.
MODEL_ARGUMENTS = (
    *("act_layer", "always_partition", "attn_drop_rate", "attn_only_layer_scale", "attn_pool_mlp_ratio"),
    *("attn_pool_num_heads", "attn_type", "class_token", "depth", "depths", "drop_path_rate", "drop_rate"),
    *("dynamic_img_pad", "dynamic_img_size", "embed_dim", "embed_norm_layer", "fc_norm", "final_norm", "fix_init"),
    *("global_pool", "head_dim", "head_init_scale", "img_size", "in_chans", "init_values", "mlp_layer"),
    *("mlp_ratio", "no_embed_class", "norm_layer", "num_heads", "num_kv_heads", "num_reg_tokens"),
    *("patch_drop_rate", "patch_size", "pool_include_prefix", "pos_drop_rate", "pos_embed", "pre_norm"),
    *("pretrained_window_sizes", "proj_bias", "proj_drop_rate", "qk_norm", "qkv_bias", "qkv_fused"),
    *("ref_feat_shape", "reg_tokens", "rope_grid_indexing", "rope_grid_offset", "rope_jitter_coords"),
    *("rope_mrope_section", "rope_rescale_coords", "rope_rotate_half", "rope_shift_coords", "rope_temperature"),
    *("rope_type", "scale_attn_inner", "scale_attn_norm", "scale_mlp", "scale_mlp_norm", "strict_img_size"),
    *("swiglu_align_to", "swiglu_mlp", "use_abs_pos_emb", "use_fc_norm", "use_post_norm"),
    *("use_post_transformer_norm", "use_pre_transformer_norm", "use_rel_pos_bias", "use_rot_pos_emb"),
    *("use_shared_rel_pos_bias", "weight_init", "window_size"),
)
LARGEST_SIDE = 2**14  # pixels
LARGEST_MODEL_ARGUMENT = 2**20  # a larger width, depth or image than anyone has


def _keywords(value: Any) -> dict[str, Any]:
    """A mapping, or flag texts such as ``["img_size=32", "depths=2,2,2,2"]``."""
    if not isinstance(value, Mapping):
        pairs = [text.partition("=") for text in value]
        if not all(name.isidentifier() and text for name, _, text in pairs):
            raise ValueError
        value = {name: _literal(text) for name, _, text in pairs}
    for name in value:
        if name not in MODEL_ARGUMENTS:
            raise UserError(
                f"--model-kwargs: {shown(name)} is no argument of a model's shape{nearest(str(name), MODEL_ARGUMENTS)}"
            )
    return {name: _model_argument(entry) for name, entry in value.items()}


def _model_argument(value: Any, nested: int = 0) -> Any:
    if isinstance(value, list | tuple) and len(value) <= 1000 and nested < 2:
        return tuple(_model_argument(entry, nested + 1) for entry in value)
    if isinstance(value, str):
        return _text(value)
    if value is not None and not isinstance(value, bool) and abs(_number(value)) > LARGEST_MODEL_ARGUMENT:
        raise ValueError
    return value


def _literal(text: str) -> Any:
    """A number, ``true``, ``false``, ``none`` or, separated by commas, several; other text stays as it is."""
    inside = text.strip("()[]")
    if "," in inside:
        return tuple(_literal(part.strip()) for part in inside.strip(",").split(","))
    words = {"true": True, "false": False, "none": None}
    if inside.lower() in words:
        return words[inside.lower()]
    for read in (_whole, _number):
        try:
            return read(inside)
        except (ValueError, OverflowError):
            pass
    return inside.strip("'\"")


SEVERAL = (_numbers, _range, _size)  # readers of options that take several values, separated by spaces or commas
_ACCEPTED = {
    _whole: "a whole number",
    _number: "a finite number",
    _switch: "true or false",
    _text: f"a text without control characters of at most {LONGEST_TEXT} characters",
    _name: "the name of a folder to be made, without a path and with no dot at its start",
    _numbers: "finite numbers such as 0.5 or 0.485 0.456 0.406",
    _range: "two numbers above 0, the smaller first, such as 0.08 1",
    _size: f"one number of pixels, or height and width, up to {LARGEST_SIDE}, such as 224 or 192 256",
    _bytes: "an amount of memory such as 4GiB",
    _modules: "a number of modules, 'stages', or cut points such as 2,4,6",
    _weights: "a finite number, or one per module such as 0.2,0.5,1",
    _keywords: f"name=value pairs such as img_size=32 depths=2,2,2,2, numbers up to {LARGEST_MODEL_ARGUMENT}",
}


def _about(
    help: str,
    parse: Callable[[Any], Any] = _text,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> dict[str, Any]:
    """What is known of a field of `TrainConfig`: its sentence for ``--help``, how it is read, what it may be."""
    limits = {"at_least": at_least, "above": above, "below": below, "at_most": at_most}
    return {"help": help, "parse": parse, "choices": choices, **limits}


def _option(default: Any, help: str, *rules: Any, **limits: Any) -> Any:
    return field(default=default, metadata=_about(help, *rules, **limits))


DOWNLOADED = ("cifar10", "cifar100", "stl10", "svhn", "fashion-mnist")
ARRAYS = ("digits", *DOWNLOADED, "synthetic")
DATA = (*ARRAYS, "FOLDER (or folder:FOLDER)", "FILE.tar", "hfds/NAME")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest")
OBJECTIVES = ("feature", "image", "cross-entropy", "transport", "end-to-end")
DECODERS = ("linear", "mlp", "conv", "transformer")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; `TrainConfig.of` fills in a data set's recipe.

    Raises:
        UserError: a value is not what its field accepts.
    """

    # Data
    data: str = _option("digits", f"what to train on: {', '.join(DATA)}")
    val_split: float = _option(
        0.0,
        "set this share of the training images apart, where there are none to validate on",
        _number,
        at_least=0,
        below=1,
    )
    class_map: str | None = _option(None, "archives: file with a class name per line, in the order of the labels")
    skip_broken: bool = _option(
        False, "go on without images that cannot be read; decodes each once to find them", _switch
    )
    data_dir: str = _option("data", "where torchvision's data sets lie, or are downloaded to")
    download: bool = _option(False, "fetch the data set if it is not in --data-dir", _switch)
    train_limit: int | None = _option(None, "train on a random subset of this many images", _whole, at_least=1)
    val_limit: int | None = _option(None, "validate on a random subset of this many images", _whole, at_least=1)
    workers: int = _option(
        2, "processes that read and augment large images (small ones need none)", _whole, at_least=0, at_most=1024
    )
    crop_padding: int = _option(
        0, "small images: pixels of padding before a random crop", _whole, at_least=0, at_most=1024
    )
    hflip: bool = _option(True, "flip half of the training images left to right", _switch)
    cutout: int = _option(
        0,
        "small images: side in pixels of a random grey square; 0: none",
        _whole,
        at_least=0,
        at_most=LARGEST_MODEL_ARGUMENT,
    )
    vflip: float = _option(0.0, "share of the training images flipped upside down", _number, at_least=0, at_most=1)
    scale: tuple[float, float] = _option((0.08, 1.0), "random crop: smallest and largest share of the image", _range)
    ratio: tuple[float, float] = _option((3 / 4, 4 / 3), "random crop: narrowest and widest width/height", _range)
    color_jitter: float = _option(
        0.0, "brightness, contrast and saturation vary by up to this share", _number, at_least=0
    )
    aa: str | None = _option(None, "timm's auto-augment policy, such as rand-m9-mstd0.5-inc1")
    reprob: float = _option(
        0.0, "share of the training images with a random rectangle erased", _number, at_least=0, at_most=1
    )
    remode: str = _option("pixel", "what erased rectangles are filled with", choices=("pixel", "const", "rand"))
    train_interpolation: str = _option(
        "random", "resizing of training images; random: bilinear or bicubic", choices=("random", *INTERPOLATIONS)
    )
    mixup: float = _option(0.0, "mixup alpha; 0: off", _number, at_least=0, at_most=1000)
    cutmix: float = _option(0.0, "cutmix alpha; 0: off", _number, at_least=0, at_most=1000)

    # What the model sees. Default: as timm has it for the model. Images that are all of one small size are taken whole.
    img_size: tuple[int, int] | None = _option(
        None, "pixels that images are brought to: one side, or height and width", _size
    )
    in_chans: int = _option(3, "1: grey, 3: RGB, 4: RGB and transparency", _whole, at_least=1, at_most=4)
    mean: tuple[float, ...] | None = _option(None, "mean of the pixels, 0 to 1, per channel", _numbers)
    std: tuple[float, ...] | None = _option(None, "their standard deviation, likewise", _numbers, above=0)
    interpolation: str | None = _option(None, "resizing of validation images", choices=INTERPOLATIONS)
    crop_pct: float | None = _option(
        None, "side of the validation crop, as a share of the resized image", _number, above=0
    )

    # Model
    model: str = _option("swin_tiny_patch4_window7_224", "a timm vision transformer")
    model_kwargs: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=_about("arguments of timm.create_model, such as img_size=32 depths=2,2,2,2", _keywords),
    )
    pretrained: bool = _option(False, "start from timm's pretrained weights, with their normalization", _switch)
    initial_checkpoint: str | None = _option(
        None, "start from these weights: a file, a run, local-dir:FOLDER, hf-hub:NAME"
    )
    drop_path: float = _option(0.0, "stochastic depth rate of the last block", _number, at_least=0, below=1)

    # Local learning
    modules: int | str | tuple[int, ...] = _option(
        4,
        "modules trained one at a time: a number, 'stages', or cut points (first blocks of modules 2, 3, …)",
        _modules,
    )
    objective: str = _option("feature", "what a module learns from", choices=OBJECTIVES)
    decoder: str = _option("linear", "what maps a module's output back to its input", choices=DECODERS)
    first_target: str = _option(
        "image",
        "what module 1 reconstructs for 'feature': the image or its patch embedding",
        choices=("image", "patch"),
    )
    reconstruction: str = _option("mse", "reconstruction loss", choices=("mse", "l1", "smooth_l1"))
    normalize_target: bool = _option(False, "normalize each token of the reconstruction target", _switch)
    regularizer_weight: float | tuple[float, ...] | None = _option(
        None,
        "weight of the reconstruction or transport term, one or one per local module; default: the objective's",
        _weights,
        at_least=0,
    )
    classification_weight: float | tuple[float, ...] | None = _option(
        None, "weight of the auxiliary cross-entropy, likewise", _weights, at_least=0
    )
    lookahead: int = _option(0, "blocks of the next module that an auxiliary head reads", _whole, at_least=0)
    exact_epochs: int = _option(
        0, "train the last so many epochs with exact gradients, as 'end-to-end' does", _whole, at_least=0
    )
    exact_every: int = _option(0, "train every so many-th step with exact gradients; 0: none", _whole, at_least=0)

    # Memory and arithmetic
    memory: str | None = _option(
        None,
        "memory of the card, such as 4GiB: the planner sets --modules, --micro-batch, --recompute, --residency,"
        " --boundaries and --weights",
        _bytes,
    )
    reserve: str = _option(
        "512MiB", "what of --memory tensors cannot have: CUDA's context, cuBLAS, the allocator's rounding"
    )
    host_memory: str | None = _option(None, "host memory that a plan may use, such as 16GiB; default: any")
    micro_batch: int | None = _option(None, "images per part of a batch; default: the whole batch", _whole, at_least=1)
    recompute: str = _option("none", "what the backward pass computes again", choices=("none", "block"))
    residency: str = _option(
        "all", "what of the idle modules stays on the device", choices=("all", "optimizer", "module")
    )
    boundaries: str = _option(
        "device", "where what stands between two modules lives, images included", choices=("device", "host")
    )
    weights: str = _option(
        "full", "with --residency module, 'low': weights arrive cast to the low precision", choices=("full", "low")
    )
    prefetch: bool = _option(
        True, "with --residency module, fetch the next module's weights ahead of time, which holds both", _switch
    )
    kernels: str = _option("auto", "fused ops", choices=("auto", "triton", "reference"))
    device: str = _option("auto", "torch device; auto: cuda if there is one, else cpu")
    torchcompile: bool = _option(False, "compile each module with torch.compile", _switch)
    torchcompile_mode: str | None = _option(
        None, "its mode; reduce-overhead and max-autotune replay CUDA graphs", choices=COMPILE_MODES
    )
    amp: bool = _option(False, "mixed precision", _switch)
    amp_dtype: str = _option(
        "auto", "auto: bfloat16 where the device has it, else float16", choices=("auto", "bfloat16", "float16")
    )

    # Optimization; one optimizer and one schedule per module
    epochs: int = _option(100, "passes over the training images", _whole, at_least=1)
    batch_size: int = _option(128, "images per optimizer step", _whole, at_least=1)
    opt: str = _option("adamw", "any optimizer of timm's")
    lr: float = _option(5e-4, "peak learning rate", _number, above=0)
    weight_decay: float = _option(0.05, "weight decay, not of biases, norms and position tables", _number, at_least=0)
    momentum: float = _option(0.9, "for optimizers that have it", _number, at_least=0, below=1)
    sched: str = _option("cosine", "learning-rate schedule, per step", choices=("cosine", "poly", "step", "none"))
    warmup_epochs: float | None = _option(
        None,
        "epochs of linear warm-up, fractions allowed; default: a tenth of --epochs, at most 5",
        _number,
        at_least=0,
    )
    warmup_lr: float = _option(1e-6, "learning rate that warm-up starts from", _number, at_least=0)
    min_lr: float = _option(0.0, "learning rate that cosine and poly end at", _number, at_least=0)
    decay_epochs: float = _option(30.0, "step schedule: epochs between decays", _number, above=0)
    decay_rate: float = _option(0.1, "step schedule: factor of a decay; poly: the power", _number, above=0)
    clip_grad: float | None = _option(None, "largest gradient norm of a module", _number, above=0)
    smoothing: float = _option(0.0, "label smoothing", _number, at_least=0, below=1)
    model_ema: bool = _option(False, "keep a moving average of the model, validate and export it", _switch)
    model_ema_decay: float = _option(0.9998, "decay of the moving average", _number, at_least=0, below=1)
    seed: int = _option(42, "seed of weights, data order and augmentation", _whole, at_least=0)

    # Run folder and reports
    output: str = _option("runs", "folder that run folders are made in")
    experiment: str = _option("", "name of the run folder; default: time, data and objective", _name)
    recovery_interval: int = _option(0, "steps between saves inside an epoch; 0: only at its end", _whole, at_least=0)
    save_retry: float = _option(
        10.0, "minutes to go on trying to save when the disk is full or away, before the run stops", _number, at_least=0
    )
    log_interval: int = _option(50, "steps between lines inside an epoch, when not on a terminal", _whole, at_least=1)
    log: str = _option("none", "extra log beside metrics.jsonl", choices=("none", "tensorboard"))

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not None or option.default is not None:
                object.__setattr__(self, option.name, _checked(option.name, option.metadata, value))
        self._check_data()
        self._gather_model_arguments()
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", min(self.epochs / 10, 5.0))
        elif self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup-epochs must be at most --epochs, {self.epochs}; got {self.warmup_epochs}.")
        if self.exact_epochs > self.epochs:
            raise UserError(f"--exact-epochs must be at most --epochs, {self.epochs}; got {self.exact_epochs}.")
        if self.objective == "end-to-end" and (self.exact_epochs or self.exact_every):
            raise UserError(
                "--exact-epochs and --exact-every are for local objectives; end-to-end is exact throughout."
            )
        if self.memory is not None and (self.exact_epochs or self.exact_every):
            raise UserError(
                "--memory plans for one kind of step, and --exact-epochs and --exact-every make it two: give --modules,"
                " --micro-batch, --recompute and --residency instead, as 'fastlocal plan --objective end-to-end' prints them."
            )
        if self.pretrained and self.initial_checkpoint is not None:
            raise UserError("--pretrained and --initial-checkpoint exclude each other: both say what to start from.")
        if self.torchcompile_mode is not None and not self.torchcompile:
            raise UserError(f"--torchcompile-mode {self.torchcompile_mode} needs --torchcompile.")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UserError(f"--batch-size must be even for --mixup and --cutmix, got {self.batch_size}.")

    def _check_data(self) -> None:
        data = self.data
        if data not in ARRAYS and not data.startswith("folder:") and os.path.isdir(data):
            object.__setattr__(self, "data", f"folder:{data}")
        elif not (
            data in ARRAYS
            or (data.startswith("folder:") and data != "folder:")
            or (data.startswith("hfds/") and data != "hfds/")
            or (data.endswith(".tar") and os.path.isfile(data))
        ):
            what = "no folder or file, and " if os.sep in data else ""
            raise UserError(
                f"--data {printable(data, 80)} is {what}not one of {', '.join(DATA)}{nearest(data, (*ARRAYS, 'folder:'))}"
            )

    def _gather_model_arguments(self) -> None:
        """Image size and channels have one home, whichever way they were given."""
        rest = dict(self.model_kwargs)
        for name, unset in (("img_size", None), ("in_chans", 3)):
            if name in rest:
                about = self.__dataclass_fields__[name].metadata
                value = _checked(name, about, rest.pop(name))
                if getattr(self, name) not in (unset, value):
                    raise UserError(f"--{name.replace('_', '-')} and --model-kwargs {name}=… say different things.")
                object.__setattr__(self, name, value)
        object.__setattr__(self, "model_kwargs", rest)
        if self.in_chans == 2:
            raise UserError("--in-chans must be 1 (grey), 3 (RGB) or 4 (RGB and transparency), got 2.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) not in (1, self.in_chans):
                raise UserError(f"--{name} takes one number or one per channel, {self.in_chans}; got {len(values)}.")

    def without_effect(self, given: Iterable[str]) -> list[str]:
        """A sentence for each of the options ``given`` that another makes void."""
        archive = self.data.endswith(".tar")
        needs = {
            "data_dir": (self.data in DOWNLOADED, f"--data {self.data} does not lie there", self.data_dir),
            "download": (self.data in DOWNLOADED, f"--data {self.data} is not downloaded", None),
            "class_map": (archive, "only archives (--data FILE.tar) take one", None),
            "val_split": (self.data not in ARRAYS, f"--data {self.data} has images to validate on", None),
            "skip_broken": (self.data not in ARRAYS, f"--data {self.data} has no files that could be", None),
            "model_ema_decay": (self.model_ema, "it needs --model-ema", None),
            "remode": (self.reprob > 0, "it needs --reprob", None),
            "decay_epochs": (self.sched == "step", "it is for --sched step", None),
            "decay_rate": (self.sched in ("step", "poly"), "it is for --sched step or poly", None),
            "min_lr": (self.sched in ("cosine", "poly"), "it is for --sched cosine or poly", None),
            "amp_dtype": (self.amp, "it needs --amp", None),
        }
        for name in ("modules", "micro_batch", "recompute", "residency"):
            needs[name] = (self.memory is None, "--memory has the planner set it", None)
        sentences = []
        for name, (effective, reason, place) in needs.items():
            value = getattr(self, name)
            if name in given and not effective:
                flag = f"--{name.replace('_', '-')}" + ("" if isinstance(value, bool) else f" {shown(value)}")
                meant = f"; did you mean --data {place}?" if place and os.path.isdir(place) else "."
                sentences.append(f"{flag} would do nothing: {reason}{meant}")
        return sentences

    @classmethod
    def of(cls, **given: Any) -> TrainConfig:
        """A configuration with the recipe of ``given["data"]`` where ``given`` says nothing.

        Raises:
            UserError: an unknown name, with the nearest known one, or a value that its field does not accept.
        """
        names = {option.name for option in fields(cls)}
        for name in given:
            if name not in names:
                raise UserError(f"unknown option {shown(name)}{nearest(name, names)}")
        about = {name: option.metadata for name, option in cls.__dataclass_fields__.items()}
        data = _checked("data", about["data"], given.get("data", "digits"))
        recipe = dict(RECIPES.get(data, {}))
        kwargs = _checked("model_kwargs", about["model_kwargs"], given.get("model_kwargs", {}))
        fitting = recipe.pop("model_kwargs", {})
        if "model" in given:
            decided = any(given.get(name) for name in ("pretrained", "initial_checkpoint", "img_size"))
            decided = decided or kwargs.keys() & GEOMETRY
            fitting = {} if decided else fitting_geometry(data, str(given["model"]))
        return cls(**{**recipe, **given, "model_kwargs": {**fitting, **kwargs}})

    def is_exact(self, epoch: int, step: int) -> bool:
        """Whether ``step`` of the run (from 0), in ``epoch`` (from 0), computes exact gradients for a local objective."""
        return epoch >= self.epochs - self.exact_epochs or (
            self.exact_every > 0 and step % self.exact_every == self.exact_every - 1
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, lists for tuples: fit for YAML and for a checkpoint that loads weights only."""
        return {option.name: _plain(getattr(self, option.name)) for option in fields(self)}


def _checked(name: str, rules: Mapping[str, Any], value: Any) -> Any:
    flag = f"--{name.replace('_', '-')}"
    try:
        parsed = rules["parse"](value)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise UserError(f"{flag} must be {_ACCEPTED[rules['parse']]}, got {shown(value)}.") from None
    if rules["choices"] and parsed not in rules["choices"]:
        raise UserError(
            f"{flag} {printable(parsed, 80)} is not one of {', '.join(rules['choices'])}{nearest(parsed, rules['choices'])}"
        )
    limits: tuple[tuple[str, str, Callable[[Any, Any], bool]], ...] = (
        ("at_least", "at least", operator.ge),
        ("above", "above", operator.gt),
        ("below", "below", operator.lt),
        ("at_most", "at most", operator.le),
    )
    for key, words, holds in limits:
        for number in parsed if isinstance(parsed, tuple) else (parsed,):
            if rules[key] is not None and not holds(number, rules[key]):
                raise UserError(f"{flag} must be {words} {rules[key]}, got {parsed}.")
    return parsed


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


# A 2-2-2-2 Swin with two-pixel patches and small windows: what a 32-pixel image needs in place of the 224-pixel design.
_SMALL_SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)}
_SMALL_IMAGES = {
    "model_kwargs": _SMALL_SWIN,
    "epochs": 30,
    "lr": 1e-3,
    "clip_grad": 1.0,
    "smoothing": 0.1,
    "crop_padding": 4,
}
# What differs from the defaults above, by data set. No flip where mirror images are other classes or none (digits).
RECIPES: dict[str, dict[str, Any]] = {
    # 16 tokens, one block per stage; the merging between stages is what tells this Swin where a stroke is.
    "digits": {
        **_SMALL_IMAGES,
        "model_kwargs": {**_SMALL_SWIN, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
        "batch_size": 64,
        "lr": 3e-3,
        "crop_padding": 1,
        "hflip": False,
    },
    "cifar10": _SMALL_IMAGES,
    "cifar100": _SMALL_IMAGES,
    "svhn": {**_SMALL_IMAGES, "hflip": False},
    "fashion-mnist": {**_SMALL_IMAGES, "model_kwargs": {**_SMALL_SWIN, "window_size": 7}, "crop_padding": 2},
    "stl10": {**_SMALL_IMAGES, "model_kwargs": {**_SMALL_SWIN, "patch_size": 4, "window_size": 6}, "crop_padding": 12},
}


# The arguments of a timm model that say how it cuts images up. Whoever sets one of them has thought about the others.
GEOMETRY = {"img_size", "patch_size", "window_size"}
# How models that are made for 224 pixels cut up small images: patches and windows of a Swin, whose grids then need no padding
# (but 7 × 7 merged, on 28 pixels), and patches of a model that attends to all of its tokens, 16 to 144, at once.
_CUTS = {
    "digits": (2, 4, 2),
    "fashion-mnist": (2, 7, 4),
    **dict.fromkeys(("cifar10", "cifar100", "svhn"), (2, 4, 4)),
    "stl10": (4, 6, 8),
}


def fitting_geometry(data: str, model: str) -> dict[str, Any]:
    """Arguments that fit ``model`` to the images of ``data``; none where they are as large as models are made for."""
    if data not in _CUTS:
        return {}
    patch, window, patch_of_all = _CUTS[data]
    swin = model.startswith("swin")
    return {"patch_size": patch, "window_size": window} if swin else {"patch_size": patch_of_all}


LONGEST_FILE, DEEPEST_FILE = 2**16, 10  # bytes and levels; a file with every option has some 3000 and 3


def read_file(path: str | Path) -> dict[str, Any]:
    """The options in a YAML or JSON file, as `TrainConfig.of` takes them (dashes in names count as underscores).

    Raises:
        UserError: the file is missing, is no YAML, is no mapping, or is not what a person writes: longer than
            `LONGEST_FILE`, nested deeper than `DEEPEST_FILE`, with aliases or with a name given twice.
    """
    import yaml

    try:
        with open(path, "rb") as file:
            content = file.read(LONGEST_FILE + 1)
        if len(content) > LONGEST_FILE:
            raise UserError(f"--config {path} is longer than {LONGEST_FILE} bytes.")
        text = content.decode("utf-8")
        _check_yaml(text, path)  # before anything is built: aliases multiply, and nesting is recursion
        options = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}.") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # yaml's constructors let through what int, float and datetime raise for texts that only look like theirs
        raise UserError(f"--config {path} is not valid YAML or JSON: {printable(str(error), 300)}.") from None
    if not isinstance(options, dict):
        raise UserError(f"--config {path} must hold a mapping of options to values, got {type(options).__name__}.")
    return {str(name).replace("-", "_"): value for name, value in options.items()}


def _check_yaml(text: str, path: str | Path) -> None:
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"--config {path} must not have aliases, got *{printable(str(event.anchor), 80)}.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_FILE:
            raise UserError(f"--config {path} must not be nested more than {DEEPEST_FILE} levels deep.")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    names = [str(name.value).replace("-", "_") for name, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    for name, times in Counter(names).items():
        if times > 1:
            raise UserError(f"--config {path} gives {shown(name)} {times} times.")


def to_yaml(config: TrainConfig) -> str:
    """``config`` as YAML that `read_file` reads back to an equal configuration."""
    import yaml

    return yaml.safe_dump(config.to_dict(), sort_keys=False)
