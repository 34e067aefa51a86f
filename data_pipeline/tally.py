"""What indexing took of each tar and what not: `x.tally.json` beside a tar of which there is more to say than its
number of samples, and sums over a folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.commit import write_committed
from data_pipeline.gather import APART, Gathered

DAMAGE_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Of one tar. `left_out` counts members that are no part of a sample, `rejected` samples, each by reason."""

    accepted: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    damage: tuple[str, ...] = ()
    set_aside: str = ""
    """Why no sample of it is used."""

    @classmethod
    def of(cls, found: Gathered) -> Tally:
        words = [part.words for part in found.damage]
        if len(words) > DAMAGE_SHOWN:
            words[DAMAGE_SHOWN:] = [f"and {len(words) - DAMAGE_SHOWN} more places"]
        return cls(
            accepted=len(found.samples), left_out=dict(found.left_out), rejected=dict(found.rejected), damage=tuple(words)
        )  # fmt: skip

    @property
    def is_plain(self) -> bool:
        """Whether the number of samples says it all."""
        return not (self.left_out or self.rejected or self.damage or self.set_aside)


def tally_path(tar: Path) -> Path:
    """`x.tar` -> `x.tally.json`."""
    return tar.with_name(f"{tar.name.removesuffix('.tar')}.tally.json")


def write_tally(tally: Tally, tar: Path) -> None:
    """Nothing, and what was there before is removed, where the tally is plain."""
    if tally.is_plain:
        tally_path(tar).unlink(missing_ok=True)
    else:
        write_committed((json.dumps(asdict(tally), indent=1, sort_keys=True) + "\n").encode(), tally_path(tar))


def read_tally(tar: Path, *, accepted: int) -> Tally:
    """As it was written; plain where there is none."""
    try:
        raw: dict[str, Any] = json.loads(tally_path(tar).read_bytes())
        return Tally(**{**raw, "damage": tuple(raw["damage"])})
    except (OSError, ValueError, KeyError, TypeError):
        return Tally(accepted=accepted)


def table(tallies: Mapping[str, Tally]) -> list[str]:
    """Lines for people: what was accepted, left out, rejected by reason, and the tars that are set aside or damaged."""
    aside = {name: tally for name, tally in tallies.items() if tally.set_aside}
    used = [tally for name, tally in tallies.items() if name not in aside]
    lines = [f"accepted     {sum(t.accepted for t in used):>12,} samples in {len(used):,} shards"]
    rejected, left_out = _sum(t.rejected for t in used), _sum(t.left_out for t in used)
    lines += [f"rejected     {count:>12,} samples: {why}" for why, count in rejected.most_common()]
    if APART in rejected:
        lines.append(
            f"to mend: {APART}: unpack the tar, and make it with its names sorted: tar --sort=name -cf NAME.tar -C FOLDER ."
        )
    lines += [f"ignored      {count:>12,} members: {why}" for why, count in left_out.most_common()]
    lines += [
        f"damaged      {name}: {'; '.join(t.damage)}" for name, t in tallies.items() if t.damage and not t.set_aside
    ]
    lines += [f"set aside    {name}: {tally.set_aside}" for name, tally in aside.items()]
    return lines


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total
