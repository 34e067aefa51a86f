"""Hydra launchers for `ecdit ... -m`: `hydra/launcher=local` (one job after another here) and `slurm` (one sbatch each).

Hydra looks for plugins in this namespace folder, so the classes live here; what a job is and how it starts is in
`ecdit_train/sweep.py`, which comes in as the task. No `from __future__ import annotations`: Hydra's scanner runs this file
before it is a module, and dataclasses could not look its names up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher


class _JobsOfEcdit(Launcher):
    """Starts jobs by the method of the task that `start` names."""

    start: str

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        if not hasattr(task_function, self.start):
            raise TypeError(f"{type(self).__name__} launches jobs of `ecdit VERB -m` only")
        self.task = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Every job's outcome is its final loss, which is what a searching sweeper wants to make small."""
        jobs = [self.task.prepare(list(words)) for words in job_overrides]  # all, before the first one starts
        outcomes = []
        for job, words in zip(jobs, job_overrides, strict=True):
            outcome = JobReturn(overrides=list(words), status=JobStatus.COMPLETED)
            outcome.return_value = getattr(self.task, self.start)(job)
            outcomes.append(outcome)
        return outcomes


class LocalLauncher(_JobsOfEcdit):
    start = "run_here"


class SlurmLauncher(_JobsOfEcdit):
    start = "submit"


@dataclass
class LocalConf:
    _target_: str = "hydra_plugins.ecdit_launchers.LocalLauncher"


@dataclass
class SlurmConf:
    _target_: str = "hydra_plugins.ecdit_launchers.SlurmLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="local", node=LocalConf, provider="ecdit")
ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmConf, provider="ecdit")
