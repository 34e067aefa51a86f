"""The code that a job runs: a copy, named by its content, without what should not leave the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from secret_shapes import TOKENS

from ecdit_train import lineage
from ecdit_train.config.compose import compose
from ecdit_train.config.stored import freeze, load
from ecdit_train.errors import ConfigError
from launch.snapshot import take

ROOT = Path(__file__).parents[3]


@pytest.fixture
def source(tmp_path) -> Path:
    """A checkout of few files."""
    root = tmp_path / "source"
    for name, text in {
        "ecdit_train/a.py": "A = 1\n",
        "data_pipeline/b.py": "B = 1\n",
        "launch/job.sh.template": "#!\n",
        "hydra_plugins/ecdit_launchers.py": "C = 1\n",
        "hydra_plugins/somebody_elses.py": "D = 1\n",
        "conf/model/xl.yaml": "x: 1\n",
        "conf/local/default.yaml": "account: mine\n",
        "ecdit_train/__pycache__/a.cpython-311.pyc": "x",
        "ecdit_train/.env": "x",
        "ecdit_train/server.pem": "x",
        "ecdit_train/id_rsa": "x",
        "ecdit_train/credentials.json": "x",
        "tests/t.py": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "ecdit_train" / "conf").symlink_to("../conf")
    return root


@pytest.fixture
def mine(tmp_path) -> Path:
    """A user's folder with more in it than code."""
    folder = tmp_path / "mine"
    for name, text in {
        "router.py": "class Mine: pass\n",
        "moe/router/mine.yaml": "_target_: router.Mine\n",
        "helpers/words.txt": "a\n",
        "weights.safetensors": "x",
        "big.json": "x" * (1 << 20) + "x",
        ".env": "x",
        ".git/config": "x",
        "secrets.yaml": "x",
        "secrets.py": "import keyring\n",
        "runs/a/resolved.yaml": "x",
        "runs/a/metrics/1.json": "x",
        "data/manifest.json": "x",
        "venv/pyvenv.cfg": "x",
        "venv/lib/torch.py": "x",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "elsewhere.py").symlink_to(ROOT / "launch" / "submit.py")
    (folder / "loop").symlink_to(folder)
    return folder


def git(folder: Path, *words: str) -> str:
    own = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *own, "-C", folder, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_what_is_copied(source, mine):
    assert sorted(take(config_dir=None, root=source).files) == [
        "data_pipeline/b.py",
        "ecdit_train/a.py",
        "ecdit_train/conf/model/xl.yaml",
        "hydra_plugins/ecdit_launchers.py",
        "launch/job.sh.template",
        "snapshot.json",
    ]
    more = take(config_dir=str(mine), root=source)
    assert sorted(name for name in more.files if name.startswith("config_dir/")) == [
        "config_dir/helpers/words.txt",
        "config_dir/moe/router/mine.yaml",
        "config_dir/router.py",
        "config_dir/secrets.py",
    ]
    assert more.words(Path("/r")) == ("--config-dir", f"/r/code/{more.id}/config_dir")


def test_an_unchanged_tree_is_copied_once_and_a_change_never_touches_it(source, tmp_path):
    first = take(config_dir=None, root=source)
    folder = first.write(tmp_path / "run")
    assert folder == tmp_path / "run" / "code" / first.id
    assert take(config_dir=None, root=source).write(tmp_path / "run") is None
    (source / "ecdit_train" / "a.py").write_text("A = 2\n")
    second = take(config_dir=None, root=source)
    assert second.id != first.id
    second.write(tmp_path / "run")
    assert (folder / "ecdit_train" / "a.py").read_text() == "A = 1\n"
    assert sorted(os.listdir(tmp_path / "run" / "code")) == sorted([first.id, second.id])
    assert not os.stat(folder / "ecdit_train" / "a.py").st_mode & 0o222  # not to be edited by mistake


def test_half_a_copy_is_none(source, tmp_path, monkeypatch):
    snapshot = take(config_dir=None, root=source)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        snapshot.write(tmp_path / "run")
    assert os.listdir(tmp_path / "run" / "code") == []


def test_it_says_which_commit_it_is_of(source, tmp_path):
    git(source, "init", "-q")
    git(source, "add", "ecdit_train/a.py", "conf")
    git(source, "commit", "-q", "-m", "x")
    clean = take(config_dir=None, root=source)
    told = json.loads(clean.files["snapshot.json"])["git"]
    assert told == {"commit": git(source, "rev-parse", "HEAD"), "changed": False, "diff_sha256": None}
    assert "diff.patch" not in clean.files
    (source / "ecdit_train" / "a.py").write_text("A = 2\n")
    changed = take(config_dir=None, root=source)
    assert b"+A = 2" in changed.files["diff.patch"]
    folder = changed.write(tmp_path / "run")
    assert lineage.git(folder) == lineage.git(source)  # what a checkpoint of the job will say
    assert lineage.diff(folder) == lineage.diff(source)


@pytest.mark.parametrize("shape", [s for s in TOKENS if s != "W&B"])
def test_a_file_with_a_secret_refuses_the_launch(shape, source, mine):
    (mine / "helpers" / "words.txt").write_text(f"a\n{TOKENS[shape]}\n")
    (source / "launch" / "new.py").write_text(f"X = '{TOKENS[shape]}'\n")
    with pytest.raises(ConfigError) as caught:
        take(config_dir=str(mine), root=source)
    assert [(p.field, p.value) for p in caught.value.problems] == [
        (str(source / "launch" / "new.py"), "line 1"),
        (str(mine / "helpers" / "words.txt"), "line 2"),
    ]
    assert TOKENS[shape] not in str(caught.value)


def test_a_difference_that_holds_a_secret_is_left_out(source):
    """Also in a line that was taken away, and in files that are not copied."""
    (source / "notes.md").write_text(f"{TOKENS['GitHub']}\n")
    git(source, "init", "-q")
    git(source, "add", "notes.md")
    git(source, "commit", "-q", "-m", "x")
    (source / "notes.md").write_text("gone\n")
    snapshot = take(config_dir=None, root=source)
    assert "diff.patch" not in snapshot.files
    assert json.loads(snapshot.files["snapshot.json"])["git"]["changed"] is True


# --- run from -----------------------------------------------------------------------------------------------------------


def test_our_own_package_runs_from_its_copy(tmp_path):
    """Wherever it is started, with a hostile file in the working directory, and nothing else of the checkout on the path."""
    folder = take(config_dir=None).write(tmp_path / "run")
    (tmp_path / "launch.py").write_text("raise SystemExit('the working directory was imported')\n")
    code = (
        "import ecdit_train, launch.submit, data_pipeline; from ecdit_train.config.compose import compose\n"
        "compose(['experiment=shapes_tiny']); print(ecdit_train.__file__, launch.submit.__file__, data_pipeline.__file__)"
    )
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(f"{folder}/") for path in done.stdout.split()), done.stdout


def test_a_job_reads_the_copy_of_the_users_folder_and_the_run_remembers_the_original(mine, tmp_path, monkeypatch):
    """Nobody trusts modules that lie inside a run folder, so `ecdit sample` must find the user's own."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    run = tmp_path / "run"
    cfg = replace(compose(["experiment=shapes_tiny", f"run={run}"], config_dir=mine), config_dir=str(mine))
    freeze(cfg, run)
    snapshot = take(config_dir=str(mine))
    copy = snapshot.write(run) / "config_dir"
    of_a_rank = load(run, config_dir=copy)
    assert of_a_rank.config_dir == str(copy)
    freeze(of_a_rank, run)
    assert load(run) == cfg
