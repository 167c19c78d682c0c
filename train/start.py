"""What training starts from: weights in any of the wrappers that people find them in, fitted to the model by timm."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from timm.models import load_model_config_from_hf, load_state_dict_from_hf
from torch import Tensor, nn

from fastlocal.train.errors import UserError, printable

# Where the weights lie in what training scripts save, in this order: timm's averages, ours, DINO's teacher, Lightning, others.
WRAPPERS = ("state_dict_ema", "model_ema", "trainer", "ema", "teacher", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "student.", "teacher.")


@dataclass(frozen=True)
class StartingPoint:
    """Weights by name, before they are fitted to a model.

    Attributes:
        taken: which of a file's were taken, for people.
        labels: names of the classes that its classifier knows, if it says so.
        preprocessing: what timm's ``pretrained_cfg`` says of it, if it says so.
    """

    weights: Mapping[str, Tensor]
    taken: str
    labels: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def read_start(place: str) -> StartingPoint:
    """The weights at ``place``: a file, a run folder or another folder that timm loads, ``local-dir:…`` or ``hf-hub:…``.

    Raises:
        UserError: there are none, or the file would run code.
    """
    try:
        if place.startswith("hf-hub:"):
            name = place.removeprefix("hf-hub:")
            said, weights = load_model_config_from_hf(name)[0], dict(load_state_dict_from_hf(name))
            return StartingPoint(weights, place, tuple(map(str, said.get("label_names") or ())), _preprocessing(said))
        path, about = Path(place.removeprefix("local-dir:")), {}
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(
                f"--initial-checkpoint {place} is a folder without config.json, which a run and what timm saves have."
            )
        if path.is_dir():
            about = json.loads((path / "config.json").read_text(encoding="utf-8"))
            path = path / "model.safetensors"
        elif not path.is_file():
            raise UserError(f"--initial-checkpoint {place} is no file.")
        tree = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"--initial-checkpoint {place} is no checkpoint, or holds more than tensors and plain values; none of it was run."
        ) from None
    except Exception as error:  # each reader has its own for what is no checkpoint, or holds code
        raise UserError(
            f"--initial-checkpoint {place} cannot be loaded: {printable(str(error), 200).rstrip('.')}."
        ) from None
    weights, taken = _unwrapped(tree)
    if not weights:
        raise UserError(f"--initial-checkpoint {place} holds no weights.")
    labels = tuple(
        map(str, about.get("label_names") or (tree.get("classes") if isinstance(tree, dict) else None) or ())
    )
    return StartingPoint(
        weights, " ".join([path.name, *taken]), labels, _preprocessing(about.get("pretrained_cfg", {}))
    )


def _preprocessing(said: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in said.items() if name in kept}


def _unwrapped(tree: Any) -> tuple[dict[str, Tensor], list[str]]:
    for name in WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(name), Mapping):
            weights, taken = _unwrapped(tree[name])
            if weights:
                return weights, [name, *taken]
    if not isinstance(tree, Mapping):
        return {}, []
    return {str(name): value for name, value in tree.items() if isinstance(value, Tensor)}, []


def fitted(start: StartingPoint, model: nn.Module, classes: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Arguments for ``timm.create_model`` that load ``start``, and what is done to it, for people.

    timm resizes position embeddings and relative position tables, fits the first layer to the channels, and leaves the
    classifier new where it is of other classes.

    Args:
        model: such as `create_model` would make without.
        classes: that it is to tell apart.

    Raises:
        UserError: parameters of the model are missing.
    """
    configuration = cast(Any, model).pretrained_cfg
    names = {name for name, _ in model.named_parameters()}
    heads = configuration.get("classifier") or "head"
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    body = {name for name in names if not name.startswith(tuple(f"{head}." for head in heads))}
    weights = max(_stripped(start.weights), key=lambda candidate: len(body & candidate.keys()))
    missing = sorted(body - weights.keys())
    if missing:
        raise UserError(
            f"--initial-checkpoint: {start.taken} holds the weights of another model: {len(missing)} of {len(body)} parameters"
            f" are missing, such as {missing[0]}."
        )
    weights = {name: value for name, value in weights.items() if name in model.state_dict()}
    known = weights.get(f"{heads[0]}.weight")
    count = len(known) if known is not None else 0
    same = count == len(classes) and (not start.labels or start.labels == classes)
    sentence = f"{start.taken}, " + (
        "with its classifier" if same else f"with a new classifier (it knows {count} classes)"
    )
    overlay = {"state_dict": weights, "num_classes": len(classes) if same else -1, "custom_load": False, "source": ""}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}, sentence


def _stripped(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """``weights``, and what is left of them without each common prefix."""
    yield dict(weights)
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if inside:
            yield from _stripped(inside)
