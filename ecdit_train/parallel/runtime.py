"""Joining and leaving the world: one process, or what torchrun / srun describe in the environment.

Ranks talk about the run itself (stop? failed? which step?) over a gloo side group that never carries gradients, in
JSON: no message of a peer is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from ecdit_train.errors import ConfigError, PeerRefusedError, Problem
from ecdit_train.parallel import rendezvous

Json = Any
"""A value that survives `json.loads(json.dumps(value))`."""

T = TypeVar("T")

TIMEOUT = 600.0
"""Seconds that ranks wait for each other where no `watch` section says."""
MARGIN = 60.0
"""A collective outlives every bound of the watchdog by this much, so that the watchdog, who can name the rank, speaks first."""


class Peers(Protocol):
    """Ranks that agree on something by messages; Runtime is one. All of them make the same calls in the same order."""

    rank: int
    world: int

    def all_gather_json(self, value: Json) -> list[Json]:
        """Every rank's value, in rank order, on all ranks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How `work` ended on a rank where it failed; `kind` is the name of the error's class."""

    rank: int
    kind: str
    exit_code: int
    words: str


def attempt(peers: Peers, work: Callable[[], Json]) -> tuple[list[Json], list[Failure], Exception | None]:
    """Run `work`, itself without collectives, on every rank: (results of all, failures of all, this rank's own error).

    Nothing is raised here, so every rank comes to the exchange that follows, and hears what its peers met.
    """
    value: Json = None
    error: Exception | None = None
    try:
        value = work()
        encode_json(value)  # a value that cannot be sent is a failure of this rank, not of the exchange
    except Exception as e:
        error, value = e, None
    mine = None if error is None else [type(error).__name__, getattr(error, "exit_code", 1), str(error)[:8000]]
    said = peers.all_gather_json([value, mine])
    failed = [
        Failure(rank=rank, kind=failure[0], exit_code=failure[1], words=failure[2])
        for rank, (_, failure) in enumerate(said)
        if failure is not None
    ]
    return [value for value, _ in said], failed, error


@dataclass(kw_only=True)
class Runtime:
    """This process in the world. All methods but `shutdown` are collective: every rank calls them in the same order."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None
    """Gloo group of all ranks for small host-side messages; None in a world of one."""

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether any rank has it; the same on all ranks."""
        if self.control is None:
            return flags
        values = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(map(bool, values.tolist()))

    def broadcast_object(self, value: Json, *, source: int = 0) -> Json:
        """The source rank's value on all ranks, through JSON even in a world of one, so that both behave alike."""
        if self.control is None:
            return json.loads(encode_json(value))
        data = torch.frombuffer(bytearray(encode_json(value)), dtype=torch.uint8) if self.rank == source else None
        size = torch.tensor([0 if data is None else data.numel()])
        dist.broadcast(size, src=source, group=self.control)
        if data is None:
            data = torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(data, src=source, group=self.control)
        return json.loads(data.numpy().tobytes())

    def all_gather_json(self, value: Json) -> list[Json]:
        """Every rank's value, in rank order, on all ranks."""
        if self.control is None:
            return [json.loads(encode_json(value))]
        data = torch.frombuffer(bytearray(encode_json(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=self.control)
        lengths = [int(size.item()) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.control)
        return [json.loads(part[:n].numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]

    def together(self, work: Callable[[], T]) -> T:
        """`work` on every rank, itself without collectives. If it fails on any, every rank raises, so that none waits
        in the next collective for a peer that has left: its own error, or PeerRefusedError where it had none or a
        lower rank said the same."""
        results: list[T] = []
        _, failed, mine = attempt(self, lambda: results.append(work()))
        if not failed:
            return results[0]
        own = next((failure.words for failure in failed if failure.rank == self.rank), None)
        if mine is not None and all(other.words != own for other in failed if other.rank < self.rank):
            raise mine
        raise PeerRefusedError(failed[0].exit_code) from mine

    def barrier(self) -> None:
        """Wait for all ranks, on the host."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def shutdown(self) -> None:
        """Leave the world. Safe to call after a failure: it waits for nobody."""
        if dist.is_initialized():
            dist.destroy_process_group()


def start(
    device: str,
    *,
    env: Mapping[str, str] | None = None,
    store: dist.Store | None = None,
    meet_within: float = TIMEOUT,
    wait_within: float = TIMEOUT,
) -> Runtime:
    """Join the world. `device` is "cpu" or "cuda"; `env` (default: the process's) holds RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT, or nothing for a single process; `store` takes the master's place where there is one.

    CPU ranks use gloo. CUDA ranks use NCCL for CUDA tensors and gloo for CPU tensors.

    Args:
        meet_within: seconds in which all ranks must have come.
        wait_within: seconds after which a collective gives a peer up.

    Raises:
        RendezvousError: the ranks did not find each other.
    """
    env = os.environ if env is None else env
    world, rank = int(env.get("WORLD_SIZE", "1")), int(env.get("RANK", "0"))
    local_rank = int(env.get("LOCAL_RANK", "0"))
    if device not in ("cpu", "cuda"):
        raise ConfigError(Problem(field="device", value=device, rule="must be cpu or cuda", nearest="cpu"))
    # All ranks of a host are refused alike: one that is refused alone leaves the others waiting for it.
    here_ranks = max(local_rank + 1, int(env.get("LOCAL_WORLD_SIZE", "1")))
    if device == "cuda" and here_ranks > torch.cuda.device_count():
        raise ConfigError(
            Problem(
                field="device",
                value=device,
                nearest="cpu",
                rule=f"{here_ranks} ranks on this host need a GPU each (it shows {torch.cuda.device_count()})",
            )
        )
    here = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        _allocate_in_segments()
        torch.cuda.set_device(here)
    control = None
    if world > 1:
        if store is None:
            store = rendezvous.meet(env, rank=rank, world=world, within=meet_within)
        timeout = timedelta(seconds=wait_within)
        # Told its device, NCCL connects here and not in the middle of the first step, and a barrier asks no other device.
        bound = here if device == "cuda" else None
        dist.init_process_group(
            _backend(device), rank=rank, world_size=world, timeout=timeout, store=store, device_id=bound
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
    return Runtime(rank=rank, world=world, local_rank=local_rank, device=here, control=control)


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables by which a user tells torch how to allocate device memory."""


def _allocate_in_segments() -> None:
    """Device memory in segments that grow, unless the user says otherwise: FSDP's gathered weights and microbatches of several
    shapes leave holes in blocks of fixed size, which a step near the limit of memory then lacks."""
    if not any(os.environ.get(name) for name in ALLOCATOR):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def alone() -> Runtime:
    """A world of one on the CPU, for what reads and writes files without a run."""
    return Runtime(rank=0, world=1, local_rank=0, device=torch.device("cpu"), control=None)


_LOST = tuple(os.strerror(number) for number in (
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT),
    *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET),
))  # fmt: skip
"""What the kernel says of a connection whose other end, or the way to it, is gone: "Connection reset by peer", ..."""


def is_peer_lost(error: BaseException) -> bool:
    """Whether a collective failed because another rank has left, rather than through a mistake of its own."""
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)):
        return True
    text = str(error)  # gloo raises a plain RuntimeError
    return (
        isinstance(error, RuntimeError)
        and "gloo" in text
        and any(words in text for words in ("closed by peer", "Timed out waiting", " timeout", *_LOST))
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left, on the device or the host, in whichever library's words."""
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "_status_alloc_failed")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words))


def ensure_group(device_type: str) -> None:
    """A world of one joins a group of one, without network or files. Needed only where FSDP is used
    for its bf16 policy."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(device_type), rank=0, world_size=1, store=dist.HashStore())


def _backend(device_type: str) -> str:
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def encode_json(value: Json) -> bytes:
    """Canonical UTF-8 JSON: sorted keys, no spaces. Raises ValueError (NaN too) or TypeError for anything else: a peer or
    a file reads exactly what was said, or nobody does."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
