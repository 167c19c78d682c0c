"""Options: how a value is read, a flag's text or a file's, and the fields and groups that they make."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, ClassVar

from fastlocal.train.errors import UserError, nearest, printable, shown

# How a value is read, a flag's text or a file's value. Each raises ValueError, TypeError or OverflowError for what it
# cannot read.

LONGEST_TEXT = 4096  # characters in an option; Linux's longest path
LARGEST_WHOLE = 2**63 - 1


def whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or len(str(value)) > 20:
        raise ValueError
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    found = int(value)
    if abs(found) > LARGEST_WHOLE:
        raise ValueError
    return found


def number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(found := float(value)):
        raise ValueError
    return found


def switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    found = str(value)
    if len(found) > LONGEST_TEXT or any(ord(c) < 32 or ord(c) == 127 for c in found):
        raise ValueError
    return found


def folder_name(value: Any) -> str:
    """The name of one folder: neither a path nor hidden, and no longer than file systems take."""
    name = text(value)
    if name != Path(name).name or "\\" in name or name.startswith(".") or len(os.fsencode(name)) > 200:
        raise ValueError
    return name


def numbers(value: Any) -> tuple[float, ...]:
    """``"0.5,0.5,0.5"``, a list, or a single number."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if not parts:
        raise ValueError
    return tuple(number(part) for part in parts)


def whole_numbers(value: Any) -> tuple[int, ...]:
    """``"1,3"``, a list, or a single number."""
    return tuple(whole(part) for part in numbers(value))


def span(value: Any) -> tuple[float, ...]:
    low, high = numbers(value)
    if not 0 < low <= high:
        raise ValueError
    return low, high


def size(value: Any) -> tuple[int, int]:
    """``224``, or height and width: ``"192,256"`` or a list."""
    sides = [whole(side) for side in numbers(value)]
    if len(sides) > 2 or not all(0 < side <= LARGEST_SIDE for side in sides):
        raise ValueError
    return sides[0], sides[-1]


def amount(value: Any) -> str:
    """An amount with a unit. A bare number would be bytes, which nobody means."""
    given = text(value).strip()
    if given.replace(".", "", 1).isdigit() and float(given) < 2**20:
        raise UserError(f"--memory {given} is {given} bytes; did you mean {given}GiB?")
    return given


def modules(value: Any) -> int | str | tuple[int, ...]:
    """``4``, ``"stages"`` or cut points: ``"2,4,6"`` or a list."""
    if value == "stages":
        return "stages"
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and (len(parts) > 1 or not isinstance(value, str)):
        return tuple(whole(part) for part in parts if part != "")  # "8," is one cut, and 8 a number of modules
    return whole(value)


def weights(value: Any) -> float | tuple[float, ...]:
    """One number, or one per module: ``"0.2,0.5,1"`` or a list."""
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and len(parts) > 1:
        return tuple(number(part) for part in parts)
    return number(value)


def names(value: Any) -> tuple[str, ...]:
    """``"stem,blocks.0"``, or a list."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise ValueError
    return tuple(text(part) for entry in parts for part in str(entry).split(",") if part)


def class_weights(value: Any) -> str | tuple[float, ...]:
    """``"balanced"``, or one number per class."""
    if value == "balanced" or (isinstance(value, list | tuple) and tuple(value) == ("balanced",)):
        return "balanced"
    return numbers(value)


def _pairs(value: Any) -> dict[str, Any]:
    """A mapping, or flag texts such as ``["img_size=32", "depths=2,2,2,2"]``."""
    if isinstance(value, Mapping):
        return dict(value)
    pairs = [entry.partition("=") for entry in value]
    if not all(name.isidentifier() and text for name, _, text in pairs):
        raise ValueError
    return {name: _literal(text) for name, _, text in pairs}


def optimizer_arguments(value: Any) -> dict[str, Any]:
    """Of any optimizer; what has a flag of its own is not among them."""
    own = {"lr": "--lr", "weight_decay": "--weight-decay", "momentum": "--momentum", "params": "--freeze"}
    own |= {"betas": "--opt-betas", "eps": "--opt-eps"}
    found = _pairs(value)
    for name in found:
        if name in own:
            raise UserError(f"--opt-kwargs: {name} is what {own[name]} is for.")
    return {text(name): _plain_argument(entry) for name, entry in found.items()}


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


def keywords(value: Any) -> dict[str, Any]:
    """Arguments of a timm model's shape."""
    given = _pairs(value)
    for name in given:
        if name not in MODEL_ARGUMENTS:
            raise UserError(
                f"--model-kwargs: {shown(name)} is no argument of a model's shape{nearest(str(name), MODEL_ARGUMENTS)}"
            )
    return {name: _plain_argument(entry) for name, entry in given.items()}


def _plain_argument(value: Any, nested: int = 0) -> Any:
    if isinstance(value, list | tuple) and len(value) <= 1000 and nested < 2:
        return tuple(_plain_argument(entry, nested + 1) for entry in value)
    if isinstance(value, str):
        return text(value)
    if value is not None and not isinstance(value, bool) and abs(number(value)) > LARGEST_MODEL_ARGUMENT:
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
    for read in (whole, number):
        try:
            return read(inside)
        except (ValueError, OverflowError):
            pass
    return inside.strip("'\"")


SEVERAL = (
    numbers,
    span,
    size,
    keywords,
    names,
    class_weights,
    optimizer_arguments,
)  # readers of options that take several values, separated by spaces or commas
_ACCEPTED = {
    whole: "a whole number",
    number: "a finite number",
    switch: "true or false",
    text: f"a text without control characters of at most {LONGEST_TEXT} characters",
    folder_name: "the name of a folder to be made, without a path and with no dot at its start",
    whole_numbers: "whole numbers such as 1 or 1,3",
    numbers: "finite numbers such as 0.5 or 0.485 0.456 0.406",
    span: "two numbers above 0, the smaller first, such as 0.08 1",
    size: f"one number of pixels, or height and width, up to {LARGEST_SIDE}, such as 224 or 192 256",
    amount: "an amount of memory such as 4GiB",
    modules: "a number of modules, 'stages', or cut points such as 2,4,6",
    names: f"names without control characters of at most {LONGEST_TEXT} characters, such as patch_embed blocks.0",
    class_weights: "'balanced' or finite numbers, one per class",
    optimizer_arguments: f"name=value pairs such as nesterov=true, numbers up to {LARGEST_MODEL_ARGUMENT}",
    weights: "a finite number, or one per module such as 0.2,0.5,1",
    keywords: f"name=value pairs such as img_size=32 depths=2,2,2,2, numbers up to {LARGEST_MODEL_ARGUMENT}",
}


INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest")


def about(
    help: str,
    parse: Callable[[Any], Any] = text,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    flag: str | None = None,
) -> dict[str, Any]:
    """What is known of an option: its sentence for ``--help``, how it is read, what it may be, its name outside its group."""
    limits = {"at_least": at_least, "above": above, "below": below, "at_most": at_most}
    return {"help": help, "parse": parse, "choices": choices, "flag": flag, **limits}


def option(default: Any, help: str, *rules: Any, **limits: Any) -> Any:
    """A field of a group of options; arguments as of `about`."""
    return field(default=default, metadata=about(help, *rules, **limits))


class Options:
    """A group of options, a frozen dataclass that one part of training owns. Their values are read and checked here.

    Raises:
        UserError: a value is not what its field accepts.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None or entry.default is not None:
                object.__setattr__(self, entry.name, checked(entry, value))


def outer_name(entry: Field[Any]) -> str:
    """The name of an option where there are no groups: in a file, as a flag."""
    return entry.metadata["flag"] or entry.name


def flag(name: str) -> str:
    """``--like-this``."""
    return f"--{name.replace('_', '-')}"


def checked(entry: Field[Any], value: Any) -> Any:
    """``value``, read as the option ``entry`` reads it.

    Raises:
        UserError: it is not what the option accepts.
    """
    rules, name = entry.metadata, flag(outer_name(entry))
    try:
        parsed = rules["parse"](value)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise UserError(f"{name} must be {_ACCEPTED[rules['parse']]}, got {shown(value)}.") from None
    if rules["choices"] and parsed not in rules["choices"]:
        raise UserError(
            f"{name} {printable(parsed, 80)} is not one of {', '.join(rules['choices'])}{nearest(parsed, rules['choices'])}"
        )
    limits: tuple[tuple[str, str, Callable[[Any, Any], bool]], ...] = (
        ("at_least", "at least", operator.ge),
        ("above", "above", operator.gt),
        ("below", "below", operator.lt),
        ("at_most", "at most", operator.le),
    )
    for key, words, holds in limits:
        for amount in parsed if isinstance(parsed, tuple) else (parsed,):
            if rules[key] is not None and not isinstance(amount, str) and not holds(amount, rules[key]):
                raise UserError(f"{name} must be {words} {rules[key]}, got {shown(parsed)}.")
    return parsed


def plain(value: Any) -> Any:
    """``value`` with lists for tuples: fit for YAML and for a checkpoint that loads weights only."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value
