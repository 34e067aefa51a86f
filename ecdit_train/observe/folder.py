"""Where things lie in a run folder. The only place that spells these names.

<run>/resolved.yaml                   the frozen configuration
<run>/metrics.jsonl                   one JSON object per logged step: the truth, W&B is a copy
<run>/samples/step_00000100.png       sample grid, with step_00000100.json beside it
<run>/routing/step_00000100.npz       RoutingMaps
<run>/evaluation/*.json               results of `ecdit eval`
<run>/wandb_id, <run>/wandb/          W&B's run id and its files
<run>/report.html                     written by `ecdit report`
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
SAMPLES = "samples"
ROUTING = "routing"
EVALUATION = "evaluation"
RESOLVED = "resolved.yaml"
REPORT = "report.html"
WANDB_ID = "wandb_id"


def metrics_path(run_folder: Path) -> Path:
    return run_folder / METRICS_FILE


def samples_path(run_folder: Path, *, step: int) -> Path:
    """The grid's PNG; its description has the same name with `.json`."""
    return run_folder / SAMPLES / f"step_{step:08d}.png"


def routing_path(run_folder: Path, *, step: int) -> Path:
    return run_folder / ROUTING / f"step_{step:08d}.npz"


def by_step(folder: Path, *, suffix: str) -> list[tuple[int, Path]]:
    """(step, file) of every `step_<n><suffix>` in a folder, in step order; empty when there is no such folder."""
    found = []
    for path in folder.glob(f"step_*{suffix}"):
        match = re.fullmatch(r"step_(\d+)", path.name.removesuffix(suffix))
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found)


def write_atomically(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one, never half of it; survives a crash of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
