"""``make soak``: each part goes on where its rows in ``.soak/rows.jsonl`` end; ``--share 0.1`` does a tenth of everything."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from soak import crews, disk, kernels, kills, mutations, steps
from soak.processes import Processes

KILLS, CREWS, MUTANTS, DISKS, SECONDS, BATCH, COMPARISONS = 500, 90, 100_000, 500, 3600, 500, 2500


class Rows:
    """Outcomes so far, on disk."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.path = folder / "rows.jsonl"
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, part: str, name: str | None = None) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["part"] == part and name in (None, row["name"])]


def soak_kills(rows: Rows, folder: Path, share: float) -> None:
    with Processes() as processes:
        for setup in kills.SETUPS:
            done = rows.of("kill", setup)
            left = KILLS * share / len(kills.SETUPS) - sum(row["kills"] for row in done)
            if left <= 0:
                continue
            for trial in kills.trials(processes, folder / "kills", setup, seed=len(done)):
                rows.add(part="kill", name=setup, trials=1, kills=trial.kills, wrong=trial.lost)
                left -= trial.kills
                if left <= 0:
                    break


def soak_crews(rows: Rows, folder: Path, share: float) -> None:
    with Processes() as processes:
        for setup in crews.SETUPS:
            done = rows.of("crews", setup)
            left = CREWS * share / len(crews.SETUPS) - sum(row["kills"] for row in done)
            if left <= 0:
                continue
            for trial in crews.trials(processes, folder / "crews", setup, seed=len(done)):
                seconds = round(trial.seconds, 1)
                rows.add(part="crews", name=setup, trials=1, kills=trial.kills, wrong=trial.lost, seconds=seconds)
                left -= trial.kills
                if left <= 0:
                    break


def soak_disks(rows: Rows, folder: Path, share: float) -> None:
    done = len(rows.of("disk"))
    if done < DISKS * share:
        with Processes() as processes:
            trials = disk.trials(processes, folder / "disks", seed=done)
            for limit, wrong in islice(trials, int(DISKS * share) - done):
                rows.add(part="disk", name="full disk", trials=1, limit=limit, wrong=wrong)


def soak_mutants(rows: Rows, folder: Path, share: float) -> None:
    torch.set_num_threads(1)
    targets = list(mutations.targets(folder / "mutants"))
    weights = {target.name: target.share for target in targets}
    for target in targets:
        wanted = MUTANTS * share * weights[target.name] / sum(weights.values())
        while (done := sum(row["trials"] for row in rows.of("mutants", target.name))) < wanted:
            tally = mutations.try_mutants(target, min(BATCH, int(wanted - done) + 1), seed=done)
            wrong = "; ".join(tally.examples)
            rows.add(part="mutants", name=target.name, trials=tally.outcomes.total(), **tally.outcomes, wrong=wrong)


def soak_steps(rows: Rows, folder: Path, share: float) -> None:
    if not rows.of("steps"):
        with Processes() as processes:
            looks = list(steps.looks(processes, folder / "steps", SECONDS * share))
        grown = {name: looks[-1][name] - looks[0][name] for name in looks[0]}
        wrong = [name for name, by in grown.items() if by > (looks[0][name] * 0.05 if name == "bytes" else 0)]
        rows.add(
            part="steps",
            name="steps",
            trials=1,
            seconds=SECONDS * share,
            first=looks[0],
            last=looks[-1],
            wrong=" ".join(wrong),
        )


def soak_kernels(rows: Rows, folder: Path, share: float) -> None:
    torch.set_num_threads(1)
    done = len(rows.of("kernels"))
    for found in islice(kernels.comparisons(seed=done), max(0, int(COMPARISONS * share) - done)):
        rows.add(part="kernels", name=f"{found.op}, {found.dtype}", trials=1, error=found.error, wrong=found.wrong)


def table(rows: Rows) -> str:
    """What was tried, and what came of it."""
    lines = [f"{'part':9s}{'what':30s}{'tried':>8s}  outcome"]
    for part, name in dict.fromkeys((row["part"], row["name"]) for row in rows.rows):
        mine = rows.of(part, name)
        numbers: Counter[str] = Counter()
        for row in mine:
            numbers.update(
                {key: value for key, value in row.items() if isinstance(value, int) and key not in ("trials", "limit")}
            )
        wrong = [row["wrong"] for row in mine if row["wrong"]]
        told = ", ".join(f"{value} {key}" for key, value in numbers.items())
        if part == "steps":
            told = f"{mine[0]['seconds']:.0f} s, first {mine[0]['first']}, last {mine[0]['last']}"
        if part == "crews":
            told += f", the others stopped within {max((row['seconds'] for row in mine if row['kills']), default=0.0):.1f} s"
        if part == "kernels":
            told = f"worst error {max(row['error'] for row in mine):.1e}"
        tried = sum(row["trials"] for row in mine)
        lines.append(
            f"{part:9s}{name:30s}{tried:8d}  {told}{', ' if told else ''}{f'WRONG: {wrong[:2]}' if wrong else 'nothing lost'}"
        )
    return "\n".join(lines)


PARTS = {
    "kills": soak_kills,
    "crews": soak_crews,
    "disks": soak_disks,
    "mutants": soak_mutants,
    "steps": soak_steps,
    "kernels": soak_kernels,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="|".join(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of trials")
    parser.add_argument("--folder", type=Path, default=Path(".soak"), help="where trials and rows go")
    given = parser.parse_args()
    rows = Rows(given.folder)
    try:
        for part in given.parts:
            PARTS[part](rows, given.folder.resolve(), given.share)
    finally:
        print(table(rows))
    return 1 if any(row["wrong"] for row in rows.rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
