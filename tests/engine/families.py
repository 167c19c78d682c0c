"""Writes families.csv and docs/families.md: every model of the installed timm that contains attention, and how it is seen.

    make families

Models are built on the meta device, which takes no memory; a name is served if its parts run and fit together there. That they
equal the model bit for bit, and train, is what test_backbones.py tests, with fewer and narrower layers of the same kinds.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch.overrides import TorchFunctionMode

from fastlocal.backbones import backbone

TABLE = Path(__file__).with_name("families.csv")
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = ("name", "class", "parameters", "blocks", "refused")
CHANNEL_GATES = {"SplitAttn", "SelectiveKernelAttn"}  # of ResNets: they attend to channels, not to positions


# What timm's models and torch's layers initialize weights with.
FILLS = {
    "normal_",
    "trunc_normal_",
    "uniform_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
}
FILLS |= {"zero_", "fill_", "copy_", "erfinv_", "mul_", "add_", "clamp_"}


class Uninitialized(TorchFunctionMode):
    """Leaves tensors on the meta device alone, which have no values: filling them is four fifths of building a model."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        if getattr(func, "__name__", "") in FILLS and isinstance(given[0], torch.Tensor) and given[0].is_meta:
            return given[0]
        return func(*args, **(kwargs or {}))


def has_attention(model: torch.nn.Module) -> bool:
    """Whether a layer of ``model`` is called attention."""
    kinds = {type(layer).__name__ for layer in model.modules()} - CHANNEL_GATES
    return any("attention" in kind.lower() or "attn" in kind.lower() for kind in kinds)


def row(name: str) -> dict[str, Any] | None:
    """What there is to say about timm's ``name``; None if it has no attention."""
    with torch.device("meta"), Uninitialized():
        model = timm.create_model(name)
    if not has_attention(model):
        return None
    kind = f"{type(model).__module__.rpartition('.')[2]}.{type(model).__name__}"
    said: dict[str, Any] = {"name": name, "class": kind, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        view = backbone(model)
    except ValueError as error:
        reason = str(error).removeprefix("model: ").partition(": fastlocal knows")[0]
        return {**said, "blocks": "", "refused": reason}
    return {**said, "blocks": len(view.blocks), "refused": ""}


def read() -> list[dict[str, str]]:
    """The rows of families.csv."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def sentence() -> str:
    """What the README says."""
    rows = read()
    served = [row for row in rows if not row["refused"]]
    return f"{len(served)} of the {len(rows)} names in timm 1.0.31 that contain attention"


def page() -> str:
    """docs/families.md."""
    by_class: dict[str, list[dict[str, str]]] = {}
    for row in read():
        by_class.setdefault(row["class"], []).append(row)
    lines = [
        "# Families",
        "",
        f"{sentence()}. Each name is tested, with fewer and narrower layers of its own kinds: stem, blocks and head give the",
        "model's own output bit for bit, in training and in evaluation; one exact step gives its gradients and buffers; one",
        "local step trains it.",
        "",
        "| class | names | smallest |",
        "| --- | --- | --- |",
    ]
    refused = []
    for kind, rows in sorted(by_class.items(), key=lambda item: (-len(item[1]), item[0])):
        served = [row for row in rows if not row["refused"]]
        if served:
            smallest = min(served, key=lambda row: int(row["parameters"]))["name"]
            lines.append(f"| `{kind}` | {len(served)} | `{smallest}` |")
        if len(served) < len(rows):
            names = ", ".join(f"`{row['name']}`" for row in rows if row["refused"])
            reason = next(row["refused"] for row in rows if row["refused"])
            refused.append(f"- {names}: {reason}")
    return "\n".join([*lines, "", "## Refused", "", *refused, ""])


def main() -> None:
    names = timm.list_models()
    rows = []
    for i, name in enumerate(names, 1):
        said = row(name)
        rows += [said] if said is not None else []
        print(f"\r{i} of {len(names)}", end="", file=sys.stderr)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
