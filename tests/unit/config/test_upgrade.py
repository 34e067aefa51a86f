"""Run folders of older versions (tests/golden/format1, made by ecdit 0.1's `ecdit config show`, and format2) are read as this
version would write them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from ecdit_train.config.compose import compose
from ecdit_train.config.convert import flatten
from ecdit_train.config.stored import freeze, load
from ecdit_train.config.upgrade import FORMAT
from ecdit_train.config.validate import validate
from ecdit_train.errors import RunFolderError

OLD = Path(__file__).parents[2] / "golden" / "format1"
BEFORE_8 = (*(f"cluster.{key}_latency=0.0" for key in ("call", "intra", "inter")), "cluster.peak_fp8_flops=0.0")
"""What a plan did not reckon with before format 8."""
LAYOUT_BEFORE_8 = (
    "train.microbatch=64",
    "parallel.activation_checkpointing=selective",
    "parallel.overlap_chunks=1",
    "parallel.reduce_gradients=step",
)
"""Presets that had it until their layouts came from the plan's search."""
UNCOUNTED = ("encoders.text.parameters=0", "encoders.image.parameters=0")
NOW = {
    "ec_dit_xl_8e": ("encoders=paper", *LAYOUT_BEFORE_8, "moe/dispatcher=deterministic"),
    "gshard_xl_8e": ("encoders=shards", *UNCOUNTED, *LAYOUT_BEFORE_8, "sample/sampler=heun"),
    "shapes_tiny": ("observe/sinks=none",),
    "dense_xl": ("encoders=paper", *LAYOUT_BEFORE_8),
}
BEFORE_4 = ("checkpoint.save=blocking", "health.spike=ignore", "health.digest_every=0", *BEFORE_8)
"""What runs did before format 4."""


def run_folder(tmp_path: Path, text: str) -> Path:
    (tmp_path / "resolved.yaml").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", NOW)
def test_a_run_of_the_first_version_is_what_the_same_words_compose_today(name, tmp_path):
    shutil.copy(OLD / f"{name}.yaml", tmp_path / "resolved.yaml")
    read, now = load(tmp_path), compose([f"experiment={name}", *NOW[name], *BEFORE_4], local=False)
    validate(read)
    # 0.1 gave the shapes presets a W&B project of their own, and token choice's unused keys to every router.
    different = {key for key in flatten(now) if flatten(read).get(key) != flatten(now)[key]} - {
        "observe.sinks.wandb.project"
    }
    assert different == set()


@pytest.mark.parametrize("moe", ["expert_choice", "token_choice", "threshold", "dense"])
def test_a_run_of_format_2_is_what_the_same_words_compose_today(moe, tmp_path):
    shutil.copy(OLD.parent / "format2" / f"shapes_tiny_{moe}.yaml", tmp_path / "resolved.yaml")
    assert load(tmp_path) == compose(["experiment=shapes_tiny", f"moe={moe}", "run=runs/old", *BEFORE_4], local=False)


@pytest.mark.parametrize(
    "words", ["moe=expert_choice", "moe=token_choice", "moe=threshold", "moe=dense", "moe=expert_race", "optim=muon"]
)
def test_a_run_of_format_3_goes_on_as_it_was(words, tmp_path):
    """As what the same words compose today, with saves that block and no defences: what it ran with."""
    shutil.copy(OLD.parent / "format3" / f"shapes_tiny_{words.partition('=')[2]}.yaml", tmp_path / "resolved.yaml")
    assert load(tmp_path) == compose(["experiment=shapes_tiny", words, "run=runs/old", *BEFORE_4], local=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shapes_tiny", ["experiment=shapes_tiny"]),
        (
            "ec_dit_m_64e",
            [
                *("experiment=ec_dit_m_64e", "cluster=h100_ib400", "encoders=paper", "parallel=ep64", *LAYOUT_BEFORE_8),
                *("parallel.overlap_chunks=2", "parallel.exchange=flat", "parallel.reshard_after_forward=all"),
            ],
        ),
        ("slurm_pyxis", ["experiment=dense_xl", "cluster=slurm_pyxis", "encoders=paper", *LAYOUT_BEFORE_8]),
    ],
)
def test_a_run_of_format_4_asks_slurm_for_what_it_asked(name, words, tmp_path):
    shutil.copy(OLD.parent / "format4" / f"{name}.yaml", tmp_path / "resolved.yaml")
    assert load(tmp_path) == compose([*words, "run=runs/old", *BEFORE_8], local=False)


def test_a_run_of_format_5_reads_the_data_that_it_read(tmp_path):
    shutil.copy(OLD.parent / "format5" / "shapes_tiny.yaml", tmp_path / "resolved.yaml")
    assert load(tmp_path) == compose(["experiment=shapes_tiny", "run=runs/old", *BEFORE_8], local=False)


def test_a_run_of_format_6_is_watched_as_it_was(tmp_path):
    shutil.copy(OLD.parent / "format6" / "shapes_tiny.yaml", tmp_path / "resolved.yaml")
    assert load(tmp_path) == compose(["experiment=shapes_tiny", "run=runs/old", *BEFORE_8], local=False)


@pytest.mark.parametrize(("name", "words"), [("shapes_tiny", []), ("shapes_tiny_pair", ["parallel=pair"])])
def test_a_run_of_format_7_exchanges_and_frees_as_it_did(name, words, tmp_path):
    shutil.copy(OLD.parent / "format7" / f"{name}.yaml", tmp_path / "resolved.yaml")
    assert load(tmp_path) == compose(["experiment=shapes_tiny", *words, "run=runs/old", *BEFORE_8], local=False)


def test_what_is_written_says_its_format(tmp_path):
    config = compose(["experiment=shapes_tiny"], local=False)
    freeze(config, tmp_path)
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text(encoding="utf-8"))["format"] == FORMAT
    assert load(tmp_path) == config


def test_a_newer_format_is_refused_by_its_number(tmp_path):
    with pytest.raises(
        RunFolderError, match=r"has format 9; this ecdit reads formats 1 to 8: use the one that wrote it"
    ):
        load(run_folder(tmp_path, "format: 9\nrun: x\n"))


def test_what_only_looks_old_is_refused_by_the_version_it_should_be_of(tmp_path):
    text = (OLD / "shapes_tiny.yaml").read_text(encoding="utf-8").replace("router: expert_choice", "router: mine")
    with pytest.raises(RunFolderError, match=r"format 1, of ecdit 0\.1, as it says none.*'mine'"):
        load(run_folder(tmp_path, text))
