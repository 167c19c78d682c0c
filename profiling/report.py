"""``fastlocal bench report``: every result row under profiling/results as tables and plots, one section per card, and what
was counted without one: memory, traffic and compiled kernels.

A table holds the latest row of each measurement of one card, each with the commit it was taken at. A folder whose rows
come from two cards is refused. Plots need matplotlib and are left out, with a word, where it is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlocal.profiling import plots, results
from fastlocal.profiling.card import caps, suite, throughput
from fastlocal.profiling.cli import ArgumentParser, UserError
from fastlocal.profiling.kernels import block_traffic, compile_report, timing, traffic_report
from fastlocal.profiling.kernels.workloads import OURS

Row = Mapping[str, Any]
# What tells one measurement from another; of several rows of one measurement the latest counts.
IDENTITY = {
    "correctness": ("op", "shape", "dtype", "implementation"),
    "kernels": ("op", "shape", "dtype", "provider", "direction"),
    "meter": ("model", "batch_size", "name"),
    "throughput": ("model", "image_size", "batch_size", "name"),
    "trace": ("model", "batch_size", "name"),
    "caps": ("model", "image_size", "batch_size", "cap", "name"),
    "train": ("data", "objective", "modules", "kernels", "epochs"),
}


def main(argv: list[str]) -> int:
    """Write ``README.md`` and the plots into the folder of the results; returns the exit code."""
    parser = ArgumentParser(prog="fastlocal bench report", description=__doc__)
    parser.add_argument("--output", type=Path, default=results.RESULTS, help="folder of the results (%(default)s)")
    arguments = parser.parse_args(argv)
    cards = {folder: rows for folder in sorted(_folders(arguments.output)) if (rows := read_card(folder))}
    counted = list(uncarded(arguments.output))
    if not cards and not counted:
        raise UserError(f"--output: no result rows under {arguments.output}; run a benchmark or the suite first.")
    sections = [section(folder, rows, draw(folder, rows)) for folder, rows in cards.items()]
    path = arguments.output / "README.md"
    path.write_text("\n\n".join(["# Results", _PREAMBLE, *sections, *counted]) + "\n")
    print(
        f"{sum(map(len, cards.values()))} measurements on {len(cards)} machine{'s' * (len(cards) != 1)}, "
        f"{len(counted)} sections of what needs none: {path}"
    )
    return 0


_PREAMBLE = (
    "Written by `fastlocal bench report` from the rows (`*.jsonl`) beside it; do not edit. No table mixes cards. "
    "Every row's commit is the state of this repository it was measured at."
)


def _folders(output: Path) -> Iterable[Path]:
    return (path for path in output.glob("*") if path.is_dir()) if output.is_dir() else ()


def read_card(folder: Path) -> list[dict[str, Any]]:
    """The latest row of each measurement in ``folder``, in the order of their first appearance.

    Raises:
        UserError: the rows come from more than one card, or a line is no row.
    """
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        try:
            rows = results.read_rows(path)
        except ValueError:
            raise UserError(f"{path} has a line that is not JSON; repair or remove it.") from None
        for row in rows:
            if (bench := row.get("bench")) in IDENTITY:
                latest[(bench, *(str(row.get(name)) for name in IDENTITY[bench]))] = row
    names = sorted({row["card"] for row in latest.values()})
    if len(names) > 1:
        raise UserError(f"{folder} has rows of {' and of '.join(names)}; give each card a folder of its own.")
    return list(latest.values())


def section(folder: Path, rows: Sequence[Row], plots: Sequence[str]) -> str:
    """One card: where its numbers come from, and a table per benchmark."""
    card = rows[0]["card"]
    title = f"## {card}"
    if card == "CPU":
        title += " (no card: this only shows that the suite runs; its times mean nothing)"
    origins = [f"{key} {', '.join(sorted({str(row[key]) for row in rows}))}" for key in ("driver", "torch", "triton")]
    dates = sorted(row["date"][:10] for row in rows)
    parts = [title, f"{', '.join(origins)}; {dates[0]} to {dates[-1]}."]
    for bench, write in _TABLES.items():
        found = [row for row in rows if row["bench"] == bench]
        if found:
            parts.append(f"### {bench[0].upper()}{bench[1:]}\n\n{write(found)}")
    parts += [f"![{name}]({folder.name}/{name})" for name in plots]
    return "\n\n".join(parts)


# --- Tables -----------------------------------------------------------------------------------------------------------


def _correctness(rows: Sequence[Row]) -> str:
    wrong = [row for row in rows if row["error"] is not None]
    columns = {name: name for name in ("op", "shape", "dtype", "implementation", "finding", "commit")}
    lines = [{**row, "finding": row["error"] or "right"} for row in rows]
    return f"{len(rows)} checked, {len(wrong)} wrong.\n\n{results.markdown_table(lines, columns)}"


def _kernels(rows: Sequence[Row]) -> str:
    return f"{timing.table([dict(row) for row in rows])}\n\n{_commits(rows)}"


def _meter(rows: Sequence[Row]) -> str:
    return f"{suite.meter_table([dict(row) for row in rows])}\n\n{_commits(rows)}"


def _throughput(rows: Sequence[Row]) -> str:
    return _by_model(rows, lambda found: f"{throughput.table(found)}\n\n{_commits(found)}")


def _caps(rows: Sequence[Row]) -> str:
    return "What trains on your card.\n\n" + _by_model(rows, lambda found: f"{caps.table(found)}\n\n{_commits(found)}")


def _trace(rows: Sequence[Row]) -> str:
    columns = {"model": "model", "name": "set-up", "copies_ms": "copies ms", "hidden_share": "behind kernels"}
    return results.markdown_table(rows, {**columns, "commit": "commit"})


def _train(rows: Sequence[Row]) -> str:
    return f"{suite.train_table([dict(row) for row in rows])}\n\n{_commits(rows)}"


_TABLES = {
    "correctness": _correctness,
    "kernels": _kernels,
    "meter": _meter,
    "throughput": _throughput,
    "trace": _trace,
    "caps": _caps,
    "train": _train,
}


def _by_model(rows: Sequence[Row], write: Any) -> str:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["batch_size"], row["image_size"]), []).append(row)
    return "\n\n".join(
        f"{model}, batch {batch}{f', {size} pixels' if size else ''}\n\n{write(found)}"
        for (model, batch, size), found in groups.items()
    )


def _commits(rows: Sequence[Row]) -> str:
    """Which commit each row of the table above was taken at: one for all, or one by one."""
    commits: dict[str, list[str]] = {}
    for row in rows:
        keys = [key for key in IDENTITY[row["bench"]] if key not in ("model", "image_size", "batch_size", "cap")]
        named = (str(row[key]) for key in [*keys, "cap_text"] if key in row)
        commits.setdefault(row["commit"], []).append(", ".join(named))
    if len(commits) == 1:
        return f"All of {rows[0]['card']} at commit {next(iter(commits))}."
    return "\n".join(f"- at commit {commit}: {'; '.join(names)}" for commit, names in commits.items())


# --- What needs no card -----------------------------------------------------------------------------------------------


def uncarded(output: Path) -> Iterator[str]:
    """A section for the memory of each model, for the kernels' traffic and for what they compile to: what there is of it."""
    for path in sorted((output / "memory").glob("*.jsonl")):
        if rows := results.read_rows(path):
            pictures = (f"{path.stem}-{name}.png" for name in ("timeline", "pareto", "bus"))
            shown = [f"![{name}](memory/{name})" for name in pictures if (path.parent / name).exists()]
            yield "\n\n".join([f"## Memory: {rows[0]['model']}, batch {rows[0]['batch_size']}", _memory(rows), *shown])
    if (output / "scaling" / "simulated.md").exists():
        yield "## Several devices\n\nNot measured: [simulated](scaling/simulated.md) for 2 to 64 devices on four links."
    if (path := output / "traffic" / "report.json").exists():
        content = json.loads(path.read_text())
        blocks = [block_traffic.BlockTraffic(**block) for block in content["blocks"]]
        tables = [traffic_report.table(content["ops"]), *([block_traffic.tables(blocks)] if blocks else [])]
        yield "\n\n".join(["## Traffic of the kernels", _counted([content["origin"]]), *tables])
    if found := compile_report.read_report(path := output / "compile" / "report.json"):
        origin = json.loads(path.read_text())["origin"]
        yield f"## What the kernels compile to\n\n{_counted([origin])}\n\n{compile_report.table(found)}"


_MEASURED = {*("peak_bytes", "peak_by_kind", "host_bytes", "traffic_bytes", "flops", "seconds")}
_ORIGIN = {*("card", "driver", "python", "torch", "triton", "commit", "date")}


def _memory(rows: Sequence[Row]) -> str:
    """Peaks of each set-up, the latest of each, and its compute against plain training's."""
    latest = {str(sorted((k, v) for k, v in row.items() if k not in _MEASURED | _ORIGIN)): row for row in rows}
    plain = next((row for row in latest.values() if row["name"] == "E2E"), None)
    lines = [
        {
            "set-up": row["name"],
            "K": row["modules"] if row["family"] != "rival" else None,
            "decoder": row["decoder"],
            "parts of": row["micro_batch"],
            "recompute": row["recompute"],
            "residency": row["residency"] if row["family"] != "rival" else "",
            "boundaries": row.get("boundaries", "device") if row["family"] != "rival" else "",
            "weights": row.get("weights", "full") if row["family"] != "rival" else "",
            "device MiB": round(row["peak_bytes"] / 2**20, 1),
            "host MiB": round(row["host_bytes"] / 2**20, 1),
            "bus MiB": round(row["traffic_bytes"] / 2**20) if "traffic_bytes" in row else None,
            "FLOPs": round(row["flops"] / plain["flops"], 3) if plain is not None else None,
            "commit": row["commit"],
        }
        for row in latest.values()
    ]
    return f"{_counted(list(latest.values()))}\n\n{results.markdown_table(lines)}"


def _counted(origins: Sequence[Row]) -> str:
    torches = ", ".join(sorted({row["torch"] for row in origins}))
    return f"Counted, not timed: no card is needed. torch {torches}, {plots.commit(origins)}."


# --- Plots ------------------------------------------------------------------------------------------------------------


def draw(folder: Path, rows: Sequence[Row]) -> list[str]:
    """The plots that ``rows`` give, written into ``folder``; their file names."""
    if plots.pyplot() is None:
        return []
    drawn = []
    timed = [row for row in rows if row["bench"] == "kernels" and row.get("gb_per_s")]
    if timed:
        drawn.append(_draw_roofline(timed, folder / "roofline"))
    for model in dict.fromkeys(row["model"] for row in rows if row["bench"] == "throughput"):
        measured = [row for row in rows if row["bench"] == "throughput" and row["model"] == model]
        measured = [row for row in measured if row["error"] is None]
        if measured:
            drawn.append(_draw_pareto(measured, folder / f"pareto-{model}"))
    return drawn


def flops(row: Row) -> float | None:
    """FLOPs of a kernel row's algorithm (no recomputation counted), or None where its shape is not known here.

    Two matrix products forward and four backward for attention; one and two for the reconstruction.
    """
    batch = row["batch"]
    stage = int(row["shape"][-1]) - 1 if row["shape"].startswith("Swin-T stage ") else None
    if row["op"] == "window_attention" and stage is not None:
        forward = 2 * 2 * batch * (56 >> stage) ** 2 * 49 * (96 << stage)
    elif row["op"] == "attention" and row["shape"] == "ViT-B/16":
        forward = 2 * 2 * batch * 197**2 * 768
    elif row["op"] == "reconstruction_loss" and stage is not None:
        width = 4 * (96 << stage) // 2 if stage else 16 * 3
        forward = 2 * batch * (56 >> stage) ** 2 * (96 << stage) * width
    elif row["op"] == "reconstruction_loss" and row["shape"] == "ViT-B/16":
        forward = 2 * batch * 14**2 * 768 * 768
    else:
        return None
    return forward * {"forward": 1, "backward": 2, "both": 3}[row["direction"]]


def _draw_roofline(rows: Sequence[Row], path: Path) -> str:
    """TFLOP/s against FLOP per compulsory byte, under the memory roof: the card's measured copy bandwidth."""
    from matplotlib import pyplot

    roof = max(row["gb_per_s"] / row["of_copy_bandwidth"] for row in rows) * 1e9
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    reach: list[float] = []
    for op, mark in (("window_attention", "o"), ("attention", "s"), ("reconstruction_loss", "^")):
        for ours, colour in ((True, "#D55E00"), (False, "#999999")):
            found = [row for row in rows if row["op"] == op and (row["provider"] == OURS) == ours]
            points = [(count / (row["gb_per_s"] * row["p50_ms"] * 1e6), count / (row["p50_ms"] * 1e-3) / 1e12)
                      for row in found if (count := flops(row)) is not None]  # fmt: skip
            if points:
                reach += [x for x, _ in points]
                label = f"{op}, {'fastlocal' if ours else 'rivals'}"
                axes.scatter([x for x, _ in points], [y for _, y in points], c=colour, marker=mark, label=label)
    if reach:
        ends = [min(reach) / 1.5, max(reach) * 1.5]
        axes.plot(ends, [x * roof / 1e12 for x in ends], color="black", label=f"copy, {roof / 1e12:.2f} TB/s")
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel="FLOP per compulsory byte", ylabel="TFLOP/s", title=_title(rows))
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False, fontsize=8)
    return plots.save(figure, path).name


def _draw_pareto(rows: Sequence[Row], path: Path) -> str:
    """Images per second against peak memory, with the front of each family."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for family, (colour, mark, label) in plots.FAMILIES.items():
        found = [(row["peak_mib"], row["images_per_s"]) for row in rows if row["family"] == family]
        if not found:
            continue
        axes.scatter([x for x, _ in found], [y for _, y in found], c=colour, marker=mark, label=label)
        axes.step(*zip(*plots.front(found), strict=True), where="post", color=colour, linewidth=1, alpha=0.6)
    axes.set(xscale="log", xlabel="peak memory of a step, MiB", ylabel="images/s")
    axes.set_title(f"{_title(rows)}; {rows[0]['model']}, batch {rows[0]['batch_size']}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False)
    return plots.save(figure, path).name


def _title(rows: Sequence[Row]) -> str:
    return f"{rows[0]['card']}, {plots.commit(rows)}"
