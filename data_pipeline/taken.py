"""Take-downs: samples that must not be delivered any more, while a run goes on.

The order does not change. A position whose sample is taken down gets what it would get if the sample were bad: the next
index of its window; that is decided before a byte is read, and is the same on all ranks. So two runs with and without a
take-down differ at exactly the positions of these samples (and where one of them stood in for a bad sample).

Lists are only ever added, behind the others: the state holds a sum over them in order, so that a resume with more is
told from one with less or others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.bitmap import Bitmap, counts_of, open_bitmap, write_bitmap
from data_pipeline.errors import WrongView
from data_pipeline.manifest import View

NONE: Mapping[str, Any] = {"lists": 0, "n": 0, "sha": "", "since": 0}
"""The state where nothing is taken down."""


def write_take_down(view: View, mask: np.ndarray | Iterable[np.ndarray], *, reason: str, out: Path | str) -> Bitmap:
    """As `views.write_keep`, of the samples that are not to be delivered."""
    write_bitmap(Path(out), kind="takedown", view=view, masks=mask, reason=reason)
    return open_bitmap(out, kind="takedown", view=view)


@dataclass(frozen=True, kw_only=True)
class TakeDowns:
    """Lists in the order in which they were added."""

    lists: tuple[Bitmap, ...]

    def of(self, view: View) -> tuple[Bitmap, ...]:
        """Those of one data set."""
        return tuple(one for one in self.lists if one.manifest_sha256 == view.sha256)

    def state(self, *, since: int = 0, first: int | None = None) -> dict[str, Any]:
        """For the loader's state: how many lists, how many samples, a sum that grows list by list, and the step from which on."""
        lists = self.lists[:first]
        sha = ""
        for one in lists:
            sha = hashlib.sha256(f"{sha}\n{one.manifest_sha256}\n{one.bits_sha256}".encode()).hexdigest()[:32]
        return {"lists": len(lists), "n": _samples(lists), "sha": sha, "since": since}

    def since(self, saved: Mapping[str, Any], *, step: int) -> int:
        """The step from which these lists count, in a run that saved another state at `step`.

        Raises WrongView where a list that counted is not among them, or stands at another place.
        """
        known = saved.get("lists", 0)
        if known == len(self.lists) and saved.get("sha", "") == self.state()["sha"]:
            return int(saved.get("since", 0))
        if known < len(self.lists) and self.state(first=known)["sha"] == saved.get("sha", ""):
            return step
        raise WrongView(
            f"data.take_down = {[str(one.path) for one in self.lists]}: in the run {saved.get('n', 0)} samples of {known} lists "
            f"are taken down since step {saved.get('since', 0)}, and these are not the same {known} with new ones behind; what "
            "was taken down stays so: name all lists of before, in the same order, and add new ones at the end; or start a new run "
            "from this one's weights (train.init_from)"
        )


@cache
def _samples(lists: tuple[Bitmap, ...]) -> int:
    """In any of the lists; asked for at every checkpoint, and a look at all bits where there are several."""
    total = 0
    for manifest in dict.fromkeys(one.manifest_sha256 for one in lists):
        same = [one for one in lists if one.manifest_sha256 == manifest]
        total += int(counts_of(same, op=np.bitwise_or).sum())
    return total


def is_taken(lists: Sequence[Bitmap], *, shard: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """bool (K,): whether a sample is in any of the lists."""
    taken = np.zeros(len(shard), bool)
    for one in lists:
        taken |= one.test(shard, sample=sample)
    return taken
