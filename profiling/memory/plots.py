"""The plots of ``fastlocal bench memory``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastlocal.memory import Kind
from fastlocal.profiling import plots
from fastlocal.profiling.memory.setups import MIB
from fastlocal.profiling.memory.step import Result

# Okabe and Ito's colours, which the colour-blind tell apart.
_KIND_COLOURS: dict[Kind, str] = {
    "parameters": "#0072B2",
    "optimizer": "#56B4E9",
    "gradients": "#009E73",
    "inputs": "#999999",
    "boundary": "#CC79A7",
    "graph": "#D55E00",
    "temporary": "#F0E442",
}


def plot_timelines(results: Sequence[Result], about: str, path: Path) -> None:
    """Live bytes by kind over one step of each set-up, stacked, on one scale for all: ``path``.png and .svg."""
    if (pyplot := plots.pyplot()) is None:
        return
    from matplotlib.ticker import FuncFormatter

    columns = 2
    lines = -(-len(results) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(11, 2.5 * lines + 1), squeeze=False, layout="constrained")
    figure.suptitle(f"Memory over one training step: {about}, {plots.commit()}")
    for axes in grid.flat[len(results) :]:
        axes.set_visible(False)
    highest = max(result.peak for result in results) / MIB
    for axes, result in zip(grid.flat, results, strict=False):
        last = max(result.timeline[-1][0], 1)
        progress = [100 * index / last for index, _ in result.timeline]
        layers = [[state[kind] / MIB for _, state in result.timeline] for kind in _KIND_COLOURS]
        axes.stackplot(progress, layers, colors=list(_KIND_COLOURS.values()), labels=list(_KIND_COLOURS), linewidth=0)
        axes.set_title(f"{result.setup.label}: {result.peak / MIB:,.0f} MiB", fontsize=10)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 1.05 * highest)  # one scale from zero: what needs a twentieth looks like a twentieth
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        plots.bare(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel("live MiB")
    for axes in grid[-1]:
        axes.set_xlabel("allocations and releases of one step, % (of equal parts, three are run)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    plots.save(figure, path, ("png", "svg"))


def plot_pareto(results: Sequence[Result], about: str, path: Path) -> None:
    """Peak memory against extra compute, with the front of each family: ``path``.png and .svg."""
    plain = results[0]
    points = [(100 * (result.flops / plain.flops - 1), result) for result in results if result.setup.exact in _SHOWN]
    _plot_fronts(points, f"Memory against compute: {about}", "extra compute of a step over E2E, % of FLOPs", path)


def plot_bus(results: Sequence[Result], about: str, path: Path) -> None:
    """Peak memory against bytes over the bus, with the front of each family: ``path``.png and .svg."""
    points = [(result.traffic / 2**30, result) for result in results if result.setup.exact in _SHOWN]
    _plot_fronts(points, f"Memory against the bus: {about}", "GiB over the bus in a step, both ways together", path)


_SHOWN = ("yes", "nearly", "local")  # what trains another model, or a part of it, is in the table only


def _plot_fronts(points: Sequence[tuple[float, Result]], title: str, horizontal: str, path: Path) -> None:
    if (pyplot := plots.pyplot()) is None:
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    axes.set_title(f"{title}, {plots.commit()}", fontsize=11)
    texts = []
    for family, (colour, mark, label) in plots.FAMILIES.items():
        own = [(x, result.peak / MIB, result.setup) for x, result in points if result.setup.family == family]
        if not own:
            continue
        axes.scatter([x for x, *_ in own], [y for _, y, _ in own], c=colour, marker=mark, label=label, alpha=0.8)
        front = [(x, -y) for x, y in plots.front(((x, -y) for x, y, _ in own), tolerance=0.03)]
        axes.step(*zip(*front, strict=True), where="post", color=colour, linewidth=1, alpha=0.6)
        names = {(x, y): setup.label if family == "rival" else f"K={setup.modules}" for x, y, setup in reversed(own)}
        texts += [(x, y, names[x, y], colour) for x, y in front]
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    right = axes.get_xlim()[1]
    axes.set_xlim(-0.03 * right, 1.25 * right)
    axes.set_xlabel(horizontal)
    axes.set_ylabel("peak memory on the device, MiB")
    plots.bare(axes)
    axes.legend(frameon=False)
    plots.label(figure, axes, texts, [(x, result.peak / MIB) for x, result in points])
    plots.save(figure, path, ("png", "svg"))
