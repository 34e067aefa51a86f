"""Runs side by side: one line for each combination of settings, its final loss over seeds; what their configurations differ in, and
where their logs part. Needs no torch.

The loss of a run is the mean of its last `LAST_RECORDS` records of `train/loss`: a single record is the loss of a few batches.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ecdit_train.config.stored import read_tree
from ecdit_train.errors import RunFolderError
from ecdit_train.observe.diverging import Parting, metrics_of, parting
from ecdit_train.observe.journal import read_records
from ecdit_train.observe.redact import redact, redact_text
from ecdit_train.observe.which_run import SWEEP_FILE, hint, is_run
from ecdit_train.run_folder import RESOLVED

LAST_RECORDS = 5

SEED = "train.seed"
NOT_COMPARED = (SEED, "run", "config_dir", "experiment")
"""Keys that tell runs of one combination apart, or name them."""
NAMES = ("run", "config_dir", "experiment")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_DIFFERENT = 40
"""Lines of configuration that are printed; the page and `--json` have all."""


@dataclass(frozen=True, kw_only=True)
class Final:
    """Where a run stands."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One combination."""

    combination: str
    seeds: int
    """Runs that have a loss."""
    runs: int
    mean: float | None
    spread: float | None
    """Sample standard deviation of the loss over seeds; None for fewer than two."""
    step: int | None
    """The last step that all of them logged."""


def final_loss(run: Path) -> Final | None:
    """The loss at the end of a run's log; None where there is none yet."""
    return _final(read_records(run))


def _final(records: Iterable[Mapping[str, Any]]) -> Final | None:
    found: list[tuple[int, float]] = []
    for record in records:
        loss = record.get("train/loss")
        if isinstance(loss, int | float) and math.isfinite(loss):
            found.append((int(record["step"]), float(loss)))
    if not found:
        return None
    return Final(step=found[-1][0], loss=statistics.fmean(loss for _, loss in found[-LAST_RECORDS:]))


def table(runs: Iterable[tuple[str, Path]]) -> list[Line]:
    """Lines in the order in which combinations appear.

    Args:
        runs: (combination, run folder) of every run.
    """
    together: dict[str, list[Final | None]] = {}
    for combination, run in runs:
        together.setdefault(combination, []).append(final_loss(run))
    lines = []
    for combination, finals in together.items():
        losses = [f.loss for f in finals if f is not None]
        lines.append(
            Line(
                combination=combination,
                seeds=len(losses),
                runs=len(finals),
                mean=statistics.fmean(losses) if losses else None,
                spread=statistics.stdev(losses) if len(losses) > 1 else None,
                step=min((f.step for f in finals if f is not None), default=None),
            )
        )
    return lines


def text(lines: Sequence[Line]) -> str:
    """The table as people read it."""
    width = max([len("combination"), *(len(line.combination) for line in lines)])
    rows = [f"{'combination':<{width}}{'seeds':>8}{'step':>10}{'train/loss':>13}{'spread':>10}"]
    for line in lines:
        seeds = str(line.seeds) if line.seeds == line.runs else f"{line.seeds} of {line.runs}"
        mean = "-" if line.mean is None else f"{line.mean:.5f}"
        spread = "-" if line.spread is None else f"{line.spread:.5f}"
        step = "-" if line.step is None else str(line.step)
        rows.append(f"{line.combination:<{width}}{seeds:>8}{step:>10}{mean:>13}{spread:>10}")
    return "\n".join(rows)


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [asdict(line) for line in lines]


def named(folders: Sequence[str]) -> list[tuple[str, Path]]:
    """(combination, run folder) of run folders and of every job of sweep folders.

    Raises:
        RunFolderError: a folder that is neither.
    """
    runs: list[tuple[str, Path]] = []
    plain: list[tuple[Path, dict[str, Any]]] = []
    sweeps = [Path(f) for f in folders if (Path(f) / SWEEP_FILE).is_file()]
    for folder in map(Path, folders):
        if folder in sweeps:
            prefix = f"{folder.name}: " if len(sweeps) > 1 else ""
            runs += [(prefix + combination(job["words"]), folder / job["run"]) for job in read_sweep(folder)["jobs"]]
        elif is_run(folder):
            plain.append((folder, _tree(folder)))
        else:
            what = f"neither a run folder ({RESOLVED}) nor a sweep folder ({SWEEP_FILE})"
            raise RunFolderError(f"{folder} is {what}. {hint(folder)}".rstrip())
    different = _different([values for _, values in plain])
    for folder, values in plain:
        label = " ".join(f"{key}={values[key]}" for key in different if key in values)
        runs.append((label or (folder.name if len(plain) == 1 else "all alike"), folder))
    return runs


# --- one by one ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """One of the compared runs."""

    letter: str
    """What the others call it."""
    folder: Path
    combination: str
    step: int | None
    """The last one logged."""
    steps: int | None
    """As many as it is to make."""
    final: Final | None
    written: float | None
    """When the last record was, in seconds since the epoch."""
    parting: Parting | None
    """From the first run; None of the first itself."""

    @property
    def where(self) -> str:
        if self.step is None:
            return "no record yet"
        if self.steps is None or self.step >= self.steps:
            return f"step {self.step}"
        age = "" if self.written is None else f", last record {_ago(time.time() - self.written)} ago"
        return f"step {self.step} of {self.steps}{age}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    lines: Sequence[Line]
    runs: Sequence[Run]
    different: Mapping[str, Sequence[Any]]
    """key -> its value in every run; `ABSENT` where a run has no such key."""
    only: Mapping[str, Sequence[str]]
    """metric -> letters of the runs that log it, where not all do."""

    def text(self) -> str:
        told = [text(self.lines)]
        if len(self.runs) < 2:
            return told[0]
        wide = max(len(str(run.folder)) for run in self.runs)
        told += ["", *(f"{r.letter}  {r.folder!s:<{wide}}  {r.where}" for r in self.runs)]
        told += ["", *(f"A and {r.letter}: {r.parting.text()}" for r in self.runs if r.parting is not None)]
        if self.only:
            few = [f"{name} ({', '.join(letters)})" for name, letters in list(self.only.items())[:6]]
            told += ["", f"logged by some only: {', '.join(few)}" + (" ..." if len(self.only) > 6 else "")]
        if not self.different:
            return "\n".join([*told, "", "their configurations are alike"])
        told += ["", "their configurations differ in"]
        for key, values in list(self.different.items())[:MAX_DIFFERENT]:
            who: dict[str, list[str]] = {}
            for run, value in zip(self.runs, values, strict=True):
                who.setdefault(_said(key, value), []).append(run.letter)
            said = ", ".join(f"{value} ({' '.join(letters)})" for value, letters in who.items())
            told.append(f"  {key}: {said}")
        if len(self.different) > MAX_DIFFERENT:
            told.append(f"  and {len(self.different) - MAX_DIFFERENT} more keys (--json has all)")
        return "\n".join(told)

    def told(self) -> dict[str, Any]:
        """What the page of `observe.compare_page` says beside its curves."""
        seeds = [
            (line, str(line.seeds) if line.seeds == line.runs else f"{line.seeds} of {line.runs}")
            for line in self.lines
        ]
        different = {key: [_said(key, v) for v in values] for key, values in self.different.items()}
        return {
            "last_records": LAST_RECORDS,
            "table": [[n.combination, s, _dash(n.step), _dash(n.mean), _dash(n.spread)] for n, s in seeds],
            "runs": [[r.letter, str(r.folder), r.where, r.parting.text() if r.parting else "-"] for r in self.runs],
            "only": [[name, ", ".join(letters)] for name, letters in self.only.items()],
            "letters": [run.letter for run in self.runs],
            "different": [[key, *values] for key, values in different.items()],
        }

    def as_json(self) -> dict[str, Any]:
        runs = [
            {"letter": r.letter, "run": str(r.folder), "combination": r.combination, "step": r.step, "steps": r.steps}
            | {"final": None if r.final is None else asdict(r.final)}
            | {"parting": None if r.parting is None else asdict(r.parting)}
            for r in self.runs
        ]
        different = {
            key: [None if v is ABSENT else redact_text(v) if isinstance(v, str) else v for v in values]
            for key, values in redact(self.different).items()
        }
        return {"table": as_json(self.lines), "runs": runs, "different": different, "only": dict(self.only)}


def _dash(value: float | None) -> float | str:
    return "-" if value is None else value


def _said(key: str, value: Any) -> str:
    """A value for people: of a class its name, and nothing secret."""
    text = redact_text(str(value))
    return text.rpartition(".")[2] if key.endswith("_target_") else text


class _Absent:
    def __str__(self) -> str:
        return "-"


ABSENT = _Absent()


def compared(folders: Sequence[str], *, tolerance: float = 0.0) -> Comparison:
    """Raises RunFolderError where a folder is neither a run nor a sweep."""
    found = named(folders)
    logs = [read_records(folder) for _, folder in found]
    trees = [_tree(folder) for _, folder in found]
    runs = []
    for n, ((label, folder), records, tree) in enumerate(zip(found, logs, trees, strict=True)):
        steps = tree.get("train.steps")
        runs.append(
            Run(
                letter=LETTERS[n] if n < len(LETTERS) else f"{LETTERS[n % 26]}{n // 26}",
                folder=folder,
                combination=label,
                step=int(records[-1]["step"]) if records else None,
                steps=int(steps) if isinstance(steps, int) else None,
                final=_final(records),
                written=records[-1].get("time") if records else None,
                parting=parting(logs[0], records, tolerance=tolerance) if n else None,
            )
        )
    keys = dict.fromkeys(key for tree in trees for key in tree if key not in NAMES)
    values = {key: [tree.get(key, ABSENT) for tree in trees] for key in keys}
    logged = [metrics_of(records) for records in logs]
    some = sorted(set[str]().union(*logged) - set[str].intersection(*logged)) if logged else []
    return Comparison(
        lines=table(found),
        runs=runs,
        different={key: row for key, row in values.items() if any(v != row[0] for v in row)},
        only={name: [r.letter for r, own in zip(runs, logged, strict=True) if name in own] for name in some},
    )


def _tree(folder: Path) -> dict[str, Any]:
    """Keys of a run's configuration; none where it has not been frozen yet."""
    return dict(_leaves(read_tree(folder))) if (folder / RESOLVED).is_file() else {}


def _ago(seconds: float) -> str:
    size, unit = next(((s, u) for s, u in ((86400, "d"), (3600, "h"), (60, "min")) if seconds >= 2 * s), (1, "s"))
    return f"{max(0, seconds) / size:.0f} {unit}"


def combination(words: Sequence[str]) -> str:
    """What tells one combination of a sweep from another: its words without the seed."""
    return " ".join(w for w in words if w.partition("=")[0] != SEED) or "all alike"


def read_sweep(folder: Path) -> dict[str, Any]:
    """Raises RunFolderError where `sweep.json` is not what a sweep writes."""
    try:
        found = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
        if not all(isinstance(job["words"], list) and isinstance(job["run"], str) for job in found["jobs"]):
            raise TypeError("jobs without words or run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{folder / SWEEP_FILE} cannot be read: {error}") from error
    return found


def _different(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values differ; of a slot whose class differs, only the class."""
    keys = dict.fromkeys(key for tree in trees for key in tree if key not in NOT_COMPARED)
    missing = object()
    found = [k for k in keys if any(tree.get(k, missing) != trees[0].get(k, missing) for tree in trees)]
    classes = tuple(k.removesuffix("_target_") for k in found if k.endswith("._target_"))
    return [k for k in found if k.endswith("._target_") or not k.startswith(classes or ("\0",))]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found
