"""A folder of the user's own: its groups, experiments and modules are found, and nothing of ours can be replaced by it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ecdit_train.config.compose import compose, configure, groups, override
from ecdit_train.config.stored import freeze, load
from ecdit_train.errors import ConfigError, RunFolderError

ROUTER = '''
from dataclasses import dataclass
from ecdit_train.config.slots import RouterConfig


@dataclass(frozen=True, kw_only=True)
class Mine(RouterConfig):
    """A router of one's own."""

    sharpness: float
    """How sharp."""
    rounds: int = 3
    """How often."""

    def experts_per_token(self):
        return 2.0

    def capacity(self, *, group_tokens, num_experts):
        return group_tokens * 2.0 / num_experts
'''


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A router with a default, its YAML, a bundle and an experiment; the module has a name of its own for each test."""
    module = f"router_of_{tmp_path.name.replace('-', '_')}"
    mine = tmp_path / "mine"
    for name, text in {
        f"{module}.py": ROUTER,
        "torch.py": "raise RuntimeError('a module of the user replaced torch')",
        "moe/router/sharp.yaml": f"_target_: {module}.Mine\nsharpness: 0.5\n",
        "experiment/sharp_shapes.yaml": "# @package _global_\ndefaults: [shapes_tiny, override /moe/router: sharp, _self_]\n"
        "experiment: sharp_shapes\ntrain:\n  steps: 77\n",
        "extra/long.yaml": "# @package _global_\ntrain:\n  steps: 123\n",
    }.items():
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(text)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return mine


def test_a_router_and_an_experiment_of_ones_own(folder):
    cfg = configure(["experiment=sharp_shapes", "moe.router.sharpness=0.25"], config_dir=folder).config
    assert (cfg.experiment, cfg.train.steps, cfg.moe.router.sharpness, cfg.moe.router.rounds) == (
        "sharp_shapes",
        77,
        0.25,
        3,
    )
    assert cfg.config_dir == str(folder)
    assert "sharp" in groups(config_dir=folder)["moe/router"]
    assert "sharp" not in groups()["moe/router"]


def test_a_key_that_the_yaml_leaves_to_its_default(folder):
    for word in ("moe.router.rounds=5", "+moe.router.rounds=5", "++moe.router.rounds=5"):
        assert compose(["experiment=sharp_shapes", word], config_dir=folder).moe.router.rounds == 5


def test_keys_of_ones_own_class_are_checked(folder):
    with pytest.raises(ConfigError) as caught:
        configure(["moe/router=sharp", "moe.router.sharpnes=0.5", "moe.router.rounds=x"], config_dir=folder)
    assert str(caught.value).splitlines() == [
        "moe.router.sharpnes = 0.5: unknown key; nearest valid: moe.router.sharpness",
        "moe.router.rounds = 'x': must be a whole number",
    ]
    with pytest.raises(ConfigError, match="unknown key; moe/router=sharp has it"):
        configure(["moe.router.sharpness=0.5"], config_dir=folder)


def test_a_group_that_only_the_folder_has(folder):
    assert compose(["+extra=long"], config_dir=folder, local=False).train.steps == 123
    with pytest.raises(ConfigError, match=r"extra = 'long': is not in the defaults list; nearest valid: \+extra=long"):
        compose(["extra=long"], config_dir=folder)


def test_searchpath(folder):
    word = f"hydra.searchpath=[file://{folder}]"
    assert compose([word, "+extra=long"]).train.steps == 123
    with pytest.raises(ConfigError, match="/none is not a folder"):
        compose(["hydra.searchpath=[/none]"])


def test_the_folder_comes_last_on_the_path(folder):
    compose(["experiment=sharp_shapes"], config_dir=folder)
    compose(["experiment=sharp_shapes"], config_dir=folder)
    assert sys.path[-1] == str(folder)
    assert sys.path.count(str(folder)) == 1


def test_no_such_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"--config-dir = .*: is not a folder"):
        compose([], config_dir=tmp_path / "none")


def test_a_file_that_would_not_be_read(folder):
    (folder / "moe" / "dense.yaml").write_text("num_experts: 3\n")
    with pytest.raises(ConfigError, match=r"moe/dense\.yaml would not be read: ecdit has a file of that name"):
        compose([], config_dir=folder)


def test_yaml_that_cannot_be_read(folder):
    (folder / "extra" / "long.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="does not compose") as caught:
        compose(["+extra=long", "train.sed=1"], config_dir=folder)
    assert "unknown key; nearest valid: train.seed" in str(caught.value)


# --- run folders that name one -----------------------------------------------------------------------------------------


def test_a_run_remembers_the_folder(folder, tmp_path):
    cfg = configure(["experiment=sharp_shapes"], config_dir=folder).config
    freeze(cfg, tmp_path / "run")
    code = (
        "import sys; from ecdit_train.config.stored import load\n"
        "print(load(sys.argv[1]).moe.router.sharpness, sys.path[-1] == sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run"), str(folder)], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.stdout.split() == ["0.5", "True"], done.stderr
    changed = override(load(tmp_path / "run"), ["moe.router.rounds=4", "train.steps=78"])
    assert (changed.config.moe.router.rounds, changed.config.train.steps) == (4, 78)


def test_a_run_folder_of_somebody_else_is_not_trusted(folder, tmp_path, monkeypatch):
    """Its modules would be executed."""
    freeze(configure(["experiment=sharp_shapes"], config_dir=folder).config, tmp_path / "run")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(folder)])
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "run").stat().st_uid + 1)
    with pytest.raises(RunFolderError, match=r"not all of that is yours alone: give --config-dir FOLDER"):
        load(tmp_path / "run")
    assert str(folder) not in sys.path
    assert load(tmp_path / "run", config_dir=folder).config_dir == str(folder)


@pytest.mark.parametrize("case", ["relative", "inside the run", "writable by all"])
def test_a_folder_that_could_be_anybodys_is_not_trusted(case, folder, tmp_path, monkeypatch):
    cfg, run = configure(["experiment=sharp_shapes"], config_dir=folder).config, tmp_path / "run"
    named = {"relative": "mine", "inside the run": str(run / "mods"), "writable by all": str(folder)}[case]
    freeze(replace(cfg, config_dir=named), run)
    (run / "mods").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(folder)])
    if case == "writable by all":
        folder.chmod(0o777)
    with pytest.raises(RunFolderError, match=r"not all of that is yours alone"):
        load(run)
    assert load(run, config_dir=folder).moe.router.sharpness == 0.5


def test_a_folder_that_is_gone(folder, tmp_path):
    cfg = configure(["experiment=sharp_shapes"], config_dir=folder).config
    freeze(replace(cfg, config_dir=str(tmp_path / "gone")), tmp_path / "run")
    with pytest.raises(RunFolderError, match="which is gone: say where it is now"):
        load(tmp_path / "run")
    assert load(tmp_path / "run", config_dir=folder).moe.router.sharpness == 0.5
