"""``fastlocal bench kernels``: what the fused ops compile to, what they move, and how fast they are on this card."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastlocal.profiling import results
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
    parser.add_argument("--floors", action="store_true", help="compute the least time on three cards; needs no GPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="only configurations with TEXT in their name")
    parser.add_argument("--architectures", nargs="+", metavar="sm_XX", help="for --compile-report: only these")
    arguments = parser.parse_args(argv)
    if not arguments.compile_report:
        parser.refuse_void(argv, ["--architectures"], "without --compile-report")
        if arguments.floors and not arguments.traffic:
            parser.refuse_void(argv, ["--only"], "with --floors, which takes seconds")

    failed = False
    if arguments.compile_report:
        failed |= _compile_report(arguments)
    if arguments.traffic:
        _traffic(arguments)
    if arguments.floors:
        _floors(arguments)
    if not (arguments.compile_report or arguments.traffic or arguments.floors):
        failed = _time(arguments)
    return int(failed)


def _compile_report(arguments: Namespace) -> bool:
    from fastlocal.profiling.kernels import compile_report

    unknown = set(arguments.architectures or ()) - set(compile_report.ARCHITECTURES)
    if unknown:
        accepted = ", ".join(compile_report.ARCHITECTURES)
        raise UserError(f"--architectures must be among {accepted}, got {', '.join(sorted(unknown))}.")
    folder = arguments.output / "compile"
    try:
        measurements = compile_report.compile_report(folder / "report.json", arguments.architectures, arguments.only)
    except ValueError as error:
        raise UserError(f"--only: {error}") from None
    results.show(compile_report.table(measurements))
    known = compile_report.read_report(folder / "report.json")
    (folder / "README.md").write_text(f"# What the kernels compile to\n\n{compile_report.table(known)}\n")
    faulty = [m for m in measurements if m.problems]
    print(f"\n{len(measurements)} binaries, {len(faulty)} that must not ship.")
    for measurement in faulty:
        print(f"- {measurement.case} on {measurement.architecture}: {'; '.join(measurement.problems)}")
    return bool(faulty)


def _floors(arguments: Namespace) -> None:
    from fastlocal.profiling.kernels import compile_report, floors

    measurements = compile_report.read_report(arguments.output / "compile" / "report.json")
    table = floors.table(floors.with_resources(floors.floors(), measurements))
    results.show(table)
    folder = arguments.output / "floors"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"# The least time on a card\n\n{table}\n")


def _traffic(arguments: Namespace) -> None:
    # Triton decides when it is first imported whether it interprets.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("--traffic counts in Triton's interpreter, but Triton was imported without it in this process.")
    os.environ["TRITON_INTERPRET"] = "1"
    from fastlocal.profiling.kernels import block_traffic, traffic_report

    try:
        comparisons = traffic_report.traffic_report(arguments.only)
    except ValueError as error:
        raise UserError(f"--only: {error}") from None
    results.show(traffic_report.table([comparison.row() for comparison in comparisons]))
    for miss in (comparison for comparison in comparisons if not comparison.within_target):
        print(f"- {miss.op}, {miss.shape}, {miss.direction}: {miss.distinct_ratio:.2f} × compulsory, over the target")

    # Part of the report (--only) replaces the same part of what was written before.
    folder = arguments.output / "traffic"
    file = folder / "report.json"
    content = json.loads(file.read_text()) if arguments.only and file.exists() else {"ops": [], "blocks": []}
    places = {(row["op"], row["shape"], row["direction"]): row for row in content["ops"]}
    places |= {(c.op, c.shape, c.direction): c.row() for c in comparisons}
    blocks = [block_traffic.BlockTraffic(**block) for block in content["blocks"]]
    if not arguments.only:
        blocks = block_traffic.block_traffic()
        results.show(f"\n{block_traffic.tables(blocks)}")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"origin": results.origin(), "ops": list(places.values()), "blocks": [vars(block) for block in blocks]}
    file.write_text(json.dumps(content, indent=1) + "\n")
    (folder / "README.md").write_text(
        f"# Bytes moved\n\n## By each fused op\n\n{traffic_report.table(content['ops'])}\n\n"
        f"## By one block in training\n\n{block_traffic.tables(blocks)}\n"
    )


def _time(arguments: Namespace) -> bool:
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "timing kernels needs a CUDA card, and there is none here; --compile-report and --traffic need none."
        )
    from fastlocal.profiling.kernels import timing
    from fastlocal.profiling.kernels.workloads import OURS, workloads

    chosen = [workload for workload in workloads() if arguments.only in workload.name]
    if not chosen:
        names = ", ".join(workload.name for workload in workloads())
        raise UserError(f"--only: no workload has {arguments.only!r} in its name; there are: {names}.")
    folder = results.card_folder(arguments.output)
    rows = timing.time_kernels(timing.cuda_bench(), chosen, folder / "kernels.jsonl")
    results.show(timing.table(rows))
    timing.plot(rows, folder / "kernels")
    return any(row["provider"] == OURS and row["error"] is not None for row in rows)
