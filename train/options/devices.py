"""Several devices: how many processes share the work is torchrun's to say, and how they share it, these options'."""

from __future__ import annotations

from dataclasses import dataclass

from fastlocal.train.options import values
from fastlocal.train.options.values import Options, option


@dataclass(frozen=True)
class DeviceOptions(Options):
    """What the processes that torchrun starts share."""

    parallel: str = option(
        "data",
        "with torchrun: 'data' splits each batch, 'modules' gives each process modules of its own",
        choices=("data", "modules"),
    )
    data_parallel: int = option(
        1,
        "with --parallel modules: split each batch over this many rows of processes as well",
        values.whole,
        at_least=1,
    )
    rank_cuts: tuple[int, ...] | None = option(
        None,
        "with --parallel modules: first modules of processes 2, 3, …, such as 2 or 1,3; default: balanced by FLOPs",
        values.whole_numbers,
        at_least=1,
    )
    queue: int = option(
        2, "with --parallel modules: batches that may be on their way to the next process", values.whole, at_least=1
    )
    timeout: float = option(
        1800.0, "seconds after which a process that does not answer counts as lost", values.number, above=0
    )
