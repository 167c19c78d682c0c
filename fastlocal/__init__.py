"""fastlocal trains a timm vision transformer one module at a time.

    LocalTrainer        trains a model in place, one module at a time
    Backbone            a model of your own as stem, blocks and head
    register_backbone   tells of a whole class of models once
    plan, Plan          the fastest way to train within a memory budget
    kernels             fused ops: attention, window_attention,
                        rotary_embedding, reconstruction_loss;
                        accelerate(model)

The names load on first use, so that ``import fastlocal`` and the command
line's ``--help`` need neither torch nor timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlocal.backbones import Backbone as Backbone
    from fastlocal.backbones import register_backbone as register_backbone
    from fastlocal.planner import Plan as Plan
    from fastlocal.planner import plan as plan
    from fastlocal.trainer import LocalTrainer as LocalTrainer

__version__ = "0.1.0"
_HOMES = {
    "Backbone": "fastlocal.backbones",
    "LocalTrainer": "fastlocal.trainer",
    "Plan": "fastlocal.planner",
    "plan": "fastlocal.planner",
    "register_backbone": "fastlocal.backbones",
}
__all__ = ["Backbone", "LocalTrainer", "Plan", "__version__", "plan", "register_backbone"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastlocal' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "fastlocal"):
            raise
        raise ImportError(
            f"fastlocal.{name} needs {package}, which is not installed; only fastlocal.kernels does with torch and "
            "Triton alone. Install fastlocal with its dependencies (pip without --no-deps)."
        ) from None
