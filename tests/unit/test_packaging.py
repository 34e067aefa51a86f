"""What a wheel holds, and that it needs nothing of the checkout: built from a copy, unpacked, run from another folder.

And that the two descriptions of CI, the Makefile's probe and the package's metadata say the same."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built as a user would from a checkout with settings of this machine in `conf/local`."""
    source, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in ("ecdit_train", "data_pipeline", "launch", "conf"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "local")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "conf" / "local").mkdir()
    (source / "conf" / "local" / "default.yaml").write_text("# @package _global_\ncluster: {account: mine}\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
    ]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_every_file_of_a_package_is_in_it_and_nobodys_settings(wheel: zipfile.ZipFile) -> None:
    """Presets, templates, styles: `conf` through its link, `conf/local` never."""
    ours = {
        str(Path(folder, name).relative_to(ROOT))
        for package in ("ecdit_train", "data_pipeline", "launch")
        for folder, _, names in os.walk(ROOT / package, followlinks=True)
        for name in names
        if not {"__pycache__", "local"} & set(Path(folder).parts[len(ROOT.parts) :])
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == ours
    assert {"ecdit_train/conf/config.yaml", "launch/job.sh.template"} <= ours


def test_top_level_names(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ecdit_train", "data_pipeline", "launch"}


def test_it_composes_and_renders_from_anywhere(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("defaults: []\n")
    command = [sys.executable, "-m", "ecdit_train.cli"]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    for verb in ("config show experiment=ec_dit_xl_8e", "launch experiment=ec_dit_xl_8e data.shards=/d --render-only"):
        done = subprocess.run([*command, *verb.split()], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "ec_dit_xl_8e" in done.stdout


def test_ci_and_contributors_run_the_same() -> None:
    script = re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["check"]
    assert (
        [step["run"].split()[1] for step in job["steps"] if "run" in step]
        == script
        == ["setup", "slurm-deps", "browser-deps", "lint", "test"]
    )


def test_pythons_are_the_same_everywhere() -> None:
    pythons = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["check"]["strategy"]
    minors = [int(version.partition(".")[2]) for version in pythons["matrix"]["python"]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"
    probe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("PYTHON ?="))
    assert re.findall(r"python3\.(\d+)", probe) == [str(minor) for minor in minors]
    assert f"(3, {minors[0]}) <= sys.version_info < (3, {minors[-1] + 1})" in probe


IMPORTED_AS = {
    "nvidia-dali-cuda130": "nvidia",
    "hydra-core": "hydra",
    "megatron-core": "megatron",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
}


def imported_by_nothing(requirements: list[str]) -> set[str]:
    """Those whose package no shipped file imports."""
    names = {re.split(r"[\[=<>!~ ]", line)[0] for line in requirements}
    files = [
        path
        for package in ("ecdit_train", "data_pipeline", "launch", "hydra_plugins")
        for path in (ROOT / package).rglob("*.py")
    ]
    tops: set[str] = set()
    for node in (node for path in files for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            tops |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            tops.add(node.module.partition(".")[0])
    return {name for name in names if IMPORTED_AS.get(name, name.replace("-", "_")) not in tops}


def test_no_dependency_that_nothing_imports() -> None:
    """One that nothing imports is a promise that nothing keeps (docs/decisions/0010); the GPU image takes all extras but two."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert imported_by_nothing(project["dependencies"]) == set()
    assert imported_by_nothing([line for name, lines in extras.items() if name != "dev" for line in lines]) == set()
    assert imported_by_nothing(["torch>=2", "mosaicml-streaming==0.13", "hydra-core"]) == {"mosaicml-streaming"}


def test_every_shell_script_is_linted() -> None:
    """`make lint` names them; a rendered job script stands for its template."""
    (line,) = re.findall(r"^\t\$\(BIN\)/shellcheck (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = {path for pattern in line.split() for path in ROOT.glob(pattern)}
    made = {"runs", "data", "exports", "build"}
    tops = [p for p in ROOT.iterdir() if p.name not in made and (not p.name.startswith(".") or p.name == ".ci")]
    files = [file for top in tops for file in top.rglob("*") if file.is_file() and file.suffix in ("", ".sh")]
    scripts = {file for file in files if re.match(rb"#!\S*(/env )?(ba)?sh\b", file.open("rb").readline())}
    assert scripts - named == set()
