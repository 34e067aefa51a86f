"""Every experiment: how it differs from the default configuration, its size; job scripts for three machine rooms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ecdit_train.config.compose import compose, groups
from ecdit_train.config.describe import differences
from ecdit_train.config.schema import RunConfig
from ecdit_train.model.dit import DiT
from launch.submit import job_script

HERE = Path(__file__).parent
EXPERIMENTS = groups()["experiment"]
SBATCH = {
    "h100_ib400": ["experiment=ec_dit_xl_8e"],
    "h200_ib400": ["experiment=ec_dit_m_64e", "cluster=h200_ib400"],
    "slurm_pyxis": ["experiment=ec_dit_3xl_32e", "cluster=slurm_pyxis", "data.shards=/lustre/shared/images"],
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


@pytest.mark.parametrize("cluster", SBATCH)
def test_job_script(cluster, request):
    script = job_script(compose(SBATCH[cluster], local=False), run=f"/runs/{cluster}", python="python")
    path = HERE / "sbatch" / f"{cluster}.sh"
    if request.config.getoption("--update-golden", default=False):
        path.write_text(script, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == script, f"{path} is out of date: run `make golden`, read the diff"
