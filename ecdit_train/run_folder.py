"""Where things lie in a run folder. The only place that spells these names; below every room, so that all use it.

<run>/resolved.yaml                   the frozen configuration
<run>/job.sh, <run>/job.json          job script of `ecdit launch`, and what its supervisor is told
<run>/code/0123456789ab/              the code that jobs run: a copy, named by its content
<run>/logs/, <run>/jobs/              what jobs say; what they did and decided (launch.record)
<run>/metrics/0001.jsonl              one JSON object per step that the first life logged: the truth, W&B is a copy
<run>/metrics.jsonl                   each step once, made from them
<run>/alerts.jsonl                    what was found wrong, when it began and was over (ecdit_train.supervise.alert_file)
<run>/lease/, <run>/lives/, <run>/beats/   whose the folder is, its lives, what its ranks do (ecdit_train.supervise)
<run>/checkpoints/                    committed steps (ecdit_train.checkpoint)
<run>/quarantine-0000-life-0001.jsonl samples that data-parallel rank 0 could not read in the first life
<run>/samples/step_00000100.png       sample grid, with step_00000100.json beside it
<run>/routing/step_00000100.npz       RoutingMaps
<run>/routing/numbers_00000100.json   RoutingNumbers of that step's record
<run>/pictures/step_00000100.png      what `ecdit sample` drew
<run>/evaluation/*.json               results of `ecdit evaluate`
<run>/allocation/step_00000100.json   what objects and background get (`ecdit allocation`), with a .png beside it
<run>/wandb_id, <run>/wandb/          W&B's run id and its files
<run>/report.html                     written by `ecdit report`
"""

from __future__ import annotations

import re
from pathlib import Path

RESOLVED = "resolved.yaml"
JOB_SCRIPT = "job.sh"
JOB_FILE = "job.json"
RANKS_SCRIPT = "ranks.sh"
"""The ranks' interpreter where it needs more words than a name: in an Apptainer image."""
CODE = "code"
JOBS = "jobs"
LOGS = "logs"
METRICS_FILE = "metrics.jsonl"
METRICS = "metrics"
ALERTS = "alerts.jsonl"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
ROUTING = "routing"
PICTURES = "pictures"
EVALUATION = "evaluation"
ALLOCATION = "allocation"
WANDB_ID = "wandb_id"
REPORT = "report.html"


def metrics_path(run_folder: Path) -> Path:
    return run_folder / METRICS_FILE


def quarantine_path(run_folder: Path, *, dp_rank: int | str, life: int | str) -> Path:
    """A number, or `*` for all of them. Each life writes files of its own."""
    rank, number = (n if isinstance(n, str) else f"{n:04d}" for n in (dp_rank, life))
    return run_folder / f"quarantine-{rank}-life-{number}.jsonl"


def samples_path(run_folder: Path, *, step: int) -> Path:
    """The grid's PNG; its description has the same name with `.json`."""
    return run_folder / SAMPLES / f"step_{step:08d}.png"


def routing_path(run_folder: Path, *, step: int) -> Path:
    return run_folder / ROUTING / f"step_{step:08d}.npz"


def routing_numbers_path(run_folder: Path, *, step: int) -> Path:
    return run_folder / ROUTING / f"numbers_{step:08d}.json"


def pictures_path(run_folder: Path, *, step: int) -> Path:
    return run_folder / PICTURES / f"step_{step:08d}.png"


def evaluation_path(run_folder: Path, *, suite: str, step: int) -> Path:
    return run_folder / EVALUATION / f"{suite}_{step:08d}.json"


def allocation_path(run_folder: Path, *, step: int) -> Path:
    """The figure has the same name with `.png`."""
    return run_folder / ALLOCATION / f"step_{step:08d}.json"


def by_step(folder: Path, *, suffix: str, prefix: str = "step_") -> list[tuple[int, Path]]:
    """(step, file) of every `<prefix><n><suffix>` in a folder, in step order; empty when there is no such folder."""
    pattern = re.escape(prefix) + r"(\d+)"
    found = [(re.fullmatch(pattern, path.name.removesuffix(suffix)), path) for path in folder.glob(f"*{suffix}")]
    return sorted((int(match[1]), path) for match, path in found if match)
