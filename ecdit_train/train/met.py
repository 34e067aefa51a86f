"""What a run has met in its data over all lives, as a checkpoint holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ecdit_train.diffusion.encoders import MAX_WORDS
from ecdit_train.diffusion.microbatch import Place
from ecdit_train.parallel.context import ParallelContext


def met(place: Place, parallel: ParallelContext, *, before: Mapping[str, Any]) -> dict[str, Any]:
    """`quarantine`: unreadable samples by kind of error. `words`: of captions, where the encoder knows only those that it has seen;
    none where not all are known: there are more than `MAX_WORDS`, or earlier lives did not keep them.

    `before`: the objects of the checkpoint that this life goes on from. Collective.
    """
    first = parallel.mesh.tp_rank == 0  # the ranks of a tensor-parallel group read the same samples
    own = {"bad": place.bad if first else {}, "words": place.words if first else []}
    bad, words = Counter(before.get("quarantine", {})), set(before.get("words", ()))
    for rank in parallel.runtime.all_gather_json(own):
        bad.update(rank["bad"])
        words.update(rank["words"])
    known = len(words) < MAX_WORDS and (not before or "words" in before) and before.get("words") != []
    return {"quarantine": dict(sorted(bad.items())), "words": sorted(words) if known else []}
