"""Executables that answer as Slurm's commands do (their texts are those of 22.05), put first on PATH: a cluster of a few lines."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

GPU_NODES = "".join(f"g{n}|gpu|96|1000000|gpu:h100:8(S:0-1)|hbm80,ib|idle\n" for n in range(1, 9))
CPU_NODES = "c1|cpu|2|4000|(null)|(null)|idle\nc2|cpu|2|4000|(null)|(null)|idle\n"


def partition(name: str, **fields: object) -> str:
    """A line of `scontrol show partition -o`."""
    known = {
        "AllowGroups": "ALL", "AllowAccounts": "ALL", "AllowQos": "ALL", "Default": "NO", "QoS": "N/A", "MaxNodes": "UNLIMITED",
        "MaxTime": "UNLIMITED", "MaxMemPerNode": "UNLIMITED", "State": "UP", "TRES": "cpu=8,mem=16000M",
    }  # fmt: skip
    return " ".join([f"PartitionName={name}", *(f"{k}={v}" for k, v in (known | fields).items())]) + "\n"


@dataclass(kw_only=True)
class StandIn:
    """Folder of the commands, and what they answer; `install` writes them."""

    folder: Path
    partitions: str = partition("cpu", Default="YES") + partition("gpu", MaxTime="2-00:00:00")
    nodes: str = CPU_NODES + GPU_NODES
    queue: str = ""
    sbatch: str = "echo 4711"
    config: str = ""
    """Of `scontrol show config`."""
    reservations: str = "true"
    """What `scontrol show reservation` does."""
    log: Path = field(init=False)
    """What was submitted: the words, and sbatch's own variables."""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> StandIn:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "submitted"
        expand = r'echo "$3" | tr "," "\n"'
        partitions = f"cat {self.folder}/partitions"
        config = f"cat {self.folder}/config"
        answers = {
            "scontrol": f'case "$*" in *hostnames*) {expand};; *partition*) {partitions};; *config*) {config};; '
            f"*reservation*) {self.reservations};; esac",
            "sinfo": f"cat {self.folder}/nodes",
            "squeue": f"cat {self.folder}/queue",
            "sbatch": f'echo "$*" >> {self.log}; env | grep ^SBATCH_ >> {self.log}; {self.sbatch}',
        }
        for name, text in (
            ("partitions", self.partitions),
            ("nodes", self.nodes),
            ("queue", self.queue),
            ("config", self.config),
        ):
            (self.folder / name).write_text(text)
        for name, body in answers.items():
            (self.folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (self.folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{self.folder}{os.pathsep}{os.environ['PATH']}")
        return self


def shards_in(folder: Path) -> Path:
    """What `ecdit launch` takes for a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}\n")
    return folder
