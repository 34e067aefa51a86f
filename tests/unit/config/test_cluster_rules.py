"""What may stand in the section `cluster`: everything that goes into a job script, said by one key, and never a secret."""

from __future__ import annotations

import pytest
from secret_shapes import TOKENS

from ecdit_train.config.cluster_rules import OURS, gpu_request, megabytes
from ecdit_train.config.compose import compose, configure
from ecdit_train.config.convert import key_types, with_values
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError


@pytest.fixture(scope="module")
def config():
    return compose(["experiment=ec_dit_xl_8e", "cluster=h100_ib400"], local=False)


def refused(config, **values: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(with_values(config, {f"cluster.{key}": value for key, value in values.items()}))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(("key", "value"), [
    ("mem", "0"), ("mem", "400G"), ("mem", "8000"), ("array", "0-4%1"), ("array", "1,3%1"),
    ("constraint", "hbm80&ib|hbm141"), ("constraint", "[rack1*2&rack2*2]"), ("exclude", "n3,n[7-9]"),
    ("dependency", "afterok:12:13,singleton"), ("mounts", ("/a", "/a b:/c")), ("sbatch", ("wckey=x", "contiguous", "nice=100")),
    ("sbatch", ("gres=gpu:h100:8,nvme:1",)), ("sbatch", ("time-min=02:00:00",)),
    ("constraint", "80gb&GPU_MEM:80GB"), ("back_off", (0.0,)), ("python", "/opt/my python"), ("interface", "bond0.100"),
])  # fmt: skip
def test_good_values(config, key, value):
    validate(with_values(config, {f"cluster.{key}": value}))


@pytest.mark.parametrize(("key", "value", "rule"), [
    ("mem", "lots", "must be a number with K, M, G or T, as 400G, or 0 for all of the node's; nearest valid: 0"),
    ("array", "0-4", "must end in %1: its jobs share this run folder"),
    ("array", "0-4%2", "must end in %1"),
    ("constraint", "a b", "must be features"),
    ("exclude", "n1;reboot", "must be one word without quotes or shell signs, or null"),
    ("interface", "ib0 ib1", "must be one word"),
    ("mounts", ("data:/data",), "must be /outside:/inside, or /same"),
    ("mounts", ("/a,/b",), "must be /outside:/inside, or /same"),
    ("sbatch", ("--nice=5",), "without dashes before it; nearest valid: [nice=5]"),
    ("sbatch", ("nice=",), "must be name=value or name, without dashes"),
    ("sbatch", ("comment=a b",), "without spaces, quotes or shell signs"),
    ("sbatch", ("comment=$(reboot)",), "without spaces, quotes or shell signs"),
    ("sbatch", ("time=1:00",), "is set by cluster.time_limit"),
    ("sbatch", ("t=1:00",), "is set by cluster.time_limit"),
    ("sbatch", ("no-requeue",), "is set by nothing: a job always comes back"),
    ("sbatch", ("gres=gpu:4",), "must ask for cluster.gpus_per_node = 8 GPUs, not 4"),
    ("sbatch", ("time-min=10",), "must be longer than cluster.signal_lead = 600 s"),
    ("sbatch", ("time-min=00:09:59",), "must be longer than cluster.signal_lead = 600 s"),
    ("back_off", (), "must be one or more seconds, none below 0; nearest valid: [15.0, 60.0, 240.0]"),
    ("back_off", (-1.0,), "none below 0"),
    ("lives", 0, "must be at least 1; nearest valid: 1"),
    ("lives_without_progress", 0, "must be at least 1"),
    ("preflight_bandwidth", -1.0, "must be at least 0"),
    ("python", "a\nb", "must be the path of an interpreter, or null"),
    ("bad_node", "shoot", "must be one of exclude, drain, keep"),
    ("container_kind", "docker", "must be one of pyxis, apptainer"),
])  # fmt: skip
def test_bad_values(config, key, value, rule):
    (line,) = refused(config, **{key: value})
    assert line.startswith(f"cluster.{key} = ")
    assert rule in line


def test_every_flag_that_is_ours_names_a_key_or_says_why(config):
    """A refusal that named a key which is not there would send people in circles."""
    keys = set(key_types(config))
    for flag, by in OURS.items():
        named = [word.strip(":;,") for word in by.split() if word.startswith("cluster.")]
        assert set(named) <= keys, flag
        assert "is set by" in refused(config, sbatch=(f"{flag}=1",))[0]


def test_sizes_and_types_of_gpus(config):
    assert [megabytes(text) for text in ("0", "512", "4G", "1T")] == [None, 512.0, 4096.0, 1024.0**2]
    for flags, asked in (((), (None, 0)), (("gres=nvme:1",), (None, 0)), (("gres=gpu:8",), (None, 8)),
                         (("nice=1", "gres=nvme:1,gpu:h100:8"), ("h100", 8))):  # fmt: skip
        assert gpu_request(with_values(config, {"cluster.sbatch": flags}).cluster) == asked


def test_a_cluster_of_ones_own_takes_four_lines(tmp_path):
    """Outside the package, found by --config-dir."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "ours.yaml").write_text(
        "defaults: [h200_ib400, _self_]\nname: ours\npartition: big\naccount: lab7\n"
    )
    cfg = configure(["experiment=ec_dit_xl_8e", "cluster=ours"], config_dir=tmp_path).config
    assert (cfg.cluster.partition, cfg.cluster.account, cfg.cluster.gpu_memory) == ("big", "lab7", 1.41e11)
    assert (cfg.cluster.lives, cfg.cluster.container_kind) == (100, "pyxis")


# --- secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "MY_PW", "PAT"])
def test_a_name_that_says_secret(config, name):
    (line,) = refused(config, env=("OK=1", f"{name}=planted"))
    assert line.startswith(
        f"cluster.env = '{name}=...': looks like a secret; configs and job scripts are copied around"
    )


@pytest.mark.parametrize("shape", TOKENS)
@pytest.mark.parametrize(("key", "form"), [
    ("cluster.env", ["OK=1", "CITY={}"]), ("cluster.sbatch", ["comment={}"]), ("cluster.account", "{}"),
    ("observe.prompts", ["a dog", "a {} cat"]), ("data.shards", "{}"), ("experiment", "x {}"),
    ("observe.sinks.wandb.project", "{}"), ("train.init_from", "see {}"),
])  # fmt: skip
def test_a_form_that_says_secret_under_any_name(config, shape, key, form):
    token = TOKENS[shape]
    value = [text.format(token) for text in form] if isinstance(form, list) else form.format(token)
    with pytest.raises(ConfigError) as caught:
        validate(with_values(config, {key: value}))
    assert f"{key} = " in str(caught.value)
    assert token not in str(caught.value)
    assert "so export it in your shell or read it from a 0600 file" in str(caught.value)
