"""Rows as a Markdown table: accuracy of every exit, mean ± standard deviation over seeds, beside its price."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastlocal.profiling import results
from fastlocal.profiling.accuracy.recipe import Recipe

Row = results.Row


@dataclass(frozen=True)
class Group:
    """The rows of one variant on one task, which differ in their seeds."""

    task: str
    epochs: int
    variant: str
    rows: tuple[Row, ...]

    @property
    def accuracies(self) -> dict[int, float]:
        """Seed -> validation accuracy of the last exit, in per cent."""
        return {row["seed"]: 100 * row["accuracy"][-1] for row in self.rows}

    def mean(self, name: str) -> float:
        """The mean of a number in the rows."""
        return statistics.fmean(row[name] for row in self.rows)

    def on(self, card: str) -> Group:
        """The rows taken on ``card`` alone, perhaps none."""
        return replace(self, rows=tuple(row for row in self.rows if row["card"] == card))

    def gap(self, reference: Group) -> list[float]:
        """Points behind ``reference``, seed by seed, where both have the seed."""
        other = reference.accuracies
        return [other[seed] - accuracy for seed, accuracy in self.accuracies.items() if seed in other]


def groups(rows: Sequence[Row]) -> list[Group]:
    """Rows by task, epochs and variant, in the order of their first appearance; of two with one seed the later counts."""
    found: dict[tuple[str, int, str], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["epochs"], row["variant"]), {})[row["seed"]] = row
    return [Group(task, epochs, variant, tuple(by.values())) for (task, epochs, variant), by in found.items()]


@dataclass(frozen=True)
class Tier:
    """What may be compared: the groups of one task, one number of epochs, and either the seeds that a choice is made on or
    those that nothing was chosen on, whose means are claims."""

    task: str
    epochs: int
    claims: bool
    groups: tuple[Group, ...]

    @property
    def title(self) -> str:
        return f"{self.epochs} epochs" + ", seeds that nothing was chosen on" * self.claims


def tiers(recipe: Recipe, rows: Sequence[Row]) -> Iterator[Tier]:
    """Those of the seeds that a choice is made on, then the claims."""
    for claims in (False, True):
        everything = groups([row for row in rows if (row["seed"] not in recipe.seeds) is claims])
        for task, epochs in dict.fromkeys((group.task, group.epochs) for group in everything):
            found = (group for group in everything if (group.task, group.epochs) == (task, epochs))
            yield Tier(task, epochs, claims, tuple(found))


def markdown(recipe: Recipe, rows: Sequence[Row]) -> str:
    """A table for each tier."""
    return "\n\n".join(([recipe.note] if recipe.note else []) + [_table(recipe, tier) for tier in tiers(recipe, rows)])


def _table(recipe: Recipe, tier: Tier) -> str:
    found = tier.groups
    reference = next((group for group in found if group.variant == recipe.reference), None)
    longest = max((group.rows[0]["exits"] for group in found), key=len)
    # What is learned does not hang on the card. How fast and in how many bytes does, and is told of one.
    card = Counter(row["card"] for group in found for row in group.rows).most_common(1)[0][0]
    lines: list[dict[str, Any]] = []
    for group in found:
        exits = {
            name: f"{100 * statistics.fmean(row['accuracy'][row['exits'].index(name)] for row in group.rows):.1f}"
            for name in group.rows[0]["exits"][:-1]
        }
        gaps = group.gap(reference) if reference is not None and group is not reference else []
        published = recipe.published.get((tier.task, group.variant))
        timed = group.on(card)
        peaks = [row["peak_bytes"] for row in timed.rows if row["peak_bytes"] is not None]
        lines.append(
            {
                "recipe": group.variant,
                "flops": f"{group.mean('flops_ratio'):.3f}",
                **exits,
                "accuracy": spread(list(group.accuracies.values())),
                "gap": spread(gaps, sign=True) if gaps else "",
                "seeds": ", ".join(map(str, sorted(group.accuracies))),
                "speed": timed.mean("images_per_second") if timed.rows else None,
                "peak": f"{statistics.fmean(peaks) / 2**20:,.0f}" if peaks else None,
                **({"published": f"{published:.2f}"} if published is not None else {}),
            }
        )
    columns = {"recipe": "recipe", "flops": "FLOPs ×"} | {name: f"{name} %" for name in longest[:-1]}
    columns |= {"accuracy": "accuracy %", "gap": f"points behind {recipe.reference}", "seeds": "seeds"}
    columns |= {"speed": "images/s", "peak": "peak MiB"}
    if any("published" in line for line in lines):
        columns["published"] = "published %"
    images = "{train_images:,} + {validation_images:,} images".format(**found[0].rows[0])
    heading = f"{tier.task}, {images}, {tier.title}; images/s and peak MiB on {card}"
    return f"{heading}\n\n{results.markdown_table(lines, columns)}"


def spread(values: Sequence[float], *, sign: bool = False) -> str:
    """``mean ± standard deviation``; one value has none, and shows as itself."""
    mean = f"{statistics.fmean(values):{'+' if sign else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
