"""Batches read by worker processes, whatever happens to those."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastlocal.train.errors import UserError, printable
from fastlocal.train.signals import STOPPED, held_back, leave_to_parent

LONGEST_WAIT = 300  # seconds for one batch
LOOK_EVERY = 5  # seconds, while one is waited for, whether the workers live


class WorkersLostError(UserError):
    """The workers are gone or stuck, which nothing in the data explains: to go on later may well work."""

    exit_code = STOPPED


def read_in_workers(
    dataset: Dataset[Any], batches: Sequence[list[int]], collate: Callable[[list[Any]], Any], workers: int
) -> Iterator[Any]:
    """``collate`` of the ``dataset``'s items for each list of indices in ``batches``, read by ``workers`` processes.

    The workers ignore the signals that stop a run and end when the iterator is closed.

    Raises:
        WorkersLostError: a worker was killed, has no room in /dev/shm, or gives nothing for `LONGEST_WAIT` seconds.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),  # else every epoch would draw from the global one
        pin_memory=torch.cuda.is_available(),
        timeout=LOOK_EVERY if workers else 0,
        worker_init_fn=_begin_worker,
    )
    reader: Any = None
    if not workers:
        with torch.device("cpu"):  # where the generator is, from which torch draws a seed here
            reader = iter(loader)
        yield from reader
        return
    on_main_thread = threading.current_thread() is threading.main_thread()
    on_child = signal.getsignal(signal.SIGCHLD) if on_main_thread and hasattr(signal, "SIGCHLD") else None
    others = set(multiprocessing.active_children())
    if multiprocessing.get_start_method() == "forkserver":  # Linux's, since Python 3.14
        ours = [name for name in sys.modules if name.partition(".")[0] in ("fastlocal", "timm")]
        multiprocessing.set_forkserver_preload(ours)  # else each worker of each epoch would import them and torch again
    try:
        with torch.device("cpu"), held_back():
            reader = iter(loader)
        if on_child is not None:
            # torch's handler raises wherever the main thread is, in the middle of a step too. That a worker is gone is
            # noticed without it, where its batch is waited for.
            signal.signal(signal.SIGCHLD, on_child)
        while (batch := _next(reader)) is not _END:
            yield batch
    except (RuntimeError, OSError) as error:
        if str(error).startswith("Caught "):  # raised by the dataset in a worker
            raise
        raise WorkersLostError(
            f"the --workers that read images stopped ({printable(str(error), 200).rstrip('.')}): use fewer, free memory,"
            " or give /dev/shm more room (docker run --shm-size)."
        ) from None
    finally:
        if reader is not None:
            reader._shutdown_workers()
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()  # it ignores the SIGTERM that torch ends stuck workers with


_END = object()


def _next(reader: Iterator[Any]) -> Any:
    since = time.monotonic()
    while True:
        try:
            return next(reader, _END)
        except RuntimeError as error:  # nothing for LOOK_EVERY seconds; the reader can be asked again
            if "timed out" not in str(error) or time.monotonic() - since > LONGEST_WAIT:
                raise


def _tell_unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of multiprocessing's thread that hands batches over: that the parent, which stops, takes none any more is no news."""
    if not isinstance(error, OSError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _begin_worker(_: int) -> None:
    leave_to_parent()
    sys.excepthook = _tell_unless_left
    # A batch that cannot be handed over, as when /dev/shm is full, is dropped by default, and waited for in vain.
    # The types of the standard library leave this method out.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))  # type: ignore[attr-defined]
