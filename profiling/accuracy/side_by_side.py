"""Several runs of a study at a time, each in a process of its own that writes its row when it is done.

A small model leaves a card idle, and a processor's cores beyond the first few: side by side, runs share them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from fastlocal.profiling import results
from fastlocal.profiling.accuracy import study
from fastlocal.profiling.accuracy.recipe import Job
from fastlocal.profiling.cli import UserError
from fastlocal.train.signals import INTERRUPTED, STOPPED, STOPPING, StopRequest, end_at_once, held_back


def train(jobs: Sequence[Job], path: Path, at_once: int) -> None:
    """Train ``jobs``, ``at_once`` at a time; what a run says goes to a file beside its run folder.

    Raises:
        UserError: that file cannot be written, or runs failed; then all others are done.
        Stopped: after the first signal, when every run is saved.
    """
    waiting = [(job, _log(job)) for job in jobs]
    running: dict[int, tuple[SpawnProcess, Path]] = {}  # by what tells that it has ended
    failed: list[Path] = []
    with StopRequest() as stop:
        while running or (waiting and not stop.requested):
            while waiting and len(running) < at_once and not stop.requested:
                job, log = waiting.pop(0)
                process = SpawnProcess(target=_train, args=(job, path, log, at_once))  # CUDA does not survive a fork
                with held_back():  # until the process can be stopped without a traceback
                    process.start()
                running[process.sentinel] = process, log
            ended: list[Any] = connection.wait(list(running), timeout=1.0)
            if stop.requested:
                for process, _ in running.values():
                    process.terminate()  # a terminal's signal has reached all already; a second one changes nothing
            for sentinel in ended:
                process, log = running.pop(sentinel)
                process.join()
                if process.exitcode == 0:
                    done = len(jobs) - len(waiting) - len(running) - len(failed)
                    print(f"{done}/{len(jobs)}  {log.with_suffix('')}", flush=True)
                elif process.exitcode not in (INTERRUPTED, STOPPED):
                    failed.append(log)
    if stop.requested:
        raise study.Stopped(stop.exit_code)
    if failed:
        last = (failed[0].read_text().strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed; {failed[0]} ends with: {last}")


def _log(job: Job) -> Path:
    log = Path(job.config.reports.output) / f"{job.config.reports.experiment}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    except OSError as error:
        raise UserError(f"--output: {log} cannot be written: {error.strerror}.") from None
    return log


def _train(job: Job, path: Path, log: Path, at_once: int) -> None:
    """In the process of its own."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    with end_at_once():
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // at_once))
        try:
            results.append_row(path, study.row_of(job))
        except study.Stopped as stopped:
            sys.exit(stopped.exit_code)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
