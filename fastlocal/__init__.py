"""fastlocal trains a timm vision transformer one module at a time.

The public names load on first use, so that ``import fastlocal`` and the command line's ``--help`` need neither torch
nor timm.
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
    return getattr(importlib.import_module(_HOMES[name]), name)
