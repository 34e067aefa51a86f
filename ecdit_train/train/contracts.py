"""What a trainer asks of the rooms it does not see: where its images come from, and who draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ecdit_train.diffusion.microbatch import Microbatch, Place


class Batches(Protocol):
    """The loader as the trainer sees it: this rank's share of each global step, on the device."""

    def fetch(self) -> Any:
        """The next batch as the loader has it; what is waited here is the loader's doing."""
        ...

    def encode(self, raw: Any) -> Microbatch:
        """What `fetch` gave, through the frozen encoders and on the device."""
        ...

    def substituted(self) -> int:
        """Unreadable samples replaced since this process started, on this rank."""
        ...

    def counts(self) -> dict[str, int]:
        """Counters since this process started, on this rank, by the names of METRICS; the same names on every rank."""
        ...

    def levels(self) -> dict[str, float]:
        """How things stand, by the names of METRICS; the same names on every rank."""
        ...

    def bad(self) -> dict[str, int]:
        """The same by kind of error."""
        ...

    def words(self) -> list[str]:
        """Words of captions seen since this process started, on this rank, where the encoder knows only those."""
        ...

    def place(self) -> Place:
        """As of the batch that was encoded last; asks no other rank."""
        ...

    def state_dict(self, mark: Any = None) -> dict[str, Any]:
        """Where in the data the run is, the same on every rank: as of what was fetched, or of a `Place.mark`. Collective."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Drawer(Protocol):
    """Draws the run's fixed prompts with the weights that the model holds now."""

    def __call__(self, step: int) -> Path | None:
        """The grid's PNG in the run folder; None on ranks that do not write."""
        ...
