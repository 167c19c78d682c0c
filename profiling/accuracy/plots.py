"""The study in three pictures: learning curves, the gap against K, and the gap against extra compute."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlocal.profiling import plots, results
from fastlocal.profiling.accuracy.recipe import Recipe
from fastlocal.profiling.accuracy.table import Group, Row, tiers


def draw(name: str, recipe: Recipe, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw every tier that has at least two variants; returns the files."""
    if (pyplot := plots.pyplot()) is None:
        return []
    drawn = []
    for tier in tiers(recipe, rows):
        found = tier.groups
        if len(found) < 2:
            continue
        every = [row for group in found for row in group.rows]
        title = f"{_model(every)} on {tier.task}\n{tier.title}, {plots.commit(every)}"
        stem = results.slug(f"{name}-{tier.task}-{tier.epochs}{'-claims' * tier.claims}")
        drawn.append(_save(folder / f"{stem}-curves", title, _curves(pyplot, found)))
        if any(group.variant == recipe.reference for group in found):
            drawn.append(_save(folder / f"{stem}-gap", title, _gaps(pyplot, found, recipe.reference)))
    return drawn


def _save(path: Path, title: str, figure: Any) -> Path:
    figure.suptitle(title, fontsize=10)
    return plots.save(figure, path)


def _model(rows: Sequence[Row]) -> str:
    """The models and batch sizes of ``rows``."""
    found = {(row["model"], row["options"].get("batch_size")) for row in rows}
    return " and ".join(f"{model}, batch {batch}" if batch else str(model) for model, batch in sorted(found, key=str))


def _curves(pyplot: Any, found: Sequence[Group]) -> Any:
    """Validation accuracy of the last exit over the epochs: the mean over seeds, and their range."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for group, look in zip(found, _looks(len(found)), strict=True):
        curves = [[100 * exits[-1] for exits in row["curve"]] for row in group.rows]
        means = [statistics.fmean(at) for at in zip(*curves, strict=True)]
        epochs = range(1, len(means) + 1)
        several = "s" * (len(curves) > 1)
        axes.plot(epochs, means, look.line, color=look.colour, label=f"{group.variant} ({len(curves)} seed{several})")
        lowest, highest = ([limit(at) for at in zip(*curves, strict=True)] for limit in (min, max))
        axes.fill_between(epochs, lowest, highest, color=look.colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %")
    _finish(axes)
    return figure


def _gaps(pyplot: Any, found: Sequence[Group], reference: str) -> Any:
    """Points behind the reference, against the number of modules and against extra compute."""
    exact = next(group for group in found if group.variant == reference)
    figure, (by_modules, by_compute) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    drawn = [(group, look) for group, look in zip(found, _looks(len(found)), strict=True) if group.gap(exact)]
    modules = [_modules(group) for group, _ in drawn]
    for i, (group, look) in enumerate(drawn):
        gaps = group.gap(exact)
        gap, error = statistics.fmean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        # Those of one K stand side by side.
        beside = modules[i] + 0.06 * (modules[:i].count(modules[i]) - (modules.count(modules[i]) - 1) / 2)
        extra = 100 * (group.mean("flops_ratio") - 1)
        for axes, x in ((by_modules, beside), (by_compute, extra)):
            drawing = {"color": look.colour, "marker": look.marker, "capsize": 3, "linestyle": "none"}
            axes.errorbar(x, gap, error, label=group.variant, **drawing)
    by_modules.set(xlabel="modules K", ylabel=f"points behind {reference}", xticks=sorted(set(modules)))
    by_compute.set(xlabel="extra compute over plain training, % of FLOPs")
    for axes in (by_modules, by_compute):
        axes.axhline(0, color="black", linewidth=0.8)
    _finish(by_compute)
    by_modules.grid(alpha=0.2)
    return figure


def _modules(group: Group) -> int:
    """K: as asked for, or, where that is no number, what came of it. A frozen module has no exit."""
    asked = group.rows[0]["modules"]
    return asked if isinstance(asked, int) else len(group.rows[0]["exits"])


@dataclass(frozen=True)
class _Look:
    colour: str
    line: str
    marker: str


def _looks(count: int) -> list[_Look]:
    """One for each variant, up to 24 different ones: once the colours are used up, another line and marker."""
    found = [_Look(colour, *drawn) for drawn in (("-", "o"), ("--", "s"), (":", "^")) for colour in plots.COLOURS]
    return [found[i % len(found)] for i in range(count)]


def _finish(axes: Any) -> None:
    plots.bare(axes)
    axes.legend(frameon=False, fontsize=8)
