"""Records every collective that runs, by kind, group size and full buffer, while a dispatch mode is on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_RULES = {
    "c10d::_allgather_base_": ("all_gather", 0, 2),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "c10d::allreduce_": ("all_reduce", 0, 1),
    "c10d::alltoall_base_": ("all_to_all", 1, 2),
    "_c10d_functional::all_reduce": ("all_reduce", 0, 2),
    "_c10d_functional::all_reduce_": ("all_reduce", 0, 2),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0, 3),
    "ecdit::expert_exchange": ("all_to_all", 0, 1),
}
"""Op name -> kind, position of the full buffer (or list of buffers) and position of the group among the arguments."""

_NO_BYTES = {"_c10d_functional::wait_tensor", "c10d::barrier", "c10d::monitored_barrier_"}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Calls of one kind over groups of one size; bytes of the full buffers, summed (as plan/traffic.py counts them)."""

    kind: str
    ranks: int
    calls: int
    bytes: int


class CollectiveLog(TorchDispatchMode):
    """Use as a context; groups of one rank are left out, because they send nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: Counter[tuple[str, int]] = Counter()
        self._bytes: Counter[tuple[str, int]] = Counter()
        self.unknown: Counter[str] = Counter()
        """Collectives that the table does not know; a dry run refuses to compare while there are any."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _RULES:
            kind, buffer, group = _RULES[name]
            ranks = _size(args[group])
            if ranks > 1:
                self._calls[kind, ranks] += 1
                self._bytes[kind, ranks] += _nbytes(args[buffer])
        elif "c10d" in name and name not in _NO_BYTES:
            self.unknown[name] += 1
        return func(*args, **(kwargs or {}))

    def collectives(self) -> tuple[Collective, ...]:
        """Everything seen, sorted by kind and group size."""
        return tuple(
            Collective(kind=kind, ranks=ranks, calls=calls, bytes=self._bytes[kind, ranks])
            for (kind, ranks), calls in sorted(self._calls.items())
        )


def _size(group: Any) -> int:
    """Ranks of a group that an op names by a string or carries as an object."""
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group).size()  # type: ignore[arg-type]
    return (group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)).size()


def _nbytes(buffer: Any) -> int:
    tensors = [buffer] if isinstance(buffer, torch.Tensor) else buffer
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
