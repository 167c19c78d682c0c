"""What the benchmarks' plots share: colours, titles that say what was measured, labels that do not overlap, files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastlocal.profiling import results

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
# Family of a set-up -> colour, mark and what the legend calls it.
FAMILIES: dict[str, tuple[str, str, str]] = {
    "rival": ("#555555", "s", "end-to-end rivals"),
    "exact": ("#0072B2", "^", "fastlocal, exact gradients"),
    "local": ("#D55E00", "o", "fastlocal, local learning"),
}
# Where a label may stand, in points from its mark: near ones first, then farther ones, which get a line to it.
_PLACES = [(side * x, y) for y in (3, -9, 13, -19, 23, -29, 33, -39, 45, -51) for side in (1, -1) for x in (7,)]


def pyplot() -> Any:
    """matplotlib's pyplot, which draws into files; None, with a word, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so no plots: pip install 'fastlocal[plots]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def commit(rows: Iterable[results.Row] = ()) -> str:
    """``"commit …"`` of ``rows``, or of this checkout, for the end of a title; of more than two it has only the number."""
    found = sorted({str(row["commit"]) for row in rows if "commit" in row}) or [results.origin()["commit"]]
    return f"commit {', '.join(found)}" if len(found) <= 2 else f"{len(found)} commits, which the rows name"


def save(figure: Any, path: Path, suffixes: Sequence[str] = ("png",)) -> Path:
    """Write ``path``.png, and the like, and close the figure; returns the first."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in suffixes]
    for file in files:
        figure.savefig(file, dpi=160)
    pyplot.close(figure)
    return files[0]


def bare(axes: Any) -> None:
    """A light grid, and no frame where there is no scale."""
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def front(points: Iterable[tuple[float, float]], tolerance: float = 0.0) -> list[tuple[float, float]]:
    """Those of (cost, gain) that no other beats in both, by cost; a gain counts if it is larger by ``tolerance`` of itself."""
    best, kept = float("-inf"), []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if gain > best + tolerance * abs(best if best != float("-inf") else 0):
            best = gain
            kept.append((cost, gain))
    return kept


def label(
    figure: Any, axes: Any, texts: Sequence[tuple[float, float, str, str]], marks: Sequence[tuple[float, float]]
) -> None:
    """Write each text (x, y, text, colour) beside its point, where it covers no other text, no mark and not the legend.

    One that fits nowhere is left out: the table has it.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(list(marks))] if marks else []
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent(renderer))
    inside = axes.get_window_extent(renderer)
    for x, y, text, colour in texts:
        for offset in _PLACES:
            far = abs(offset[1]) > 10
            note = axes.annotate(
                text,
                (x, y),
                xytext=offset,
                textcoords="offset points",
                ha="left" if offset[0] > 0 else "right",
                fontsize=7,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6} if far else None,
            )
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer)  # of the words, without the line
            if inside.contains(*box.min) and inside.contains(*box.max) and not any(map(box.overlaps, taken)):
                taken.append(box)
                break
            note.remove()
