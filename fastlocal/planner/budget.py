"""Sizes in bytes, as texts; and what of a card's memory tensors cannot have."""

from __future__ import annotations

import math
import re

# What a card's memory holds besides tensors: the CUDA context with the kernels of torch and cuBLAS (0.3 to 0.45 GiB, by card
# and driver) and what the caching allocator rounds up.
RESERVE = "512MiB"

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str | int, name: str = "memory", least: int = 1) -> int:
    """Bytes from a number of them, or a text with a unit such as ``"4GiB"``, ``"1.5 GB"`` or ``"500MiB"``.

    A text with a small number and no unit would be bytes, which nobody means.

    Args:
        name: of the argument, for the sentence.
        least: the smallest value that is accepted.

    Raises:
        ValueError: the text is none of these, has no unit, or is too small.
    """
    match = re.fullmatch(r"\s*([0-9]+|[0-9]*\.[0-9]+)\s*([KMG]i?B|B)?\s*", str(text))
    if match is not None and isinstance(text, str) and match[2] is None and 0 < float(match[1]) < 2**20:
        raise ValueError(f"{name} {text!r} has no unit: did you mean {text.strip()}GiB?")
    value = int(float(match[1]) * _UNITS[match[2] or "B"]) if match else -1
    if value < least:
        raise ValueError(f"{name} must be a {'positive ' * bool(least)}size such as 4GiB or 500MiB, got {text!r}.")
    return value


def format_bytes(value: float, up: bool = False) -> str:
    """``value`` in GiB or MiB with three digits; ``up`` rounds up, so that the text as a budget is enough."""
    unit = "GiB" if value >= 2**30 else "MiB"
    scaled = value / _UNITS[unit]
    digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
    shown = math.ceil(scaled * 10**digits) / 10**digits if up else scaled
    return f"{shown:.{digits}f} {unit}"
