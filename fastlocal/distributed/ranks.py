"""The processes that train one model together, and this one's place among them.

        mesh (2, 2)         modules: rank of the process that has …
                            the first modules     the last modules
        data: first half          0        ────▶        1
        data: second half         2        ────▶        3

Down a column gradients are summed (`data_parallel`); along a row features go on (`module_parallel`). What is small or lives
on the host (checks, counts, states to be saved) goes over gloo groups of its own, whatever carries the rest.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

UNREAD = 256  # answers that the others may not have read yet
DIMENSIONS = ("data", "modules")


class RankLost(RuntimeError):
    """Another process of the run has ended, or did not answer in time."""

    ENDED = "another process of this run has ended or lost its connection, so this one stops as well."

    @staticmethod
    def silent(seconds: float) -> str:
        """What to say of a process that has given no answer for ``seconds``."""
        return f"another process of this run did not answer for {seconds:g} seconds, so this one stops as well."


@dataclass(frozen=True)
class Axis:
    """The processes along one dimension of the mesh.

    Attributes:
        rank: this process's place among them, of ``size``.
        members: their ranks in the whole run.
        group: what carries tensors of the device between them, and ``control`` those of the host; None for one process.
    """

    rank: int = 0
    size: int = 1
    members: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None


class Ranks:
    """The processes of ``mesh``, or this one alone.

    Args:
        mesh: with dimensions named "data" and "modules", or one of the two.
        timeout: seconds after which a process that does not answer counts as lost.

    Raises:
        ValueError: the mesh has other dimensions, or the timeout is not positive.
    """

    def __init__(self, mesh: DeviceMesh | None = None, timeout: float = 1800.0) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}.")
        self.timeout = timedelta(seconds=timeout)
        self.data = self.modules = Axis()
        self._control: dist.ProcessGroup | None = None
        self._told: deque[tuple[Tensor, dist.Work | None]] = deque()
        if mesh is None:
            return
        names = mesh.mesh_dim_names or ()
        if not names or len(set(names)) != len(names) or not set(names) <= set(DIMENSIONS):
            raise ValueError(f"mesh must have dimensions named 'data' and 'modules', or one of them, got {names}.")
        with self.waiting():
            self._control = self._gloo(sorted(mesh.mesh.flatten().tolist()))
            axes = {name: self._axis(mesh, name) for name in names}
        self.data, self.modules = (axes.get(name, Axis()) for name in DIMENSIONS)

    def _axis(self, mesh: DeviceMesh, name: str) -> Axis:
        group = mesh.get_group(name)
        members = tuple(dist.get_process_group_ranks(group))
        return Axis(mesh.get_local_rank(name), len(members), members, group, self._gloo(list(members)))

    def _gloo(self, members: list[int]) -> dist.ProcessGroup:
        group = dist.new_group(members, backend="gloo", timeout=self.timeout, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group

    @property
    def first(self) -> bool:
        """Whether this process is the one that saves and reports: the first in both dimensions."""
        return self.data.rank == self.modules.rank == 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Whatever goes wrong in this block is another process's end.

        Raises:
            RankLost: in one sentence.
        """
        try:
            yield
        except (RuntimeError, OSError) as error:  # torch's and gloo's errors have no narrower class in common
            if isinstance(error, RankLost):
                raise
            text = str(error)  # gloo calls a refused connection one that timed out
            if ("imed out" not in text and "imeout" not in text) or "SO_ERROR" in text:
                raise RankLost(RankLost.ENDED) from error
            raise RankLost(RankLost.silent(self.timeout.total_seconds())) from error

    def check_same(self, ours: Mapping[str, Any]) -> None:
        """Refuse processes that were started with different arguments; each argument is compared by its ``repr``.

        Raises:
            ValueError: on every process, with the same sentence.
        """
        if self._control is None:
            return
        texts = {name: repr(value) for name, value in ours.items()}
        every: list[Any] = [None] * dist.get_world_size(self._control)
        with self.waiting():
            dist.all_gather_object(every, texts, group=self._control)
        for rank, theirs in enumerate(every):
            for name in dict.fromkeys([*every[0], *theirs]):  # in order, so that every process names the same one
                first, other = every[0].get(name), theirs.get(name)
                if first != other:
                    raise ValueError(
                        f"{name} is {_short(other)} in process {rank} and {_short(first)} in process 0: every process of a run"
                        " needs the same arguments."
                    )

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the values of the first one's ``tensors``."""
        if self._control is None:
            return
        source = dist.get_global_rank(self._control, 0)
        with self.waiting():
            for tensor in tensors:
                value = tensor.detach().cpu().contiguous()
                dist.broadcast(value, source, group=self._control)
                tensor.data.copy_(value)

    def broadcast(self, value: Any) -> Any:
        """The first process's ``value``, any object that pickles."""
        if self._control is None:
            return value
        box = [value]
        with self.waiting():
            dist.broadcast_object_list(box, dist.get_global_rank(self._control, 0), group=self._control)
        return box[0]

    def counts(self, count: int) -> list[int]:
        """``count`` of each process along "data"; a negative one says that something is wrong there."""
        if self.data.control is None or self.data.size == 1:
            return [count]
        every = torch.zeros(self.data.size, dtype=torch.int64, device="cpu")
        every[self.data.rank] = count
        with self.waiting():
            dist.all_reduce(every, group=self.data.control)
        return every.tolist()

    def go_on(self, wanted: bool) -> bool:
        """Whether all go on: those first along "modules" must all want to, and tell the others, who are not asked."""
        axis = self.modules
        if axis.rank == 0:
            wanted = min(self.counts(int(wanted))) > 0
        answer = torch.tensor([wanted], device="cpu")
        with self.waiting():
            if axis.rank:
                dist.recv(answer, axis.members[0], group=axis.control)
                return bool(answer)
            for member in axis.members[1:]:
                self._told.append((answer, dist.isend(answer, member, group=axis.control)))
            while len(self._told) > UNREAD:
                work = self._told.popleft()[1]
                if work is not None:
                    work.wait(self.timeout)
        return wanted

    def sum_over_data(self, *tensors: Tensor) -> None:
        """Sum ``tensors``, small ones, over the processes along "data", in place."""
        if self.data.size == 1:
            return
        together = torch.cat([tensor.flatten().double().cpu() for tensor in tensors])
        with self.waiting():
            dist.all_reduce(together, group=self.data.control)
        for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over all processes, on the CPU."""
        total = tensor.detach().cpu().clone()
        if self._control is not None:
            with self.waiting():
                dist.all_reduce(total, group=self._control)
        return total

    def collect(self, rank: int, value: Any) -> Any:
        """What process ``rank`` along "modules" has, on the first one along "modules"; None on the others."""
        axis = self.modules
        if axis.rank not in (0, rank) or rank == 0:
            return value if axis.rank == rank == 0 else None
        box = [value]
        with self.waiting():
            if axis.rank == rank:
                dist.send_object_list(box, axis.members[0], group=axis.control)
                return None
            dist.recv_object_list(box, axis.members[rank], group=axis.control)
        return box[0]


def _short(text: str | None) -> str:
    text = "missing" if text is None else text
    return text if len(text) <= 80 else f"{text[:79]}…"
