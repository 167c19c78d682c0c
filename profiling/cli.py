"""The command line of ``fastlocal bench``: one subcommand per question, imported when it is asked."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fastlocal.train.errors import UserError

# Subcommand -> (module with ``main(argv) -> exit code``, what ``--help`` says about it).
SUBCOMMANDS = {
    "kernels": ("fastlocal.profiling.kernels.command", "compile report, traffic report, and timings on a CUDA card"),
    "memory": (
        "fastlocal.profiling.memory.table",
        "memory, bus and compute of a step, ours and the rivals'; needs no GPU",
    ),
    "throughput": (
        "fastlocal.profiling.card.throughput",
        "images per second and peak memory of a step, ours and the rivals'",
    ),
    "scaling": ("fastlocal.profiling.scaling", "images per second of several processes, and of a pipeline of torch's"),
    "accuracy": ("fastlocal.profiling.accuracy", "what each objective learns with the same recipe"),
    "trace": ("fastlocal.profiling.trace", "whether the losses of 50 steps are what they were, bit for bit"),
    "report": ("fastlocal.profiling.report", "all result rows as tables and plots, card by card"),
}


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one sentence and exit code 2, without the usage text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}.\n")

    def refuse_void(self, argv: Sequence[str], flags: Sequence[str], where: str) -> None:
        """Refuse what is in ``argv`` and would be ignored.

        Raises:
            UserError: one of ``flags`` is.
        """
        for argument in argv:
            if (flag := argument.partition("=")[0]) in flags:
                raise UserError(f"{flag} would do nothing {where}; leave it out.")


def bench(argv: list[str]) -> int:
    """Measure kernels, memory and throughput, and report what was measured.

    ``argv`` holds the arguments after ``bench``; returns the exit code, 2 for bad input.
    """
    parser = ArgumentParser(
        prog="fastlocal bench", description="Measure fastlocal; every result is also a row in a file."
    )
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, (_, description) in SUBCOMMANDS.items():
        subcommands.add_parser(name, help=description, add_help=False)
    try:
        # A subcommand parses its own arguments, so that its options are written beside the code they steer.
        subcommand = parser.parse_args(argv[:1]).subcommand
        module, _ = SUBCOMMANDS[subcommand]
        return importlib.import_module(module).main(argv[1:])
    except UserError as error:
        print(f"fastlocal bench: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse, after --help or a mistake
        return stop.code if isinstance(stop.code, int) else 1
