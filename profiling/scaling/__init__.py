"""``fastlocal bench scaling``: one process against several that share the modules or the batch, and the strongest rival.

All train the 32-pixel Swin on random images, on cards if there are enough of them, else on CPU cores with one thread each.
Rounds are interleaved; what is printed are medians, with the smallest and the largest. ``--simulate`` runs nothing and says
what 2 to 64 devices would gain.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import tempfile
from pathlib import Path
from typing import Any

from fastlocal.profiling.cli import ArgumentParser
from fastlocal.profiling.results import RESULTS, origin
from fastlocal.train.errors import UserError


def main(argv: list[str]) -> int:
    """Measure, print a table and write rows; ``argv`` holds the arguments. Returns the exit code."""
    parser = ArgumentParser(prog="fastlocal bench scaling", description=__doc__)
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="2 to 4: the rival makes twice as many stages of 8 blocks (%(default)s)",
    )
    parser.add_argument("--batch-size", type=int, help="images in a step, over all processes (128; simulated 256)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each set-up (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="in a round; the first is not timed (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling", help="folder (%(default)s)")
    parser.add_argument(
        "--simulate", action="store_true", help="run nothing: a table of 2 to 64 devices, four links, five models"
    )
    given = parser.parse_args(argv)
    if given.simulate:
        parser.refuse_void(argv, ("--processes", "--rounds", "--steps"), "with --simulate")
        from fastlocal.profiling.scaling.simulated import simulate

        if given.batch_size is not None and given.batch_size < 1:
            raise UserError(f"scaling: --batch-size must be at least 1, got {given.batch_size}.")
        return simulate(given.output, given.batch_size or 256)
    given.batch_size = 128 if given.batch_size is None else given.batch_size
    if (
        not 2 <= given.processes <= 4
        or given.rounds < 1
        or given.steps < 2
        or given.batch_size < 8
        or given.batch_size % 8
    ):
        raise UserError(
            "scaling: it takes 2 to 4 processes, 1 round and 2 steps at least, and a batch that the rival can cut into 8"
            f" parts; got {given.processes}, {given.rounds}, {given.steps} and {given.batch_size}."
        )
    import torch
    import torch.multiprocessing as multiprocessing

    from fastlocal.profiling.scaling.measure import measure

    cards = torch.cuda.device_count()
    if cards == 1:
        print("fastlocal bench scaling: this machine has one card, and scaling takes two; nothing was measured.")
        return 0
    device = "cuda" if cards >= given.processes else "cpu"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rates.json"
        about = (given.processes, device, given.batch_size, given.rounds, given.steps, str(found))
        multiprocessing.spawn(measure, args=about, nprocs=given.processes)
        result: dict[str, Any] = json.loads(found.read_text())
    rates: dict[str, list[float]] = result["images_per_second"]
    alone = statistics.median(rates["one process"])
    print(
        f"{given.processes} processes, {device}, Swin 32 pixels, feature, batch {given.batch_size}, {result['about']}"
    )
    given.output.mkdir(parents=True, exist_ok=True)
    with (given.output / "scaling.jsonl").open("a") as file:
        for name, values in rates.items():
            middle = statistics.median(values)
            print(
                f"  {name:34s} {middle:7.1f} images/s  ({min(values):.1f} to {max(values):.1f})  {middle / alone:.2f} ×"
            )
            row = {"name": name, "images_per_second": values, "speed_up": middle / alone, "about": result["about"]}
            row |= {"processes": given.processes, "batch_size": given.batch_size, "device": device}
            print(json.dumps({**origin(), **row}), file=file)
    return 0
