"""What every benchmark does with a result: stamp it with its origin, write it at once, print it as a table."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("profiling/results")  # in the directory the command runs in

Row = Mapping[str, Any]


def origin() -> dict[str, str]:
    """Where a number taken in this process just now comes from: card (or processor), driver, torch, triton, commit, date."""
    return {**_machine(), "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


@functools.cache
def _machine() -> dict[str, str]:
    import torch

    try:
        triton = importlib.metadata.version("triton")  # importing it here would settle whether it interprets
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": _commit(),
    }


def sentence(error: BaseException) -> str:
    """The first line of an error, for a row: that something cannot run is a result too."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return (str(error).strip() or repr(error)).split("\n")[0][:300]


def card_state() -> dict[str, str]:
    """Clocks, power limit and temperature of the first card now, as its driver says; empty without one."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    found = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    return dict(zip(fields, map(str.strip, found.split(",")), strict=True)) if found else {}


def card_folder(output: Path = RESULTS) -> Path:
    """The folder of this machine's results, ``output``/<card>, created if need be."""
    folder = output / slug(origin()["card"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def slug(text: str) -> str:
    """``text`` as the name of a file or folder: lower-case letters, digits and single hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()


def append_row(path: Path, row: Row) -> dict[str, Any]:
    """Append ``row``, and of its `origin` what it does not tell itself, to a JSON Lines file, at once: no crash loses it.

    Returns:
        The row as it reads back.
    """
    line = json.dumps({**origin(), **row})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line + "\n")
    written: dict[str, Any] = json.loads(line)
    return written


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown_table(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> str:
    """Rows as a Markdown table, columns padded so that it also reads well in a terminal.

    Args:
        rows: what to show; a key that is missing shows as an empty cell.
        columns: key -> heading, in order; all keys of the first row if None.
    """
    columns = columns if columns is not None else {key: key for key in rows[0]}
    cells = [list(columns.values()), *([_cell(row.get(key)) for key in columns] for row in rows)]
    numeric = [all(_is_number(row.get(key)) for row in rows) for key in columns]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "".join(f"|{'-' * (w + 1)}{':' if right else '-'}" for w, right in zip(widths, numeric, strict=True)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def show(text: str) -> None:
    """Print Markdown. A table that is wider than the terminal is printed row by row, as a name and labelled values."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:  # into a file or a pipe: as it is
        print(text)
        return
    width = shutil.get_terminal_size().columns
    for table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        block = list(lines)
        if not table:
            print("\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in block))
        elif len(block[0]) <= width:
            print("\n".join(block))
        else:
            headings, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block)
            for name, *values in rows:
                print(textwrap.shorten(name, width, placeholder="…") or "–")
                pairs = (f"{h} {v}" for h, v in zip(headings[1:], values, strict=True) if v)
                kept = "  ".join(pair.replace(" ", "\N{NO-BREAK SPACE}") for pair in pairs)
                filled = textwrap.fill(kept, width - 4, break_on_hyphens=False)
                print(textwrap.indent(filled, "    ").replace("\N{NO-BREAK SPACE}", " "))


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _output(*command: str) -> str:
    """The first line a command prints, or "" where it cannot run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else ""


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    # Result rows are no part of what is measured: writing some must not make the next ones look like another version's.
    elsewhere = ("--", ":/", ":(exclude,top)profiling/results")
    return (
        f"{commit}-modified" if _output("git", "status", "--porcelain", "--untracked-files=no", *elsewhere) else commit
    )
