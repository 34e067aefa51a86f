"""Every experiment: how it differs from the default configuration, its size; job scripts for three machine rooms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ecdit_train.config.compose import compose, groups
from ecdit_train.config.describe import differences
from ecdit_train.config.schema import RunConfig
from ecdit_train.model.dit import DiT
from launch.submit import compose_job

HERE = Path(__file__).parent
EXPERIMENTS = groups()["experiment"]
SBATCH = {
    "h100_ib400": ["experiment=ec_dit_xl_8e"],
    "h200_ib400": ["experiment=ec_dit_m_64e", "cluster=h200_ib400"],
    "slurm_pyxis": ["experiment=ec_dit_3xl_32e", "cluster=slurm_pyxis", "data.shards=/lustre/shared/images"],
    "m_64e_on_64_h100": [
        "experiment=ec_dit_m_64e",
        "cluster=h100_ib400",
        "cluster.nodes=8",
        "data.shards=/lustre/shared/images",
    ],
}


@pytest.fixture(scope="module")
def base() -> RunConfig:
    return compose([], local=False)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name, base, golden):
    lines = differences(compose([f"experiment={name}"], local=False), base)
    golden(f"experiments/{name}.txt", section="config", text="\n".join(lines))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_parameters(name, golden):
    """Counted in the real network on the meta device, which is where a run begins; nothing is allocated.

    `activated` is what one token meets: of a layer's experts, capacity_factor ones.
    """
    config = compose([f"experiment={name}"], local=False)
    with torch.device("meta"):
        model = DiT(config.model, config.moe, channels=config.encoders.image.channels,
                    text_features=config.encoders.text.width)  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    activated = (
        total
        - experts
        + experts * (config.moe.router.experts_per_token() if config.moe.router else 1) / config.moe.num_experts
    )
    frozen = config.encoders.text.num_parameters() + config.encoders.image.num_parameters()
    golden(f"experiments/{name}.txt", section="parameters",
           text=f"network: {total:,}\nactivated: {activated:,.0f}\nfrozen encoders: {frozen:,}")  # fmt: skip


def test_no_golden_file_without_its_experiment():
    assert {path.stem for path in (HERE / "experiments").glob("*.txt")} == set(EXPERIMENTS)


@pytest.mark.parametrize("name", SBATCH)
def test_what_is_submitted(name, request, monkeypatch):
    """What `ecdit launch --render-only` shows: the script, and what its supervisor is told. The code's own name is left open."""
    monkeypatch.setattr("os.getcwd", lambda: "/home/me")
    own = [
        "cluster.job_python=/opt/ecdit/bin/python",
        *([] if name == "slurm_pyxis" else ["cluster.python=/opt/ecdit/bin/python"]),
    ]
    job = compose_job(compose([*SBATCH[name], *own], local=False), run=f"/runs/{name}", look=False)
    text = re.sub(r"code: \d+ files", "code: N files", job.text().replace(job.snapshot.id, "0123456789ab"))
    path = HERE / "sbatch" / f"{name}.sh"
    if request.config.getoption("--update-golden", default=False):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, f"{path} is out of date: run `make golden`, read the diff"
