"""The plots of ``fastlocal bench memory``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlocal.memory import Kind
from fastlocal.profiling.cli import UserError
from fastlocal.profiling.memory.setups import MIB, Family
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
_FAMILY_MARKS: dict[Family, tuple[str, str, str]] = {
    "rival": ("#555555", "s", "end-to-end rivals"),
    "exact": ("#0072B2", "^", "fastlocal, exact gradients"),
    "local": ("#D55E00", "o", "fastlocal, local learning"),
}


def plot_timelines(results: Sequence[Result], about: str, path: Path) -> None:
    """Live bytes by kind over one step of each set-up, stacked, on one scale for all: ``path``.png and .svg."""
    pyplot = _pyplot()
    from matplotlib.ticker import FuncFormatter

    columns = 2
    lines = -(-len(results) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(11, 2.5 * lines + 1), squeeze=False, layout="constrained")
    figure.suptitle(f"Memory over one training step: {about}")
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
        # One scale, so that heights compare; a root, so that what is 20 times smaller is still seen.
        axes.set_yscale("function", functions=(lambda y: abs(y) ** 0.5, lambda y: y**2))
        axes.set_ylim(0, 1.05 * highest)
        axes.set_yticks([highest * share for share in (0.01, 0.1, 0.25, 0.5, 1)])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        axes.grid(axis="y", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("live MiB (root scale)")
    for axes in grid[-1]:
        axes.set_xlabel("allocations and releases of one step, % (of equal parts, three are run)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _save(figure, path)


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
    pyplot = _pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    axes.set_title(title, fontsize=11)
    texts = []
    for family, (colour, mark, label) in _FAMILY_MARKS.items():
        own = sorted(((x, r.peak / MIB, r.setup) for x, r in points if r.setup.family == family), key=lambda p: p[:2])
        if not own:
            continue
        axes.scatter([x for x, *_ in own], [y for _, y, _ in own], c=colour, marker=mark, label=label, alpha=0.8)
        front, lowest = [], float("inf")
        for x, y, setup in own:
            if y < 0.97 * lowest:
                lowest = y
                front.append((x, y))
                texts.append((x, y, setup.label if family == "rival" else f"K={setup.modules}", colour))
        axes.step(*zip(*front, strict=True), where="post", color=colour, linewidth=1, alpha=0.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    right = axes.get_xlim()[1]
    axes.set_xlim(-0.03 * right, 1.25 * right)
    axes.set_xlabel(horizontal)
    axes.set_ylabel("peak memory on the device, MiB")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _annotate(figure, axes, texts)
    _save(figure, path)


def _annotate(figure: Any, axes: Any, texts: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each text (x, y, text, colour) beside its point, at the first of some places where it covers no other."""
    figure.canvas.draw()
    taken: list[Any] = []
    for x, y, text, colour in texts:
        for offset in ((6, 3), (6, -9), (6, 13), (6, -19), (6, 23), (6, -29), (6, 33), (6, -39)):
            label = axes.annotate(
                text, (x, y), xytext=offset, textcoords="offset points", fontsize=7, color=colour, annotation_clip=False
            )
            box = label.get_window_extent(figure.canvas.get_renderer())
            if not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            continue  # no room: the table has it
        taken.append(box)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("the plots need matplotlib: pip install 'fastlocal[plots]'.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(path.with_name(f"{path.name}.{suffix}"), dpi=160)
    _pyplot().close(figure)
