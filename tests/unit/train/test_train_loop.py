"""The loop: being asked to stop, what is logged and when, and what is saved."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import ROUTERS, assert_same, configure, live, records, steady

from ecdit_train import build
from ecdit_train.errors import NonFiniteError
from ecdit_train.observe.metrics import METRICS, metric_key, undocumented
from ecdit_train.parallel.degrees import Degrees
from ecdit_train.parallel.mesh import Mesh
from ecdit_train.parallel.runtime import start
from ecdit_train.plan.flops import per_step
from ecdit_train.supervise.stop import StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS, ids=lambda s: s.name)
def test_a_signal_sets_the_flag(number):
    with StopRequest() as stop:
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.name == number.name


def test_handlers_come_back():
    before = [signal.getsignal(s) for s in StopRequest.SIGNALS]
    with StopRequest():
        assert [signal.getsignal(s) for s in StopRequest.SIGNALS] != before
    assert [signal.getsignal(s) for s in StopRequest.SIGNALS] == before


def test_listening_needs_no_torch():
    code = "import sys, ecdit_train.supervise.stop; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_everything_logged_is_documented(router, tiny_shards, tmp_path):
    live(configure(tmp_path, tiny_shards, *ROUTERS[router], "train.steps=4", "observe.log_every=2"))
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        names = {k: v for k, v in line.items() if k not in ("step", "time")}
        assert not undocumented(names)
        assert all(math.isfinite(v) for v in names.values())
        wanted = {"train/loss", "optim/lr", "optim/grad_norm", "perf/images_per_s", "perf/step_s", "data/stall_frac"}
        assert names.keys() >= wanted
        assert any(name.startswith("moe/") for name in names) == (router != "dense")
        assert ("train/balance_loss" in names) == (router == "token_choice")


def test_everything_documented_is_logged(tiny_shards, tmp_path):
    """By one of the routers, but for what only a GPU has."""
    routers = {**ROUTERS, "capped": ("moe=threshold", "moe.dispatcher.cap=0.5")}
    logged = set()
    for router, how in routers.items():
        more = ("train.steps=4", "checkpoint.every_steps=2", "validation.images=8", "validation.every_steps=2")
        if router == "expert_choice":
            more += ("observe.sample_every=2",)
        live(configure(tmp_path / router, tiny_shards, *how, *more))
        logged |= {metric_key(name) for line in records(tmp_path / router) for name in line}
    on_gpu = {name for name, metric in METRICS.items() if "Absent on CPU" in metric.question}
    assert on_gpu == {
        *("perf/mfu", "perf/mfu_of_plan", "perf/node{i}/gpu_frac", "mem/node{i}/gpu_gib"),
        *("mem/allocated_gib", "mem/reserved_gib", "mem/retries"),
    }
    own = {name for name in METRICS if name.endswith("{name}_max")}  # of routers outside the package
    rare = {name for name in METRICS if "/nodes/" in name} | {
        "data/bad/{kind}",
        "data/source/{name}/epochs",
        "ckpt/interval",
        "reliability/skipped",
        "reliability/roll_backs",
        "perf/time/expert_exchange",
    }  # test_nodes.py, test_saving.py, test_guard.py, test_dist_training.py, below
    assert METRICS.keys() - logged == on_gpu | own | rare


def test_utilisation_compares_model_flops_with_the_peak_of_all_gpus(tiny_shards, tmp_path):
    config, here = configure(tmp_path, tiny_shards), start("cpu")
    assert build.make_window(config, here)._peak_flops is None
    window = build.make_window(config, replace(here, world=3, device=torch.device("cuda", 0)))
    assert window._peak_flops == 3 * config.cluster.peak_flops
    assert window.flops_per_step == per_step(config, checkpointing="none").model > 0


def test_norms_images_and_clipping(tiny_shards, tmp_path):
    live(configure(tmp_path / "each", tiny_shards, "train.steps=6"))
    norms = [line["optim/grad_norm"] for line in records(tmp_path / "each")]
    for limit, clipped in ((1e-9, 1.0), (0.0, 0.0), (1e9, 0.0), (norms[0] * 0.999, None)):
        run = tmp_path / f"{limit}"
        live(configure(run, tiny_shards, "train.steps=6", "observe.log_every=3", f"optim.clip_norm={limit}"))
        lines = records(run)
        assert [line["train/images"] for line in lines] == [24, 48]
        assert all(line["optim/grad_norm_max"] >= line["optim/grad_norm"] for line in lines)
        if clipped is None:
            assert lines[0]["optim/clipped_frac"] > 0.3
        else:
            assert [line["optim/clipped_frac"] for line in lines] == [clipped, clipped]


def test_what_the_loader_does_is_logged_and_adds_up(tiny_shards, tmp_path):
    sources = f"data.sources={{a: {{shards: {tiny_shards}, weight: 3}}, b-2: {{shards: {tiny_shards}, weight: 1}}}}"
    config = configure(tmp_path, "unused", sources, "observe.log_every=3", "train.steps=6")
    live(config)
    lines, batch = records(tmp_path), config.train.global_batch
    assert [line["step"] for line in lines] == [3, 6]
    size = sum(path.stat().st_size for path in tiny_shards.glob("*.tar"))
    for line in lines:
        assert line["data/loader/samples"] == 3 * batch
        assert line["data/loader/samples_per_s"] == pytest.approx(line["perf/images_per_s"], rel=0.2)
        assert line["data/loader/bytes_fetched"] == line["data/loader/read_retries"] == line["data/loader/hedged"] == 0
        assert 0 <= line["data/loader/steps_ready"] <= config.data.prefetch
        assert line["data/loader/steps_late_max"] <= config.data.prefetch
        assert line["data/left_out"] >= 0
        assert not [name for name in line if name.startswith("data/bad/")]
        each = {name: line[f"data/source/{name}/epochs"] for name in ("a", "b-2")}
        assert each["a"] == pytest.approx(3 * each["b-2"], abs=0.1)
        assert line["data/epochs"] > 0
    assert lines[1]["data/epochs"] == pytest.approx(2 * lines[0]["data/epochs"])
    read = sum(line["data/loader/bytes_read"] for line in lines)
    assert 0 < read < 100 * size
    samples = sum(line["data/loader/samples"] for line in lines)
    assert read >= 512 * samples  # a header is the least that a sample has


def test_substituted_samples_are_logged_said_and_survive_a_stop(tiny_shards, tmp_path, capsys):
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    for tar in sorted(shards.glob("*.tar")):  # a few samples of every shard are unreadable
        data = bytearray(tar.read_bytes())
        for at in range(len(data) // 8, len(data) - 4096, len(data) // 4):
            data[at : at + 64] = bytes(64 * [0x5A])
        tar.write_bytes(data)
    how = ("data.on_bad=substitute", "data.max_bad=0.9", "observe.log_every=5")
    live(configure(tmp_path / "whole", shards, *how))
    rows = (tmp_path / "whole" / "quarantine-0000-life-0001.jsonl").read_text().splitlines()
    lines = records(tmp_path / "whole")
    assert sum(line["data/substituted"] for line in lines) == len(rows) > 2
    kinds = Counter(json.loads(row)["error"] for row in rows)
    assert Counter({kind: sum(line.get(f"data/bad/{kind}", 0) for line in lines) for kind in kinds}) == kinds
    for line in lines:
        assert sum(v for name, v in line.items() if name.startswith("data/bad/")) == line["data/substituted"]
    said = capsys.readouterr().out
    for line in lines:
        phrase = f"step {line['step']}: {line['data/substituted']:.0f} unreadable samples substituted"
        assert (phrase in said) == (line["data/substituted"] > 0)
    assert f"{tmp_path / 'whole'}/quarantine-*-life-0001.jsonl" in said
    parts = configure(tmp_path / "parts", shards, *how)
    for stop in (3, 7, None):
        live(parts, stop_after=stop)
    assert steady(records(tmp_path / "parts")) == steady(lines)


def test_a_pause_is_made_only_to_show_or_to_save(tiny_shards, tmp_path):
    at = []

    def meddle(loop):
        paused = loop.window.paused

        @contextmanager
        def noted():
            at.append(loop.state.step)
            with paused():
                yield

        loop.window.paused = noted

    live(configure(tmp_path, tiny_shards, "observe.sample_every=3"), before=meddle)
    assert at == [3, 4, 6, 8, 9, 12]


def test_encoding_is_no_wait_for_data(tiny_shards, tmp_path):
    """Encoders sleep for most of a step; the loader is as quick as ever."""

    def meddle(loop):
        encode = loop.batches.encode
        loop.batches.encode = lambda raw: (time.sleep(0.2), encode(raw))[1]

    live(configure(tmp_path, tiny_shards, "train.steps=4", "observe.log_every=4"), before=meddle)
    assert records(tmp_path)[0]["perf/step_s"] > 0.2
    assert records(tmp_path)[0]["data/stall_frac"] < 0.3


def test_one_tensor_parallel_rank_writes_the_quarantine(tiny_shards, tmp_path):
    config, names = configure(tmp_path, tiny_shards), []
    degrees = Degrees(world=4, dp_replicate=1, dp_shard=2, tp=2, ep=1)
    for rank in range(4):
        loader = build.make_loader(config, Mesh(degrees=degrees, rank=rank, device_type="cpu"), run=tmp_path, life=1)
        names.append(loader._quarantine.path and loader._quarantine.path.name)
        loader.close()
    assert names == ["quarantine-0000-life-0001.jsonl", None, "quarantine-0001-life-0001.jsonl", None]


def test_a_record_is_the_mean_of_its_steps(tiny_shards, tmp_path):
    live(configure(tmp_path / "each", tiny_shards, "train.steps=7"))
    live(configure(tmp_path / "some", tiny_shards, "train.steps=7", "observe.log_every=3"))
    each = [line["train/loss"] for line in records(tmp_path / "each")]
    lines = records(tmp_path / "some")
    assert [line["step"] for line in lines] == [3, 6, 7]
    means = [sum(each[:3]) / 3, sum(each[3:6]) / 3, each[6]]
    assert [line["train/loss"] for line in lines] == pytest.approx(means, rel=1e-6)


def test_checkpoints_at_the_interval_and_the_end(tiny_shards, tmp_path):
    live(configure(tmp_path, tiny_shards, "train.steps=10", "checkpoint.keep=9"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == [
        "step_00000004", "step_00000008", "step_00000010"]  # fmt: skip


def test_non_finite_ends_the_run_before_the_update(tiny_shards, tmp_path):
    """The last committed step stays; the message names the step and its samples; threads and files are closed."""
    caught = {}

    def meddle(loop):
        take, caught["loop"] = loop._step, loop

        def poisoned(taken):
            if loop.state.step == 5:
                taken.batch.latents_BCHW[0] = float("inf")
                caught["before"] = {n: t.clone() for n, t in loop.state.tensors().items()}
            return take(taken)

        loop._step = poisoned

    with pytest.raises(NonFiniteError, match="step 6, samples 40 to 47: loss") as error:
        live(configure(tmp_path, tiny_shards), before=meddle)
    assert error.value.exit_code == 80
    assert_same(caught["before"], caught["loop"].state.tensors())
    assert caught["loop"].state.step == 5
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4, 5]
    assert [p.name for p in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000004"]
    assert live(configure(tmp_path, tiny_shards)).finished  # the poison was ours: the run goes on from step 4


def test_a_stable_phase_can_be_made_longer(tiny_shards, tmp_path):
    """Warm-up, stable, decay: planned for 8 steps, stopped in the stable phase, gone on with to 12; as if 12 from the start."""
    wsd = ("optim.schedule=wsd", "optim.decay_steps=3", "optim.decay_shape=sqrt")
    whole = live(configure(tmp_path / "whole", tiny_shards, *wsd, "train.steps=12"))
    assert live(configure(tmp_path / "parts", tiny_shards, *wsd, "train.steps=8"), stop_after=5).step == 5
    longer = live(configure(tmp_path / "parts", tiny_shards, *wsd, "train.steps=12"))
    assert_same(longer.tensors, whole.tensors)
    rate = [line["optim/lr"] for line in records(tmp_path / "parts")]
    assert rate == [line["optim/lr"] for line in records(tmp_path / "whole")]
    assert rate[2:10] == [rate[2]] * 8
    assert 0 < rate[11] < rate[10] < rate[2]
