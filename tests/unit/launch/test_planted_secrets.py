"""A token is planted wherever one might get in by mistake, and looked for in everything that a launch writes and prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_commands import ecdit
from secret_shapes import TOKENS
from slurm_stand_in import StandIn, shards_in

from launch import snapshot

ROOT = Path(__file__).parents[3]
WORDS = ("experiment=shapes_tiny", "cluster=local", "cluster.gpus_per_node=2", "cluster.cpus_per_gpu=1")
NAMES = ("NOTE", "CITY", "my_choice")
PLACES = {
    "variable": "cluster.env=['{name}={token}']",
    "flag": "cluster.sbatch=['comment={token}']",
    "account": "cluster.account='{token}'",
    "mail": "cluster.mail_user='{token}'",
    "dependency": "cluster.dependency='{token}'",
    "prompt": "observe.prompts=['a {token} dog']",
    "project": "observe.sinks.wandb.project='{token}'",
    "shards": "data.shards='{token}'",
    "image": "cluster.container='{token}'",
    "wrong type": "train.steps='{token}'",
    "wrong key": "train.note='{token}'",
    "wrong choice": "optim='{token}'",
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a data set, beside a Slurm that would take anything."""
    monkeypatch.chdir(tmp_path)
    shards_in(tmp_path / "data" / "shapes")
    StandIn(folder=tmp_path / "bin").install(monkeypatch)
    return tmp_path


def found(token: str, folder: Path) -> list[str]:
    secret = token.partition("me:")[2].partition("@")[0] or token
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert files
    return [str(p) for p in files if secret.encode() in p.read_bytes()]


SHAPES = [shape for shape in TOKENS if shape not in ("private key", "URL")]
PAIRS = [(place, SHAPES[(3 * n + k) % len(SHAPES)]) for n, place in enumerate(PLACES) for k in range(3)]
"""Every place and every form several times; all pairs that end in a rule are in tests/unit/config/test_cluster_rules.py."""


@pytest.mark.parametrize(("place", "shape"), PAIRS)
def test_in_a_configuration_it_is_refused_and_never_shown(place, shape, here, capfd):
    token, name = TOKENS[shape], NAMES[len(shape) % len(NAMES)]
    how = ("--render-only",) if len(shape) % 2 else ()
    assert ecdit("launch", *WORDS, PLACES[place].format(name=name, token=token), *how) == 77
    said = capfd.readouterr()
    assert "ecdit: ConfigError" in said.err
    assert token not in said.out + said.err
    assert not (here / "runs").exists()
    assert found(token, here) == []


@pytest.mark.parametrize("shape", ["private key", "URL"])
def test_forms_that_the_words_of_a_command_line_must_quote(shape, here, capfd):
    (here / "mine" / "cluster").mkdir(parents=True)
    (here / "mine" / "cluster" / "ours.yaml").write_text(f"defaults: [local, _self_]\nenv: ['NOTE={TOKENS[shape]}']\n")
    assert ecdit("launch", "experiment=shapes_tiny", "cluster=ours", "--config-dir", here / "mine") == 77
    said = capfd.readouterr()
    assert "cluster.env = 'NOTE=...': holds " in said.err
    assert "hunter2secret" not in said.out + said.err
    assert not (here / "runs").exists()


def test_what_lies_around_a_launch_stays_out_of_it(here, monkeypatch, capfd):
    """Tokens in the shell, in files beside the code and in the difference to the commit; the launch goes through."""
    token = TOKENS["GitHub"]
    source, mine = here / "source", here / "mine"
    for package in (*snapshot.PACKAGES, "conf"):
        shutil.copytree(
            ROOT / package, source / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "local")
        )
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(source)]
    (source / "notes.md").write_text(f"{token}\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "commit.gpgsign=false", "commit", "-qm", "x"]):
        subprocess.run([*git[:-2], *git[-2:], *words], check=True)
    (source / "notes.md").write_text("taken out again\n")
    for name in ("ecdit_train/.env", "launch/server.pem", "data_pipeline/credentials.json"):
        (source / name).write_text(token)
    mine.mkdir()
    (mine / "router_of_mine.py").write_text("X = 1\n")
    for name in (".env", "id_rsa", "secrets.yaml", "deploy.key", "token.bin"):
        (mine / name).write_text(token)
    for name in ("WANDB_API_KEY", "INNOCENT"):
        monkeypatch.setenv(name, token)
    code = "import sys; from ecdit_train.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "launch", *WORDS, "--config-dir", str(mine), "run=runs/a"],
        env=os.environ | {"PYTHONPATH": str(source)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr
    run = here / "runs" / "a"
    assert found(token, run) == []
    (copy,) = (run / "code").iterdir()
    assert {p.name for p in copy.iterdir()} == {*snapshot.PACKAGES, "config_dir", "snapshot.json"}
    assert [p.name for p in (copy / "config_dir").iterdir()] == ["router_of_mine.py"]
    assert '"changed": true' in (copy / "snapshot.json").read_text()


def test_in_the_code_it_refuses_the_launch(here, capfd):
    (here / "mine").mkdir()
    (here / "mine" / "router_of_mine.py").write_text(f"# a\nX = '{TOKENS['OpenAI']}'\n")
    assert ecdit("launch", *WORDS, "--config-dir", here / "mine") == 77
    said = capfd.readouterr()
    assert "router_of_mine.py = 'line 2': holds an API key" in said.err
    assert TOKENS["OpenAI"] not in said.out + said.err
    assert not (here / "runs").exists()


def test_sbatchs_own_words_are_shown_without_it(here, monkeypatch, capfd):
    StandIn(folder=here / "bin", sbatch=f"echo 'bad comment {TOKENS['Slack']}' >&2; exit 1").install(monkeypatch)
    assert ecdit("launch", *WORDS) == 83
    said = capfd.readouterr()
    assert "bad comment [redacted]" in said.err
    assert TOKENS["Slack"] not in said.out + said.err
