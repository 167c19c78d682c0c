"""``fastlocal bench kernels``: what the fused kernels compile to, what they move, and how fast they are on this card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastlocal.profiling.cli import ArgumentParser, UserError

if TYPE_CHECKING:
    from argparse import Namespace


def main(argv: list[str]) -> int:
    """Run the subcommand; returns 1 if a report finds a kernel that must not ship, 0 if all is well."""
    parser = ArgumentParser(prog="fastlocal bench kernels", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("profiling/results"), help="folder of the results (%(default)s)"
    )
    parser.add_argument("--compile-report", action="store_true", help="compile for every architecture; needs no GPU")
    parser.add_argument("--traffic", action="store_true", help="count bytes moved against the minimum; needs no GPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="only configurations with TEXT in their name")
    parser.add_argument("--architectures", nargs="+", metavar="sm_XX", help="for --compile-report: only these")
    arguments = parser.parse_args(argv)

    if not (arguments.compile_report or arguments.traffic):
        return _time(arguments)
    failed = False
    if arguments.compile_report:
        failed |= _compile_report(arguments)
    if arguments.traffic:
        failed |= _traffic(arguments)
    return int(failed)


def _compile_report(arguments: Namespace) -> bool:
    from fastlocal.profiling import compile_report

    unknown = set(arguments.architectures or ()) - set(compile_report.ARCHITECTURES)
    if unknown:
        accepted = ", ".join(compile_report.ARCHITECTURES)
        raise UserError(f"--architectures must be among {accepted}, got {', '.join(sorted(unknown))}.")
    folder = arguments.output / "compile"
    try:
        measurements = compile_report.compile_report(folder / "report.json", arguments.architectures, arguments.only)
    except ValueError as error:
        raise UserError(f"--only: {error}") from None
    report = compile_report.table(measurements)
    print(report)
    if not arguments.only and not arguments.architectures:
        (folder / "README.md").write_text(f"# What the kernels compile to\n\n{report}\n")
    faulty = [m for m in measurements if m.problems]
    print(f"\n{len(measurements)} binaries, {len(faulty)} that must not ship.")
    for measurement in faulty:
        print(f"- {measurement.case} on {measurement.architecture}: {'; '.join(measurement.problems)}")
    return bool(faulty)


def _traffic(arguments: Namespace) -> bool:
    raise NotImplementedError


def _time(arguments: Namespace) -> int:
    raise NotImplementedError
