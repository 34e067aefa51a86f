"""From members to samples: which are whole, which are not and why. Nothing is left out without being counted.

A sample is a run of members with one key. It is rejected when its members do not stand side by side, when a field comes
twice, when its key has come before, or when it lies beside damage and may have lost a part.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_pipeline.errors import BadMember
from data_pipeline.tar import Buffer, Damage, LeftOut, Member, split_name, survey

APART = "members apart"
"""Why a sample is rejected whose members do not stand side by side."""


@dataclass(kw_only=True)
class Sample:
    """Members of one key, one after the other; `start` and `end` are bytes in the tar."""

    key: str
    start: int
    end: int
    fields: dict[str, Member] = field(default_factory=dict)
    twice: str = ""
    """A field that comes twice."""
    damaged: bool = False
    """Something inside of it is no tar, or the file ends there."""
    before: str = ""
    """Kind of the damage right behind it."""


@dataclass(kw_only=True)
class Gathered:
    """What one tar holds: its whole samples, and everything else by reason. Counts of `left_out` are members,
    those of `rejected` samples."""

    samples: list[Sample] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    damage: list[Damage] = field(default_factory=list)


def gather(buffer: Buffer) -> Gathered:
    """See the module. With damage, `samples` are those that are certainly whole."""
    found = Gathered()
    runs = _mended(list(_runs(buffer, found)))
    samples = [run for run in runs if isinstance(run, Sample)]
    common = _common([s for s, near in _beside(runs) if not near])
    apart = _apart(samples)
    torn = _torn(samples, common=common, apart=apart)
    keys: set[str] = set()
    behind = False
    for run in runs:
        if isinstance(run, Damage):
            behind = True
            continue
        complete = bool(common) and common <= set(run.fields)
        why = _why_not(run, apart=apart, known=run.key in keys)
        if not why and (run.damaged or (run.before and not (complete and _ends_well(buffer, run)))):
            why = "damaged" if run.damaged else "beside damage"
        if not why and behind and not complete:
            why = "beside damage"
        if not why and id(run) in torn:
            why = "torn: a part of a sample"
        behind = behind and not complete
        keys.add(run.key)
        if why:
            found.rejected[why] += 1
        else:
            found.samples.append(run)
    return found


def _runs(buffer: Buffer, found: Gathered) -> Iterator[Sample | Damage]:
    """Samples in the order of the file, with the damage between them."""
    current: Sample | None = None
    for part in survey(buffer):
        if isinstance(part, LeftOut):
            found.left_out[part.reason] += 1
            continue
        if isinstance(part, Damage):
            found.damage.append(part)
            if current is not None:
                current.before = part.kind
                current.damaged = part.kind == "cut" and _key(part.name) == current.key
                yield current
                current = None
            yield part
            continue
        try:
            key, name = split_name(part.name)
        except BadMember as error:
            found.left_out[str(error)] += 1
            continue
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = Sample(key=key, start=part.start, end=part.end)
        if name in current.fields:
            current.twice = name
        current.fields.setdefault(name, part)
        current.end = part.end
    if current is not None:
        yield current


def _mended(runs: list[Sample | Damage]) -> list[Sample | Damage]:
    """With one sample where damage stands between two parts of it."""
    found: list[Sample | Damage] = []
    for run in runs:
        before = next((r for r in reversed(found) if isinstance(r, Sample)), None)
        if isinstance(run, Sample) and found and isinstance(found[-1], Damage) and before and before.key == run.key:
            before.damaged = True
            before.fields |= run.fields
        else:
            found.append(run)
    return found


def _torn(samples: list[Sample], *, common: set[str], apart: set[str]) -> set[int]:
    """Parts of samples of which a name was damaged where no checksum covers it (long names): neighbours that share no
    field, lack something each, and together look like a sample of this tar; what stands between parts of another
    sample; and one whose fields no other has."""
    forms, counts = {frozenset(s.fields) for s in samples}, Counter(name for s in samples for name in s.fields)
    torn: set[int] = set()
    for one, other in itertools.pairwise(samples):
        a, b = set(one.fields), set(other.fields)
        lacking = [sample for sample in (one, other) if not common <= set(sample.fields)]
        if len(lacking) == 2 and not a & b and (common <= a | b or a | b in forms):
            torn |= {id(one), id(other)}
        if one.key in apart or other.key in apart:
            torn |= {id(sample) for sample in lacking}
    if len(samples) > 2:
        torn |= {id(s) for s in samples if not common <= set(s.fields) and all(counts[name] == 1 for name in s.fields)}
    return torn


def _key(name: str) -> str | None:
    try:
        return split_name(name)[0]
    except BadMember:
        return None


def _beside(runs: list[Sample | Damage]) -> Iterator[tuple[Sample, bool]]:
    """Each sample, and whether damage is right before or behind it."""
    for before, run in zip([None, *runs], runs, strict=False):
        if isinstance(run, Sample):
            yield run, bool(run.before) or isinstance(before, Damage)


def _common(samples: list[Sample]) -> set[str]:
    """Fields that most samples have."""
    counts = Counter(name for sample in samples for name in sample.fields)
    return {name for name, count in counts.items() if 2 * count > len(samples)}


def _apart(samples: list[Sample]) -> set[str]:
    """Keys whose members stand in several places: runs without a common field. Readers that group as they go would make half
    samples of them without a word."""
    seen: dict[str, set[str]] = {}
    apart: set[str] = set()
    for sample in samples:
        fields = set(sample.fields)
        if sample.key in seen and not fields & seen[sample.key]:
            apart.add(sample.key)
        seen.setdefault(sample.key, set()).update(fields)
    return apart


def _why_not(sample: Sample, *, apart: set[str], known: bool) -> str:
    if sample.key in apart:
        return APART
    if known:
        return "key comes again"
    return f"field {sample.twice} twice" if sample.twice else ""


def _ends_well(buffer: Buffer, sample: Sample) -> bool:
    """Whether what damaged the bytes behind a sample has certainly not begun inside it: zeros would have zeroed its last byte, and
    other bytes are said to begin there only where the header is still one. At the end of a file nothing is behind it."""
    if sample.before == "overwritten":
        return False
    last = max(sample.fields.values(), key=lambda member: member.data)
    if sample.before in ("header", "cut"):
        return True
    return last.size > 0 and bytes(buffer[last.data + last.size - 1 : last.data + last.size]) != b"\0"
