"""Groups of processes that stay, for tests of `torch.distributed`: importing torch anew in each test would take its time.

They are forked from a server that has imported everything, and run functions of importable modules by name.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any


class Team:
    """``size`` processes with one gloo group; use as a context manager."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> Team:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["timm", "fastlocal.trainer", "fastlocal.planner"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def run(self, function: str, *arguments: Any, timeout: float = 240, **options: Any) -> list[Any]:
        """What ``"module:function"`` returns in each process; its first argument is the mesh (see `_serve`)."""
        for pipe in self._pipes:
            pipe.send((function, arguments, options))
        results = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(timeout), f"process {rank} does not answer"
            results.append(pipe.recv())
        failures = [text for text, _ in results if text]
        assert not failures, "\n".join(failures)
        return [value for _, value in results]


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    while True:
        name, arguments, options = pipe.recv()
        module, _, function = name.partition(":")
        try:
            pipe.send(("", getattr(importlib.import_module(module), function)(*arguments, **options)))
        except BaseException:
            pipe.send((f"process {rank}:\n{traceback.format_exc()}", None))
