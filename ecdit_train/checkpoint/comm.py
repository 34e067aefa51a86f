"""What a checkpoint needs from its peers: one all-gather of JSON, and agreement on failure.

Nothing here unpickles: `torch.distributed.all_gather_object` does, and a checkpoint has no use for it. The group is a
gloo side group, never the training backend, so a save cannot dead-lock with gradients in flight.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ecdit_train.errors import CheckpointError

Json = Any
"""A value that survives `json.loads(json.dumps(value))`."""


class CheckpointDamagedError(CheckpointError):
    """Bytes on disk are not the bytes that were committed: an older checkpoint may be used instead."""


class CheckpointMismatchError(CheckpointError):
    """A sound checkpoint that does not fit (names, shapes, dtypes, format): no older one will fit better."""


class CheckpointExistsError(CheckpointError):
    """The step is already committed; committed folders are never written into."""


_KINDS: dict[str, type[CheckpointError]] = {
    # Most telling first: when ranks fail differently, all of them raise the first kind that occurred.
    "mismatch": CheckpointMismatchError,
    "exists": CheckpointExistsError,
    "error": CheckpointError,
    "damaged": CheckpointDamagedError,
}


class Comm(Protocol):
    """The ranks that save or load together. Every method is called by all of them in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def all_gather(self, value: Json) -> list[Json]:
        """`value` of every rank, in rank order, on every rank."""
        ...

    def barrier(self) -> None: ...


class SingleProcess:
    """One process is a world of one. Values still go through JSON, so what works here works on a group."""

    rank = 0
    world = 1

    def all_gather(self, value: Json) -> list[Json]:
        return [json.loads(encode_json(value))]

    def barrier(self) -> None:
        return None


class GroupComm:
    """Ranks of a `torch.distributed` gloo group that spans all ranks of the run (CPU tensors, bytes of JSON).

    A lost peer surfaces as the group's own error within its timeout; the temporary folder is then left for `clean`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        backend = dist.get_backend(group)
        if backend != "gloo":
            raise CheckpointError(f"checkpoint group: backend {backend!r}; make a side group with backend 'gloo'")
        self.group = group
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)

    def all_gather(self, value: Json) -> list[Json]:
        mine = torch.frombuffer(bytearray(encode_json(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([mine.numel()], dtype=torch.int64), group=self.group)
        lengths = [int(size.item()) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: mine.numel()] = mine
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.group)
        return [
            json.loads(part[:length].numpy().tobytes().decode()) for part, length in zip(parts, lengths, strict=True)
        ]

    def barrier(self) -> None:
        dist.barrier(group=self.group)


def encode_json(value: Json) -> bytes:
    """Canonical UTF-8 JSON: sorted keys, no spaces, no NaN. Raises ValueError or TypeError for anything else."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def together(comm: Comm, work: Callable[[], Json]) -> list[Json]:
    """Run `work` on every rank and return all results; if it failed anywhere, every rank raises the same error.

    Without this a rank that runs out of disk would raise while its peers wait for it in the next collective.
    """
    value: Json = None
    failure: Exception | None = None
    try:
        value = work()
        encode_json(value)
    except Exception as error:
        failure = error
    answers = comm.all_gather({"value": None if failure else value, "kind": _kind(failure), "error": _words(failure)})
    failed = [(rank, answer["kind"], answer["error"]) for rank, answer in enumerate(answers) if answer["kind"]]
    if failed:
        kinds = {kind for _, kind, _ in failed}
        raise _KINDS[next(kind for kind in _KINDS if kind in kinds)](_merge(failed, world=comm.world)) from failure
    return [answer["value"] for answer in answers]


def _kind(error: Exception | None) -> str | None:
    if error is None:
        return None
    return next((name for name, kind in _KINDS.items() if name != "error" and isinstance(error, kind)), "error")


def _words(error: Exception | None) -> str | None:
    if error is None:
        return None
    text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= 8000 else text[:8000] + " ..."


def _merge(failed: list[tuple[int, str, str]], *, world: int) -> str:
    """One line per distinct problem, with the ranks that met it (at most 8 listed)."""
    ranks_of: dict[str, list[int]] = {}
    for rank, _, words in failed:
        ranks_of.setdefault(words, []).append(rank)
    if world == 1:
        return "\n".join(ranks_of)
    lines = []
    for words, ranks in ranks_of.items():
        listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        lines.append(f"rank {listed}: {words}")
    return "\n".join(lines)
