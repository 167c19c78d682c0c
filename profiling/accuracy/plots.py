"""The study in three pictures: learning curves, the gap against K, and the gap against extra compute."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlocal.profiling import results
from fastlocal.profiling.accuracy.recipe import Recipe
from fastlocal.profiling.accuracy.table import Group, Row, tiers

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")


def draw(name: str, recipe: Recipe, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw every task and number of epochs that has at least two variants; returns the files."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so no plots: pip install 'fastlocal[plots]'")
        return []
    matplotlib.use("Agg")
    drawn = []
    for task, epochs, found in tiers(rows):
        if len(found) < 2:
            continue
        title = f"{task}, {epochs} epochs"
        stem = results.slug(f"{name}-{task}-{epochs}")
        drawn.append(_save(folder / f"{stem}-curves.png", title, _curves, found, recipe.reference))
        if any(group.variant == recipe.reference for group in found):
            drawn.append(_save(folder / f"{stem}-gap.png", title, _gaps, found, recipe.reference))
    return drawn


def _save(path: Path, title: str, fill: Any, found: Sequence[Group], reference: str) -> Path:
    from matplotlib import pyplot

    figure = fill(pyplot, found, reference)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _curves(pyplot: Any, found: Sequence[Group], reference: str) -> Any:
    """Validation accuracy of the last exit over the epochs: the mean over seeds, and their range."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for group, colour in zip(found, _colours(len(found)), strict=True):
        curves = [[100 * exits[-1] for exits in row["curve"]] for row in group.rows]
        means = [statistics.fmean(at) for at in zip(*curves, strict=True)]
        epochs = range(1, len(means) + 1)
        axes.plot(epochs, means, color=colour, label=f"{group.variant} ({len(curves)} seed{'s' * (len(curves) > 1)})")
        lowest, highest = ([limit(at) for at in zip(*curves, strict=True)] for limit in (min, max))
        axes.fill_between(epochs, lowest, highest, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %")
    _finish(axes)
    return figure


def _gaps(pyplot: Any, found: Sequence[Group], reference: str) -> Any:
    """Points behind the reference, against the number of modules and against extra compute."""
    exact = next(group for group in found if group.variant == reference)
    figure, (by_modules, by_compute) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for group, colour in zip(found, _colours(len(found)), strict=True):
        gaps = group.gap(exact)
        if not gaps:
            continue
        gap, error = statistics.fmean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        modules = len(group.rows[0]["exits"]) if group is not exact else group.rows[0]["modules"]
        extra = 100 * (group.mean("flops_ratio") - 1)
        for axes, x in ((by_modules, modules), (by_compute, extra)):
            axes.errorbar(x, gap, error, color=colour, marker="o", capsize=3, linestyle="none", label=group.variant)
    by_modules.set(xlabel="modules K", ylabel=f"points behind {reference}")
    by_compute.set(xlabel="extra compute over plain training, % of FLOPs")
    for axes in (by_modules, by_compute):
        axes.axhline(0, color="black", linewidth=0.8)
    _finish(by_compute)
    by_modules.grid(alpha=0.2)
    return figure


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
