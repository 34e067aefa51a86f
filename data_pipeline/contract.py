"""All that the trainer sees of the data: a batch, and something that yields batches for ever.

Shape legend: B samples of one rank in one step (global batch / data-parallel world), H x W pixels,
C x h x w latent, L text tokens (padded), Y width of a text embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of one global step, in slot order.

    `position` is unique over the whole endless stream: `step * global_batch + slot`. It keys every random draw
    of the step, so the same position means the same noise on any number of ranks. Fields that the loader was
    not asked for are None.
    """

    position: np.ndarray
    """int64 (B,)"""
    keys: tuple[str, ...]
    """B sample keys, as in the tar"""
    images: np.ndarray | None = None
    """uint8 (B, H, W, 3), RGB"""
    latents: np.ndarray | None = None
    """float16 or float32 (B, C, h, w), as stored"""
    captions: tuple[str, ...] | None = None
    """B captions; an empty text where there is none"""
    captioned: np.ndarray | None = None
    """bool (B,), False where a sample has no caption and is to be trained on without text"""
    text: np.ndarray | None = None
    """float16 or float32 (B, L, Y), zeros where `text_mask` is False"""
    text_mask: np.ndarray | None = None
    """bool (B, L), True for real tokens"""


@dataclass(frozen=True, kw_only=True)
class SourceProgress:
    """How far a source of a mixture is, over all ranks."""

    name: str
    share: float
    """of the samples"""
    samples: int
    """delivered since the first step of the run"""
    epochs: float
    """the same in passes over the source"""
    left_out: int
    """samples that one of its epochs leaves out, others in each"""


@dataclass(frozen=True, kw_only=True)
class LoaderStats:
    """Counters of one rank since the loader was made (not saved: they describe a life, not a run)."""

    steps: int = 0
    """delivered steps"""
    samples: int = 0
    """delivered samples"""
    bytes_read: int = 0
    """bytes read from shards, prefetched ones included"""
    steps_ahead: int = 0
    """steps that are prepared beyond the one that is delivered (`prefetch`)"""
    steps_ready: int = 0
    """of these and the one that was asked for last, how many were ready then, without a gap"""
    epochs: float | None = None
    """passes over the data until the next step, over all ranks; None where nobody can say"""
    decoder_fallbacks: int = 0
    """calls in which another decoder took over (`dali`)"""
    stall_seconds: float = 0.0
    """time that the consumer waited in `next()`"""
    read_retries: int = 0
    """reads repeated after an error of the operating system or of an object store"""
    store_trouble: Mapping[str, int] = field(default_factory=dict)
    """requests to an object store that failed in a way that passes, by kind (`store.trouble.PASSING`)"""
    requests: int = 0
    """to an object store, repeated ones included"""
    bytes_fetched: int = 0
    """from an object store: indexes, repeated ranges and what no sample used included"""
    hedged: int = 0
    """ranges asked for a second time because the first answer was slow"""
    hedges_won: int = 0
    """of these, where the second answer was first"""
    most_held: int = 0
    """largest number of bytes that were under way or kept at once"""
    index_reads: int = 0
    """indexes read; one a shard unless more shards are read at once than the order says"""
    bad: Mapping[str, int] = field(default_factory=dict)
    """substituted samples by error class, delivered ones only"""
    skipped: int = 0
    """samples replaced because they have no caption, as was asked for; not among the bad ones"""
    uncaptioned: int = 0
    """delivered samples without a caption"""
    passed_over: int = 0
    """delivered samples in whose place another one would stand, had it not been taken down"""
    left_out: int = 0
    """samples that one epoch leaves out, because they do not fill a global batch; over all ranks, others in each"""
    sources: Sequence[SourceProgress] = ()
    """of a mixture, how far each source is"""


class Loader(Protocol):
    """An endless stream of batches whose place is a few hundred bytes."""

    def __iter__(self) -> Loader: ...

    def __next__(self) -> Batch: ...

    def mark(self) -> Any:
        """This rank's own place, in a few numbers and without asking anybody: for `state_dict` later on."""
        ...

    def state_dict(self, mark: Any = None) -> dict[str, Any]:
        """Where the next batch starts, or started at `mark`: JSON-able, below 1 KB, equal on all ranks."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place, at any world size. Raises WrongView for another data set, seed or global batch."""
        ...

    def stats(self) -> LoaderStats: ...

    def close(self) -> None: ...
