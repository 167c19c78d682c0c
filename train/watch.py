"""Notices that another process of the run is gone, whatever this one waits for.

        process 1 ──┐
        process 2 ──┼── process 0        a connection each, which the system closes when the process at its other end dies
        process 3 ──┘

torch.distributed notices such an end only between processes that are connected already, and not while a card computes: where
groups are being made, or on nccl, a process would wait until ``--timeout``. So these connections come before any group. A
process that leaves well says so first, and process 0 leaves last; when a connection closes without that, process 0 closes the
others, and all stop. What comes before the connections, in `joined_store`, has an end of its own: torch's store waits without
one for an answer of whatever listens at its address.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import wait

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fastlocal.distributed import RankLost
from fastlocal.train.errors import StoppedError, UserError

JOIN = 45.0  # seconds after which a process that has not started counts as lost
GRACE = 10.0  # seconds in which a process may come to notice by itself, and end as usual
KEEPALIVE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPALIVE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
}  # finds a machine that is gone
SAVED = "What was saved last can be resumed."
KEY, LEAVES = "fastlocal", b"."


def joined_store(rank: int) -> Store:
    """The store that torchrun, or process 0, keeps for all processes.

    Raises:
        TimeoutError: it cannot be reached.
        RuntimeError: another process has not come.
        UserError: another program has the port.
        ValueError: it is not said where it is.
    """
    deadline = time.monotonic() + JOIN
    address = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    while rank and all(address):  # torch tries for longer than it is told, and keeps signals waiting
        try:
            socket.create_connection(address, timeout=JOIN).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise TimeoutError("timed out") from None
            time.sleep(0.1)
    try:
        store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN)))
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {address[1]}, at which the processes were to meet, is in use: choose another with --master-port of torchrun."
        ) from None
    # When torchrun starts processes again, its store still has what those before them said.
    return PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextlib.contextmanager
def ending_after(seconds: float) -> Iterator[None]:
    """End this process, with the sentence and the exit code of `RankLost`, if the block takes longer than ``seconds``."""
    timer = threading.Timer(seconds, _end, [RankLost.silent(seconds)])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def watched(store: Store, rank: int, size: int, timeout: float) -> Iterator[None]:
    """End this process, with the sentence and the exit code of `RankLost`, if it does not end by itself after another did.

    The processes leave the block together.

    Args:
        store: where process 0 says at what port it listens.
        timeout: seconds in which those that are behind must come to the end of the block.

    Raises:
        TimeoutError: another process has not come.
        RankLost: another process has not come to the end.
    """
    ends = _accepted(store, size - 1) if rank == 0 else [_connected(store)]
    for end in ends:
        end.settimeout(None)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=end.close)  # workers that read data may outlive the process for a while
    thread = threading.Thread(target=_watch, args=(list(ends),), daemon=True)
    thread.start()
    yield  # after an error nobody leaves: the connections stay until the process is gone
    if rank:
        _leave(ends)
    thread.join(timeout)
    if thread.is_alive():
        raise RankLost(RankLost.silent(timeout))
    if rank == 0:
        _leave(ends)
    for end in ends:
        end.close()


def _leave(ends: list[socket.socket]) -> None:
    for end in ends:
        with contextlib.suppress(OSError):  # the thread tells
            end.sendall(LEAVES)


def _accepted(store: Store, count: int) -> list[socket.socket]:
    deadline, secret = time.monotonic() + JOIN, secrets.token_hex(16)
    ipv6 = socket.has_dualstack_ipv6()
    ends: list[socket.socket] = []
    with socket.create_server(
        ("", 0), family=socket.AF_INET6 if ipv6 else socket.AF_INET, dualstack_ipv6=ipv6, backlog=count
    ) as server:
        store.set(KEY, f"{server.getsockname()[1]} {secret}")
        while len(ends) < count:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            end, _ = server.accept()
            end.settimeout(1.0)
            with contextlib.suppress(OSError):  # whoever does not know the secret is none of the run's processes
                if end.recv(len(secret), socket.MSG_WAITALL) == secret.encode():
                    ends.append(end)
    return ends


def _connected(store: Store) -> socket.socket:
    deadline = time.monotonic() + JOIN
    while not store.check([KEY]):  # `wait` would keep signals waiting as well
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
        time.sleep(0.05)
    port, secret = store.get(KEY).decode().split()
    end = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=JOIN)
    end.sendall(secret.encode())
    return end


def _watch(ends: list[socket.socket]) -> None:
    """Until all have left."""
    while ends:
        for end in wait(ends):
            assert isinstance(end, socket.socket)
            try:
                word = end.recv(1)
            except OSError:
                word = b""
            ends.remove(end)
            if word != LEAVES:
                for other in ends:
                    with contextlib.suppress(OSError):
                        other.shutdown(socket.SHUT_RDWR)
                time.sleep(GRACE)
                _end(RankLost.ENDED)


def _end(sentence: str) -> None:
    """End this process at once, whatever its main thread waits for."""
    # A terminal that is paused, or a pipe that nobody reads, must not keep it.
    telling = threading.Thread(target=_tell, args=(f"error: {sentence} {SAVED}\n",), daemon=True)
    telling.start()
    telling.join(1.0)
    os._exit(StoppedError.exit_code)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
