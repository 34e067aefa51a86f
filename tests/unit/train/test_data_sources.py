"""A run's data as its configuration names them: sources, what is kept, what is taken down."""

import shutil

import numpy as np
import pytest

from data_pipeline.errors import MissingShard
from data_pipeline.manifest import open_view
from data_pipeline.shapes.make import make_shapes
from data_pipeline.views import write_keep
from ecdit_train.batches.loader import make_loader
from ecdit_train.cli import main
from ecdit_train.config.compose import compose
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError
from ecdit_train.parallel.degrees import Degrees
from ecdit_train.parallel.mesh import Mesh
from launch.inputs import problems


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    made = {}
    for number, name in enumerate(("art", "photos")):
        made[name] = tmp_path_factory.mktemp(name)
        make_shapes(made[name], count=160, resolution=32, seed=number, samples_per_shard=20)
    return made


def loader_of(tmp_path, *words, rank=0, world=1):
    config = compose(
        ["experiment=shapes_tiny", f"run={tmp_path}", "train.global_batch=16", "train.microbatch=16", *words],
        local=False,
    )
    validate(config)
    degrees = Degrees(world=world, dp_replicate=1, dp_shard=world, tp=1, ep=1)
    return make_loader(config, Mesh(degrees=degrees, rank=rank, device_type="cpu"), run=tmp_path, life=1)


def test_sources_of_a_configuration_are_mixed(sets, tmp_path):
    keep = tmp_path / "half.keep"
    write_keep(open_view(sets["art"]), np.arange(160) % 2 == 0, reason="", out=keep)
    words = (
        f"data.sources.photos={{shards:{sets['photos']},weight:3}}",
        f"data.sources.art={{shards:{sets['art']},weight:1,keep:[{keep}]}}",
        "validation.images=32",
    )
    stream = loader_of(tmp_path, *words)
    for _ in range(10):
        next(stream)
    told = {one.name: (one.share, one.samples) for one in stream.stats().sources}
    assert told == {"photos": (0.75, 120), "art": (0.25, 40)}
    assert stream.data.sources[0].kept.sizes.sum() == 80
    state = stream.state_dict()
    halves = [loader_of(tmp_path, *words, rank=rank, world=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    assert next(halves[0]).keys + next(halves[1]).keys == next(stream).keys
    for one in (stream, *halves):
        one.close()


def test_one_rank_looks_at_the_files(sets, tmp_path):
    """The others' error is that of `runtime.together`; what they read themselves they find out."""
    folder = tmp_path / "copy"
    shutil.copytree(sets["photos"], folder)
    last = open_view(folder).tar(7)
    last.unlink()
    with pytest.raises(MissingShard, match=last.name):
        loader_of(tmp_path, f"data.shards={folder}", rank=0, world=2)
    loader_of(tmp_path, f"data.shards={folder}", rank=1, world=2).close()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.sources={a:{shards:x,weight:0}}"], "data.sources.a.weight = 0.0: must be greater than 0"),
        (["data.sources={a:{shards:x}}"], "data.sources.a.weight = None: missing key"),
        (["data.sources.a={shards:x,wieght:1}"], "nearest valid: data.sources.a.weight"),
        (["data.sources={a:{shards:x,weight:1}}", "data.keep=[x]"], "data.keep = .*is of data.shards"),
        (["data.sources={a:{shards:x,weight:1}}", "data.manifest=0123456789ab"], "data.manifest = .*is of data.shards"),
        (["data.manifest=abc"], "data.manifest = 'abc': must be 12 digits"),
        (["data.sources={a b:{shards:x,weight:1}}"], "a source's name is letters"),
    ],
)
def test_mistakes_are_named(words, told):
    with pytest.raises(ConfigError, match=told):
        validate(compose(["experiment=shapes_tiny", "run=x", *words], local=False))


def test_a_job_is_not_sent_where_a_source_or_list_is_missing(sets, tmp_path):
    words = [
        f"data.sources={{a:{{shards:{sets['art']},weight:1,keep:[{tmp_path}/no.keep]}},b:{{shards:{tmp_path}/none,weight:1}}}}",
        f"data.take_down=[{tmp_path}/no.down]",
    ]
    config = compose(["experiment=shapes_tiny", f"run={tmp_path / 'run'}", *words], local=False)
    fields = [problem.field for problem in problems(config)]
    assert fields[:3] == ["data.sources.b.shards", "data.sources.a.keep", "data.take_down"]


def test_files_of_sizes_are_looked_for_before_a_launch(sets, tmp_path):
    bucket = f"data.buckets={{tall:{{samples:{tmp_path}/no.keep,height:40,width:24}}}}"
    config = compose(
        ["experiment=shapes_tiny", f"run={tmp_path}/run", f"data.shards={sets['art']}", bucket], local=False
    )
    assert "data.buckets.tall.samples" in [problem.field for problem in problems(config)]


def test_the_commands_write_lists_that_runs_read(sets, tmp_path, capsys):
    (tmp_path / "keys").write_text("00000003\n00000017\nnobody\n")
    folder, out = str(sets["art"]), str(tmp_path / "x.keep")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["data", "keep", folder, "--drop-keys", str(tmp_path / "keys"), "--out", out])
    assert "158 of 160 samples are kept\nnot in" in capsys.readouterr().out
    down = str(tmp_path / "x.down")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["data", "takedown", folder, "--keys", str(tmp_path / "keys"), "--out", down, "--reason", "asked"])
    assert "2 of 160 samples are taken down" in capsys.readouterr().out
    stream = loader_of(tmp_path, f"data.shards={folder}", f"data.keep=[{out}]", f"data.take_down=[{down}]")
    seen = {key for _ in range(30) for key in next(stream).keys}
    assert len(seen) == 158
    assert not seen & {"00000003", "00000017"}
    stream.close()
