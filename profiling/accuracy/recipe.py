"""A study as data: which ways of training are compared, on what, how often."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastlocal.profiling import results
from fastlocal.profiling.accuracy import recipes
from fastlocal.profiling.cli import UserError
from fastlocal.train.config import TrainConfig
from fastlocal.train.errors import nearest

Options = Mapping[str, Any]


@dataclass(frozen=True)
class OfEpochs:
    """A value that grows with the number of epochs, so that one recipe serves short and long runs."""

    share: float


@dataclass(frozen=True)
class Recipe:
    """What is trained: every variant on every task with every seed. Options are those of `TrainConfig`.

    Attributes:
        base: options that all runs share.
        tasks: name of a data set, as tables show it -> its options.
        variants: name of a way to train -> its options, which may be `OfEpochs`.
        seeds: those that a choice is made on. A claim needs others.
        reference: the variant that gaps are measured from.
        published: (task, variant) -> published accuracy in per cent, shown beside ours.
        note: what a reader of the table has to know.
    """

    base: Options
    tasks: Mapping[str, Options]
    variants: Mapping[str, Options]
    seeds: Sequence[int] = (0, 1, 2)
    reference: str = "end-to-end"
    published: Mapping[tuple[str, str], float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Job:
    """One run of a recipe."""

    task: str
    variant: str
    config: TrainConfig

    @property
    def key(self) -> dict[str, Any]:
        """What tells its row from others: everything that the result hangs on."""
        return {"task": self.task, "variant": self.variant, "options": lasting(self.config.to_dict())}


def lasting(options: Options) -> dict[str, Any]:
    """Those of ``options`` that the result hangs on. The data are told by the task: a path is another on every machine."""
    from fastlocal.train.loop import RESUMABLE

    passing = {"output", "experiment"} | RESUMABLE - {"epochs", "exact_epochs", "exact_every"}
    return {name: value for name, value in options.items() if name not in passing}


def names() -> list[str]:
    """The recipes that come along."""
    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


def load(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        UserError: there is none; the nearest is suggested.
    """
    if name not in names():
        raise UserError(f"--recipe {name} is not one of {', '.join(names())}{nearest(name, names())}")
    recipe: Recipe = importlib.import_module(f"{recipes.__name__}.{name}").RECIPE
    return recipe


def on(recipe: Recipe, data: str) -> Recipe:
    """``recipe`` with ``data`` for its only task; a row must not bear the name of what it was not trained on."""
    return replace(recipe, tasks={data: {"data": data}}, published={})


def jobs(name: str, recipe: Recipe, given: Options, tasks: Sequence[str], variants: Sequence[str]) -> Iterator[Job]:
    """The runs of ``recipe``, in the order that makes it comparable soonest: seed by seed, the variants side by side.

    Args:
        given: options that override the recipe's, and may hold ``seeds``.

    Raises:
        UserError: an option is not what `TrainConfig` accepts.
    """
    seeds = given.get("seeds", recipe.seeds)
    overriding = {option: value for option, value in given.items() if option != "seeds"}
    for seed in seeds:
        for task in tasks:
            for variant in variants:
                options = _merged(recipe.base, recipe.tasks[task], recipe.variants[variant], overriding, {"seed": seed})
                epochs = TrainConfig.of(
                    **{n: v for n, v in options.items() if not isinstance(v, OfEpochs)}
                ).optimization.epochs
                options = {n: round(v.share * epochs) if isinstance(v, OfEpochs) else v for n, v in options.items()}
                folder = results.slug(f"{name}-{task}-{variant}-{epochs}-epochs-seed-{seed}")
                yield Job(task, variant, TrainConfig.of(**options, experiment=folder))


def _merged(*levels: Options) -> dict[str, Any]:
    """Each level over the one before; the arguments of the model are merged one by one, and another model drops them."""
    merged: dict[str, Any] = {}
    for level in levels:
        kept = {} if "model" in level else merged.pop("model_kwargs", {})
        keywords = {**kept, **level.get("model_kwargs", {})}
        merged |= level
        if keywords:
            merged["model_kwargs"] = keywords
    return merged
