"""``curves.png``: loss and accuracy of every exit, and the learning rate, over the epochs of a run."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from typing import IO, Any

DRAWN = {"epoch", "exits", "loss", "accuracy", "validation_loss", "validation_accuracy", "lr"}  # of a row
SHARE = 0.05  # of a run's time that drawing may take; what is left out is drawn at the end


class Curves:
    """Draws the rows of ``metrics.jsonl``, as often as epochs are long enough for it."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._spent, self._begun = 0.0, time.monotonic()
        self.possible = importlib.util.find_spec("matplotlib") is not None

    @property
    def due(self) -> bool:
        return self.possible and self._spent <= SHARE * (time.monotonic() - self._begun)

    def draw(self, rows: Sequence[dict[str, Any]], file: IO[bytes]) -> None:
        """Write a PNG of ``rows`` to ``file``."""
        from matplotlib.figure import Figure

        since = time.monotonic()
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        figure.suptitle(self._title.replace("$", r"\$"), fontsize=9)
        epochs, exits = [row["epoch"] for row in rows], rows[-1]["exits"]
        for place, (title, training, validation) in enumerate(
            (("loss", "loss", "validation_loss"), ("accuracy", "accuracy", "validation_accuracy")), start=1
        ):
            axes = figure.add_subplot(1, 3, place, title=title, xlabel="epoch")
            for exit, name in enumerate(exits):
                [line] = axes.plot(epochs, [row[validation][exit] for row in rows], ".-", label=name)
                axes.plot(epochs, [row[training][exit] for row in rows], ":", color=line.get_color())
            if title == "accuracy" and "ema_validation_accuracy" in rows[-1]:
                axes.plot(epochs, [row["ema_validation_accuracy"] for row in rows], "k--", label="moving average")
            axes.grid(alpha=0.3)
        axes.legend(fontsize=7, title="validation (dotted: training)", title_fontsize=7)
        axes = figure.add_subplot(1, 3, 3, title="learning rate", xlabel="epoch")
        axes.plot(epochs, [row["lr"] for row in rows], ".-", color="tab:gray")
        axes.grid(alpha=0.3)
        figure.savefig(file, format="png", dpi=100)
        self._spent += time.monotonic() - since
