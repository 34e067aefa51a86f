"""How a verb becomes one rank of many: under watch, in the group, and out of both however it ends."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ecdit_train.errors import OutOfMemoryError, PeerLostError, PeerRefusedError, RendezvousError
from ecdit_train.supervise.beats import BOUNDS, Heart
from ecdit_train.supervise.watched import watched


@contextmanager
def joined(watch: Any, *, wait: float = 0.0) -> Iterator[tuple[Any, Heart]]:
    """Join the other ranks, on GPUs if this machine has them, all of them under watch; leave in any case.

    `wait`: seconds that the ranks may wait for a run folder, besides what they wait for each other.
    """
    rank = int(os.environ.get("RANK", "0"))
    with watched() as heart:
        bounds = asdict(watch)
        heart.bound_by(bounds)
        import torch

        from ecdit_train.parallel import runtime

        started = None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        patience = max(bounds[key] for key in set(BOUNDS.values()) | {"first_step"}) + runtime.MARGIN + wait
        try:
            started = runtime.start(device, meet_within=watch.start, wait_within=patience)
            yield started, heart
        except (RuntimeError, MemoryError, RendezvousError) as e:
            if runtime.is_out_of_memory(e):
                raise _full(e) from e
            lost = runtime.is_peer_lost(e)
            if not lost and (not isinstance(e, RendezvousError) or rank == 0):
                raise
            if heart.cause(within=1.5) is not None:  # that rank tells it better
                raise PeerRefusedError(PeerLostError.exit_code) from e
            if not lost:
                raise
            raise _lost(e) from e
        finally:
            if started is not None:
                started.shutdown()


def ending(error: BaseException, heart: Heart) -> tuple[int, str]:
    """(exit code, why) of a life that this error ends: another rank's where that is known on this machine."""
    from ecdit_train.parallel import runtime

    known = heart.cause(within=1.0) if isinstance(error, RuntimeError) else None
    if known is not None:
        return known["exit_code"], known["why"]
    full, lost = runtime.is_out_of_memory(error), runtime.is_peer_lost(error)
    told = _full(error) if full else _lost(error) if lost else error
    return getattr(told, "exit_code", 1), f"{type(told).__name__}: {told}"


def _full(error: BaseException) -> OutOfMemoryError:
    """Where in our own code memory was asked for, and what takes less."""
    ours = str(Path(__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(ours)]
    at = f" at {Path(frames[-1].filename).relative_to(Path(ours).parent)}:{frames[-1].lineno}" if frames else ""
    why = str(error).splitlines()[0].partition(" If reserved but unallocated")[0] if str(error) else "no memory"
    return OutOfMemoryError(
        f"no memory left{at}: {why}; a smaller train.microbatch, moe.form=lean or a stronger "
        f"parallel.activation_checkpointing takes less, and `ecdit plan` says how much (docs/runbook/out-of-memory.md)"
    )


def _lost(error: BaseException) -> PeerLostError:
    return PeerLostError(f"another rank left in the middle of an exchange: {str(error).splitlines()[0]}")
