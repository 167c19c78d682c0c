"""The two ways to train every module once on a batch."""

from fastlocal.steps.exact import ExactStep
from fastlocal.steps.local import LocalStep

__all__ = ["ExactStep", "LocalStep"]
