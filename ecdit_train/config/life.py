"""What keeps a run alive and honest: its checkpoints, the bounds on its silence, its defences, its held-out images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often state is saved, how, and what is kept."""

    every_steps: int | None
    """Steps between checkpoints; the last step and a stop signal save too. null: derived from what a save costs and
    `hours_between_failures` (Young's sqrt(2 * cost * mean time between failures))."""
    hours_between_failures: float
    """Mean hours between failures of the whole job, for the derived interval."""
    save: Literal["background", "blocking"]
    """background: training waits only for a copy in host memory, a process of its own writes it. The last save of
    a stop always blocks."""
    keep: int
    """Newest committed checkpoints kept; older ones are deleted after a new one is committed."""
    keep_every: int
    """Checkpoints of steps that are multiples of this are never deleted; 0: none."""
    keep_best: int
    """Checkpoints kept for their validation loss besides the newest; 0: none."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """How long a rank may be silent, in seconds, before the run is ended with that rank's name (exit code 86)."""

    start: float
    """From the start of the process to the first batch: joining the others, building, loading."""
    first_step: float
    """The first step of a life, which may compile."""
    data: float
    """Waiting for a batch."""
    step: float
    """Any phase of a step: encoding, forward, exchange, backward, optimizer."""
    save: float
    """What a save makes training wait for; a blocking save is one."""
    show: float
    """Drawing the run's pictures, or measuring its validation loss."""
    grace: float
    """From a request to stop to the end of the process, save included; a rank still there then is ended."""
    agree_every: int
    """Steps between the ranks' agreements to stop and on saves that are written; a signal is heeded that much later, at most, so
    steps of minutes want 1."""
    lease: float
    """Age at which the owner of a run folder counts as gone when nobody can be asked whether it lives."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What is done about a run that goes wrong by itself; decided alike on all ranks."""

    non_finite: Literal["stop", "skip", "roll_back"]
    """A loss or gradient norm that is not finite: end the run (exit code 80), leave the update out, or go back to the newest
    checkpoint and leave out the batches that led here."""
    spike: Literal["ignore", "report", "skip", "roll_back"]
    """A finite loss far above its recent median."""
    spike_deviations: float
    """How far: in robust standard deviations (1.4826 * median absolute deviation)."""
    spike_window: int
    """Steps whose losses make the median."""
    max_skips: int
    """Updates left out in any 1000 steps; one more ends the run."""
    max_roll_backs: int
    """Times the run may go back; one more ends it."""
    digest_every: int
    """Steps between comparisons of parameters that several ranks hold a copy of; 0: none. A copy that differs ends the run with
    its rank's name (exit code 89)."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The loss on images that are never trained on, always with the same draws."""

    images: int
    """The last images of the data set are held out; 0: none."""
    every_steps: int
    """Steps between measurements; the last step measures too."""


@dataclass(frozen=True, kw_only=True)
class AlertsConfig:
    """When a run calls for attention (docs/how-to/watch-with-wandb.md); null: never for that."""

    stall_frac: float | None
    """Alert `slow-data`: share of time that ranks wait for data; over below 0.4 of it."""
    slow_steps: float | None
    """Alert `slow-steps`: seconds of a step over this life's usual ones; 1.5 is half as slow again."""
    dead_experts: int | None
    """Alert `dead-experts`: experts of one layer whose work enters nowhere."""
    router_entropy: float | None
    """The same alert: a router below has decided for good, as share of log E; over above twice that."""
    bad_samples: int | None
    """Alert `bad-samples`: samples between two records that could not be read."""
    free_checkpoints: float | None
    """Alert `disk-nearly-full`: checkpoints that the disk still holds; over above 1.5 times that."""
    restarts: int | None
    """Alert `many-restarts`: lives that began within an hour."""
