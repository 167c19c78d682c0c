"""Signals during a run: one handler in the process that trains, none in the workers that read for it.

Nothing heavy is imported here, so that the command line can have the handler before it imports torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

# Ctrl-C, kill, a terminal that was closed, and what Slurm sends before a job's time is up. Windows has the first two.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
HURRY = 1.0  # seconds after the first signal from which a Ctrl-C is a second wish, not an echo of the first
INTERRUPTED, STOPPED = 130, 143  # exit codes: Ctrl-C; anything else from outside


class StopRequest:
    """While active, a signal does not break into what runs: the first is noted in ``signal``.

    Later ones are ignored, since terminals, launchers and schedulers often send two, but for a Ctrl-C that comes more than
    `HURRY` seconds after the first: it raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._waiting = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return exit_code(self.signal)

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """``items`` until a signal comes; one that comes while an item is waited for ends the wait."""
        iterator, nothing = iter(items), object()
        try:
            while not self.requested:
                self._waiting = True
                item: Any = next(iterator, nothing)
                self._waiting = False
                if item is nothing:
                    return
                yield item
        except _WaitEnded:
            return
        finally:
            self._waiting = False

    def sleep(self, seconds: float) -> None:
        """Sleep, but for no longer than until a signal comes."""
        for _ in self.until(iter(lambda: time.sleep(seconds), None)):
            pass

    def __enter__(self) -> StopRequest:
        _handle_with(self._handle, self._previous)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            if self._waiting:
                self._waiting = False
                raise _WaitEnded
        elif number == signal.SIGINT and time.monotonic() - self._since > HURRY:
            raise KeyboardInterrupt


class _WaitEnded(BaseException):
    """Raised where an item is waited for; not an Exception, so that no library takes it for a failure of its own."""


@contextlib.contextmanager
def end_at_once() -> Iterator[None]:
    """While there is nothing to save, a signal ends the process in one line and with the exit code of a stopped run.

    An exception would be left to the luck of half-imported packages.
    """

    def end(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, b"stopped; there was nothing to save\n")
        os._exit(exit_code(number))

    previous: dict[int, Any] = {}
    _handle_with(end, previous)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def end_after_errors(seconds: int) -> Iterator[None]:
    """Where an error ends the block, it ends the process too: after ``seconds`` the system does, whatever it waits for then.

    As Python ends, destructors of torch's process groups may wait for processes that wait for this one.
    """
    try:
        yield
    except BaseException:
        if hasattr(signal, "alarm"):  # Windows has none
            signal.alarm(seconds)
        raise


def _handle_with(handler: Any, previous: dict[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        for number in STOPPING:
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                previous[number] = signal.signal(number, handler)


def exit_code(number: int | None) -> int:
    """The exit code of a run that signal ``number`` stopped, or, for None, something else from outside."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Signals that stop a run wait until this block ends. What it starts inherits that and never gets them: workers, and
    multiprocessing's own processes, which no worker's initializer reaches."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """In a worker: what stops a run is the parent's business, though a terminal and a scheduler tell the whole group."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
