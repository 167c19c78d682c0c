"""Many short-lived ``fastlocal`` processes: forked from one that has imported everything, so that each starts in no time.

Run as a program, this file is that process. Each line of its stdin asks for a child or for a child's exit; children get
their standard streams opened as the request says.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "data": "digits",
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2},
    "modules": 2,
    "epochs": 2,
    "batch_size": 8,
    "train_limit": 24,
    "val_limit": 16,
}


class Processes:
    """Starts ``fastlocal`` with arguments; use as a context manager."""

    def __enter__(self) -> Processes:
        # The log levels are what the command line sets for one process of several before it imports torch.
        quiet = {"TORCH_CPP_LOG_LEVEL": "FATAL", "GLOO_LOG_LEVEL": "FATAL"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **quiet}
        self._parent = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait()

    def start(
        self,
        arguments: Sequence[object],
        *,
        stdout: Path | str | None = os.devnull,
        stderr: Path | str | None = os.devnull,
        encoding: str = "utf-8",
        code: str = "",
        deadline: int = 600,
    ) -> int:
        """The process id of a new ``fastlocal``, the leader of a process group; ``None`` closes a stream.

        Args:
            code: Python that it runs first.
            deadline: seconds after which it is killed, having written to stderr where it was.
        """
        streams = [None if stream is None else str(stream) for stream in (stdout, stderr)]
        command = [str(argument) for argument in arguments]
        options = {"encoding": encoding, "code": code, "deadline": deadline}
        return self._ask({"arguments": command, "streams": streams, **options})

    def wait(self, process: int) -> int:
        """The exit code of a process, minus the signal's number if one ended it."""
        return self._ask({"wait": process})

    def run(self, arguments: Sequence[object], **options: Any) -> int:
        return self.wait(self.start(arguments, **options))

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        print(json.dumps(request), file=self._parent.stdin, flush=True)
        return int(self._parent.stdout.readline())


def _serve() -> None:
    import torch

    from fastlocal.train import loop
    from fastlocal.train.config import TrainConfig

    torch.set_num_threads(1)
    # The first backward starts autograd's threads, one per device, which a fork cannot keep. A fake tensor mode, which a
    # trainer enters to see shapes, pretends that there is a device; so the first backward comes before it.
    torch.zeros(1, requires_grad=True).sum().backward()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        # What a run imports as it goes, it has imported then.
        loop.run(TrainConfig.of(**{**TINY, "output": folder}))
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            _become(request)
        print(child, flush=True)


def _become(request: dict[str, Any]) -> None:
    from fastlocal.train.cli import main

    os.setpgid(0, 0)
    signal.alarm(request["deadline"])
    faulthandler.dump_traceback_later(request["deadline"] - 2, file=2)  # where it hangs, before it is killed
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(request["streams"], start=1):
        os.close(descriptor)
        if path is not None:
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    exec(request["code"], {})
    names = ("stdout", "stderr")
    for descriptor, (name, path) in enumerate(zip(names, request["streams"], strict=True), start=1):
        stream = None if path is None else open(descriptor, "w", 1, encoding=request["encoding"], closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    code = 1
    try:
        code = main(request["arguments"])
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        code = 120  # as of Python, when it cannot write what is left
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
