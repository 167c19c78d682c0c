"""A trained model for others: a run folder as timm's ``local-dir``, ONNX, torch.export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from fastlocal.train.build import input_arguments
from fastlocal.train.checkpoint import write_atomically
from fastlocal.train.config import TrainConfig
from fastlocal.train.data import Preprocessing
from fastlocal.train.errors import UserError, printable


def local_dir_configuration(config: TrainConfig, preprocessing: Preprocessing, classes: Sequence[str]) -> bytes:
    """``config.json`` beside ``model.safetensors``: ``timm.create_model("local-dir:RUN", pretrained=True)`` is the model.

    Label names, mean, std, crop and interpolation are where timm looks for them.
    """
    architecture = config.model.name.partition(".")[0]
    known = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    names = {"first_conv": known.first_conv, "classifier": known.classifier} if known else {}
    content = {
        "architecture": architecture,
        "num_classes": len(classes),
        "label_names": list(classes),
        "model_args": {**config.to_dict()["model_kwargs"], **input_arguments(config, preprocessing.image_size)},
        "pretrained_cfg": {
            "input_size": [preprocessing.channels, *preprocessing.image_size],
            "fixed_input_size": True,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": preprocessing.crop_mode,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            **names,
        },
    }
    return (json.dumps(content, indent=2) + "\n").encode()


class WithPreprocessing(nn.Module):
    """Probabilities [B, classes] for images [B, C, H, W], uint8 values as float32: normalization and softmax included.

    What comes before (reading, resizing, cropping) is what ``config.json`` says and timm's transform does.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1) * 255)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model((images - self.mean) / self.std).softmax(-1)


def load_run(run: Path) -> tuple[nn.Module, Preprocessing, tuple[str, ...]]:
    """The trained model of a run folder, in eval mode, with its preprocessing and the names of its classes.

    Raises:
        UserError: it is none, or has no trained model yet.
    """
    try:
        content = json.loads((run / "config.json").read_text(encoding="utf-8"))
        model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
        known = content["pretrained_cfg"]
        preprocessing = Preprocessing(
            image_size=tuple(known["input_size"][1:]),
            channels=known["input_size"][0],
            in_memory=False,
            mean=tuple(known["mean"]),
            std=tuple(known["std"]),
            interpolation=known["interpolation"],
            crop_pct=known["crop_pct"],
            crop_mode=known["crop_mode"],
        )
        return model, preprocessing, tuple(map(str, content["label_names"]))
    except FileNotFoundError:
        raise UserError(f"{run} holds no trained model: there is no {run / 'config.json'}.") from None
    except Exception as error:  # files that others wrote fail anywhere in the readers
        raise UserError(f"{run} holds no model that timm can load: {printable(str(error), 200).rstrip('.')}.") from None


def export(run: Path, target: Path, form: str) -> None:
    """Write the trained model of ``run`` to ``target``: from pixels 0…255 to probabilities, any batch size.

    Args:
        form: ``"onnx"`` or ``"torch-export"``.

    Raises:
        UserError: there is no trained model, or a package is missing.
    """
    model, preprocessing, classes = load_run(run)
    whole = WithPreprocessing(model, preprocessing).eval()
    example = torch.zeros(2, preprocessing.channels, *preprocessing.image_size)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    if form == "torch-export":
        program = torch.export.export(whole, (example,), dynamic_shapes=dynamic)
        names = {"label_names.json": json.dumps(list(classes))}
        write_atomically(target, lambda file: torch.export.save(program, file, extra_files=names))
        return
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"fastlocal export --onnx needs {error.name}: pip install onnx onnxscript.") from None
    options: dict[str, Any] = {"dynamo": True, "input_names": ["images"], "output_names": ["probabilities"]}
    converted = torch.onnx.export(whole, (example,), None, dynamic_shapes=dynamic, verbose=False, **options)
    assert converted is not None
    content = converted.model_proto
    entry = content.metadata_props.add()
    entry.key, entry.value = "label_names", json.dumps(list(classes))
    onnx.checker.check_model(content)
    write_atomically(target, lambda file: file.write(content.SerializeToString()))
