"""Composition, strict conversion, freezing and loading."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from ecdit_train.config.compose import compose, conf_folder, groups, override
from ecdit_train.config.convert import flatten, from_dict, key_types, to_dict, with_values
from ecdit_train.config.describe import differences, explain, meanings
from ecdit_train.config.stored import freeze, load, to_yaml
from ecdit_train.config.upgrade import FORMAT
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError, RunFolderError

EXPERIMENTS = groups()["experiment"]
PAPER = {"dense_xl", "dense_xxl", "dense_3xl", "dense_m", "ec_dit_m_64e"}
PAPER |= {f"ec_dit_{size}_{e}e" for size in ("xl", "xxl", "3xl") for e in (8, 16, 32)}
PAPER |= {f"gshard_{size}_{e}e" for size in ("xl", "xxl") for e in (8, 16, 32)}
TABLE_1 = {  # layers, width, heads, kv heads
    "xl": (28, 1152, 18, 6),
    "xxl": (38, 1536, 24, 6),
    "3xl": (42, 2304, 36, 6),
    "m": (38, 3072, 48, 12),
    "m_dense46": (46, 3072, 48, 12),
}


def messages(call, *args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value).splitlines()


# --- presets ---------------------------------------------------------------------------------------------------


def test_there_is_every_preset():
    assert set(EXPERIMENTS) == PAPER | {
        "shapes_tiny",
        "shapes_small",
        "nucleus_17b",
        *(f"race_{size}" for size in ("b", "m", "l", "xl")),
    }


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_preset_is_valid_alone_and_on_its_cluster(name, preset):
    cfg = preset(name)
    assert cfg.experiment == name
    assert cfg.run == f"runs/{name}"
    validate(cfg)
    validate(cfg, world=cfg.cluster.nodes * cfg.cluster.gpus_per_node)


@pytest.mark.parametrize("name", sorted(PAPER))
def test_paper_preset_is_the_papers(name, preset):
    cfg = preset(name)
    size = cfg.model.name
    assert (cfg.model.layers, cfg.model.width, cfg.model.heads, cfg.model.kv_heads) == TABLE_1[size]
    assert (cfg.train.steps, cfg.train.global_batch, cfg.data.resolution) == (800_000, 4096, 256)
    assert (type(cfg.optim.optimizer).__name__, cfg.optim.lr, cfg.optim.warmup_steps) == ("RMSProp", 1e-4, 20_000)
    assert (cfg.tokens_per_image, cfg.patches_per_image, cfg.train.microbatch % 8) == (128, 256, 0)
    kind, experts = name.split("_")[0], name.rsplit("_", 1)[1]
    router = {"dense": "NoneType", "ec": "ExpertChoice", "gshard": "TokenChoice"}[kind]
    assert type(cfg.moe.router).__name__ == router
    if kind != "dense":
        assert cfg.moe.num_experts == int(experts.removesuffix("e"))
        assert (cfg.moe.group_size, cfg.moe.router.experts_per_token()) == (1024, 2.0)
        assert cfg.capacity == 2048 / cfg.moe.num_experts


@pytest.mark.parametrize("debug", ["sanity", "overfit"])
@pytest.mark.parametrize("name", ["shapes_tiny", "ec_dit_xl_8e", "gshard_xl_8e", "dense_m"])
def test_debug_applies_to_any_experiment(name, debug):
    cfg = compose([f"debug={debug}", f"experiment={name}"], local=False)
    validate(cfg)
    assert cfg.run == f"runs/{name}-{debug}"
    assert not cfg.observe.sinks


def test_every_choice_of_every_group_composes():
    """The n-th choice of all groups together: as few compositions as the largest group has choices."""
    choices = {g: c for g, c in groups().items() if g not in ("local", "experiment")}  # experiments: tests above
    for n in range(max(map(len, choices.values()))):
        words = [f"{group}={names[n % len(names)]}" for group, names in choices.items()]
        if "moe=dense" in words:
            words = [w for w in words if not w.startswith("moe/")]  # a dense network has no router
        cfg = compose(words, local=False)
        assert cfg.cluster.name == choices["cluster"][n % len(choices["cluster"])]


def test_demo_fills_one_group_with_eight_images(preset):
    cfg = preset("shapes_tiny")
    assert (cfg.tokens_per_image, cfg.moe.group_size, cfg.capacity) == (18, 144, 36.0)


# --- conf is a manual ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", groups()["moe"])
def test_every_key_has_a_meaning(moe):
    cfg = compose([f"moe={moe}"], local=False)
    found = meanings(cfg)
    assert [key for key in key_types(cfg) if not found[key]] == []


def test_every_file_says_what_it_is():
    for path in conf_folder().rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path


def test_explain_names_type_class_and_meaning(base):
    text = explain("moe.num_experts", base, groups=groups())
    assert text == "moe.num_experts = 8: a whole number [identity]\nExperts in every sparse layer (E)."
    shipped = "be, bl, diffmoe, ec_image, expert_choice, expert_race, le, nucleus, tc, threshold, token_choice"
    assert explain("moe/router", base, groups=groups()).startswith(f"moe/router: one of {shipped}")
    assert "encoders.text.width" in explain("encoders.text", base, groups={})
    message = messages(explain, "moe.num_expert", base, groups=groups())
    assert message == ["moe.num_expert = None: unknown key; nearest valid: moe.num_experts"]


# --- from the command line -------------------------------------------------------------------------------------


def test_values_of_every_type():
    cfg = compose(
        [
            "optim.lr=3",
            "train.steps=7",
            "parallel.compile=true",
            "moe.scope=image",
            "train.init_from=null",
            "cluster.account=1234",
            "cluster.time_limit=24:00:00",
            "run=/tmp/a b",
            "observe.prompts=[a b,'c, d']",
            "cluster.env=['A=1']",
        ],
        local=False,
    )
    assert cfg.optim.lr == 3.0
    assert isinstance(cfg.optim.lr, float)
    assert (cfg.train.steps, cfg.parallel.compile, cfg.moe.scope) == (7, True, "image")
    assert (cfg.train.init_from, cfg.cluster.account, cfg.cluster.time_limit) == (None, "1234", "24:00:00")
    assert (cfg.run, cfg.observe.prompts, cfg.cluster.env) == ("/tmp/a b", ("a b", "c, d"), ("A=1",))


def test_last_word_wins_also_for_groups():
    cfg = compose(["train.seed=1", "model=m", "model=xl", "train.seed=2"], local=False)
    assert (cfg.train.seed, cfg.model.name) == (2, "xl")


def test_command_line_wins_over_experiment_and_debug():
    cfg = compose(["train.steps=9", "debug=sanity", "experiment=ec_dit_xl_8e", "model=tiny"], local=False)
    assert (cfg.train.steps, cfg.model.name, cfg.moe.num_experts) == (9, "tiny", 8)


def test_experiment_can_be_switched_off():
    assert compose(["experiment=null"], local=False).experiment == "default"


def test_interpolation_is_resolved_then_typed():
    assert compose(["train.microbatch=${train.global_batch}"], local=False).train.microbatch == 4096
    assert messages(compose, ["train.microbatch=${run}"]) == [
        "train.microbatch = 'runs/default': must be a whole number"
    ]
    assert "the configuration does not compose" in messages(compose, ["train.microbatch=${nope}"])[0]


def test_composes_from_any_folder_without_torch(tmp_path):
    code = (
        "import sys\nfrom ecdit_train.config import compose, validate, compat, describe, resolve\nimport launch.submit\n"
        "with resolve.declarations_only(): compose.configure(['experiment=ec_dit_xl_8e'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_local_values_take_part_and_can_be_left_out(tmp_path, monkeypatch):
    import shutil

    from ecdit_train.config import compose as module

    shutil.copytree(conf_folder(), tmp_path / "conf")
    (tmp_path / "conf" / "local").mkdir(exist_ok=True)
    (tmp_path / "conf" / "local" / "default.yaml").write_text("# @package _global_\ncluster:\n  account: mine\n")
    monkeypatch.setattr(module, "conf_folder", lambda: tmp_path / "conf")
    assert compose([]).cluster.account == "mine"
    assert compose(["local=null"]).cluster.account is None
    assert compose(["~local"]).cluster.account is None
    assert compose([], local=False).cluster.account is None
    assert compose(["local=default"], local=False).cluster.account is None


# --- strict conversion -----------------------------------------------------------------------------------------


def test_round_trip_through_dicts(base):
    assert from_dict(to_dict(base)) == base


def test_all_problems_of_a_tree_at_once(base):
    tree = to_dict(base)
    tree["model"]["widht"] = tree["model"].pop("width")
    tree["moe"]["num_experts"] = 8.5
    tree["moe"]["scope"] = "grop"
    tree["optim"]["lr"] = True
    tree["optim"]["optimizer"]["eps"] = float("nan")
    tree["parallel"]["compile"] = "yes"
    tree["observe"]["prompts"] = ["a", 1.5]
    tree["cluster"] = 3
    tree["train"]["steps"] = "???"
    assert messages(from_dict, tree) == [
        "model.widht = 1152: unknown key; nearest valid: model.width",
        "model.width = None: missing key: a whole number",
        "moe.num_experts = 8.5: must be a whole number; nearest valid: 8",
        "moe.scope = 'grop': must be one of group, image, batch; nearest valid: group",
        "train.steps = '???': must be given: a whole number",
        "optim.optimizer.eps = nan: must be a number",
        "optim.lr = True: must be a number",
        "parallel.compile = 'yes': must be true or false; nearest valid: true",
        "observe.prompts[1] = 1.5: must be text",
        "cluster = 3: must be a section with keys: "
        + ", ".join(f.name for f in dataclasses.fields(type(base.cluster))),
    ]


def test_with_values_is_strict(base):
    assert with_values(base, {"train.steps": 5, "observe.prompts": ("a",)}).observe.prompts == ("a",)
    assert messages(with_values, base, {"train.step": 5}) == ["train.step = 5: unknown key; nearest valid: train.steps"]


def test_keys_are_the_schemas_leaves(base):
    assert tuple(flatten(base)) == tuple(key_types(base)) == tuple(key_types(to_dict(base)))
    assert "encoders.text.width" in key_types(base)
    assert "encoders.text" not in key_types(base)


# --- frozen in the run folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes_tiny", "ec_dit_m_64e"])
def test_freeze_and_load(name, tmp_path):
    cfg = compose([f"experiment={name}", "cluster=slurm_pyxis", "cluster.account='1e3'"], local=False)
    path = freeze(cfg, tmp_path / "new" / "run")
    assert path.name == "resolved.yaml"
    assert load(path.parent) == cfg
    assert path.read_text() == f"format: {FORMAT}\n" + to_yaml(cfg)
    assert os.listdir(path.parent) == ["resolved.yaml"]


def test_freeze_leaves_the_old_file_when_it_fails(base, tmp_path, monkeypatch):
    path = freeze(base, tmp_path)
    before = path.read_text()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        freeze(with_values(base, {"train.seed": 9}), tmp_path)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["resolved.yaml"]


def test_load_refuses_what_is_no_run_folder(tmp_path):
    with pytest.raises(RunFolderError, match=r"is not a run folder: it has no resolved\.yaml"):
        load(tmp_path)
    (tmp_path / "resolved.yaml").write_text("a: [")
    with pytest.raises(RunFolderError, match="cannot be read"):
        load(tmp_path)


def test_load_is_strict(base, tmp_path):
    path = freeze(base, tmp_path)
    path.write_text(path.read_text().replace("num_experts: 8", "experts_number: 8"))
    assert messages(load, tmp_path) == [
        "moe.experts_number = 8: unknown key; nearest valid: moe.experts",
        "moe.num_experts = None: missing key: a whole number",
    ]


def test_override_changes_a_stored_configuration():
    cfg = compose(["experiment=ec_dit_xl_16e", "train.seed=5"], local=False)
    changed = override(cfg, ["parallel=ep8", "train.steps=30000"])
    assert (changed.config.parallel.ep, changed.config.train.steps, changed.config.train.seed) == (8, 30_000, 5)
    assert {"parallel.ep", "train.steps"} <= changed.explicit
    assert "cannot be changed after the run was made" in messages(override, cfg, ["experiment=dense_xl"])[0]


def test_differences_are_short(base):
    cfg = with_values(base, {"train.steps": 9, "parallel.compile": True, "cluster.account": "me"})
    assert differences(cfg, base) == ["train.steps: 9", "parallel.compile: true", "cluster.account: me"]
