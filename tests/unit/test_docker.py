"""The recipe of the images where none can be built: what goes in, what holds the bases, and its steps in an empty environment.

`make lint` runs hadolint and shellcheck over the files.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pathspec import PathSpec

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
BASES = re.compile(r"^ARG (\w+)_BASE=([\w./-]+:[\w.-]+)@(sha256:[0-9a-f]{64})$", flags=re.MULTILINE)


def let_in(root: Path = ROOT) -> list[Path]:
    """What a builder would be sent: files and links below `root`, relative to it."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    # As git's patterns with two differences: all begin at the root, and mean what is below a folder that they match as well.
    anchored = [f"!/{line[1:]}" if line.startswith("!") else f"/{line}" for line in lines]
    left_out = PathSpec.from_lines("gitignore", [text for line in anchored for text in (line, f"{line}/**")])
    tops = [path for path in root.iterdir() if not path.name.startswith(".")]
    files = [file for top in tops for file in ([top] if top.is_file() else top.rglob("*"))]
    relative = [file.relative_to(root) for file in files if file.is_symlink() or file.is_file()]
    return sorted(file for file in relative if not left_out.match_file(file))


def copied(folder: Path) -> Path:
    """The build's context."""
    for file in let_in():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file, follow_symlinks=False)
    return folder


def test_only_what_an_image_needs_is_sent(tmp_path):
    names = {str(file) for file in let_in()}
    assert {name.partition("/")[0] for name in names} == {
        *("ecdit_train", "data_pipeline", "launch", "hydra_plugins", "conf", "docker"),
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
    }
    assert {name for name in names if name.startswith("docker/")} == {"docker/install.sh", "docker/smoke.sh"}
    assert {"ecdit_train/conf", "conf/config.yaml", "launch/job.sh.template"} <= names
    for name in (
        "conf/local/default.yaml",
        "launch/__pycache__/job.pyc",
        "runs/a/resolved.yaml",
        ".env",
        "key",
        "tests/conf/x",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "launch" / "job.py").touch()
    assert let_in(tmp_path) == [Path("launch/job.py")]


def test_bases_are_held_by_digest_and_nothing_else_is_pulled():
    text = DOCKERFILE.read_text()
    assert {kind for kind, _, _ in BASES.findall(text)} == {"GPU", "CPU"}
    assert re.findall(r"^FROM (.*)$", text, flags=re.MULTILINE) == [
        "${GPU_BASE} AS gpu",
        "${CPU_BASE} AS cpu",
        "${KIND}",
    ]
    assert "--from" not in text
    assert "# syntax" not in text


def test_it_runs_as_nobody():
    """hadolint forbids root by name; a number is what Kubernetes and Slurm's containers can check."""
    (user,) = re.findall(r"^USER (.*)$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    assert int(user) > 0


def test_both_pythons_are_the_same_and_ours():
    text = DOCKERFILE.read_text()
    (base,) = (name for kind, name, _ in BASES.findall(text) if kind == "CPU")
    minors = {*re.findall(r"python(3\.\d+)", text), *re.findall(r"^python:(3\.\d+)", base)}
    assert len(minors) == 1
    low, high = re.findall(
        r"3\.(\d+)", tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    )
    assert int(low) <= int(minors.pop().partition(".")[2]) < int(high)


def digests(folder: Path, *, answer: str) -> subprocess.CompletedProcess[str]:
    """`make image-digests` on a copy, with a stand-in for docker."""
    shutil.copytree(ROOT / "docker", folder / "docker")
    (folder / "docker-answers").write_text(answer)
    (folder / "bin").mkdir()
    (folder / "bin" / "docker").write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\ngrep -m 1 . {folder}/docker-answers\n'
    )
    (folder / "bin" / "docker").chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    command = [folder / "docker" / "digests.sh"]
    return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=False)


def test_digests_are_asked_for(tmp_path):
    new = f"sha256:{'5' * 64}"
    assert digests(tmp_path, answer=new).returncode == 0
    before, after = (BASES.findall(p.read_text()) for p in (DOCKERFILE, tmp_path / "docker" / "Dockerfile"))
    assert after == [(kind, name, new) for kind, name, _ in before]
    asked = (tmp_path / "asked").read_text().split("\n")[:-1]
    assert [line.rpartition(" ")[2] for line in asked] == [name for _, name, _ in before]


@pytest.mark.parametrize("answer", ["", "<no value>", "sha256:abc"])
def test_an_answer_that_is_none_changes_nothing(answer, tmp_path):
    done = digests(tmp_path, answer=answer)
    assert done.returncode != 0
    assert (tmp_path / "docker" / "Dockerfile").read_text() == DOCKERFILE.read_text()


# --- the steps themselves ---------------------------------------------------------------------------------------------


def clean(folder: Path, *command: str | Path, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """In an environment of its own, of which only what pip is told comes from here."""
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_") and name != "PIP_CONSTRAINT"}
    env = {
        "PATH": f"{folder / 'venv' / 'bin'}:/usr/bin:/bin",
        "HOME": str(folder),
        "PYTHONSAFEPATH": "1",
        **pip,
        **extra,
    }
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_an_empty_environment_becomes_the_image(tmp_path):
    """install.sh and smoke.sh as the Dockerfile runs them, and a rank's command as a job runs it in a container."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    asked = clean(tmp_path, "pip", "download", "--no-deps", "--dest", tmp_path / "asked", "einops", cwd=tmp_path)
    if asked.returncode:
        pytest.skip(f"no package index answers: {asked.stderr.strip()[-200:]}")
    context = copied(tmp_path / "ecdit")
    for part in ("dependencies", "package"):
        done = clean(tmp_path, context / "docker" / "install.sh", "cpu", part, cwd=context)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    shutil.move(context, tmp_path / "hidden")  # the package that was installed needs nothing of it
    done = clean(tmp_path, tmp_path / "hidden" / "docker" / "smoke.sh", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith("smoke: this image works\n")

    snapshot = tmp_path / "run" / "code"
    shutil.copytree(ROOT / "ecdit_train", snapshot / "ecdit_train", symlinks=False)
    (snapshot / "ecdit_train" / "__init__.py").write_text("print('the code of the job')\n")
    rank = clean(tmp_path, "python", "-m", "ecdit_train.cli", "--version", cwd=tmp_path, PYTHONPATH=str(snapshot))
    assert rank.stdout.splitlines()[0] == "the code of the job"
    shutil.rmtree(tmp_path / "venv")  # gigabytes, which pytest would keep


def builder() -> str | None:
    """A program that builds images here; None where there is none that answers."""
    for name in ("docker", "podman", "buildah"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0:
            return name
    return None


@pytest.mark.slow
def test_the_cpu_image_builds():
    if (name := builder()) is None:
        pytest.skip("no docker, podman or buildah answers on this machine")
    made = subprocess.run(
        ["make", "image-cpu", f"BUILDER={name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-4000:]
