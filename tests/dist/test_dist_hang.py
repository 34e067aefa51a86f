"""A hang ends within its bound, with the rank and the phase named, and nobody stays behind."""

from __future__ import annotations

import re
import signal
import time

import pytest
from dist_kills import BOUND, gone, running
from dist_runs import TWO_HEADS

from ecdit_train.supervise import lives

PHASES = (
    *("start", "data", "encode", "forward", "backward", "exchange", "optimizer"),
    *("validate", "log", "save", "show"),
)
START = 12
"""Bound of the start where a rank is stopped in it."""
EP = (*TWO_HEADS, "parallel.ep=2", "train.microbatch=2")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ecdit_train.cli", "train")
TP = (*TWO_HEADS, "parallel.tp=2", "train.microbatch=2")


def stopped(run, phase, *, rank):
    where = run.signal_in(phase, rank=rank, number=signal.SIGSTOP)
    family = run.family()
    code, err, seconds = run.ended(within=60)
    assert code == 86, err
    assert seconds < (START if phase == "start" else BOUND) + 6, err
    said = re.search(
        r"HangError: rank (\d+) has been in (\S+)( of step \d+)? for \d+ s, and may be for [\d.]+ s; (.*)", err
    )
    assert said is not None, err
    assert (int(said[1]), said[2]) == (rank, phase), err
    assert "is stopped" in said[4]
    assert "waits for it" in said[4]
    assert len([line for line in err.splitlines() if "HangError" in line]) == 1
    assert gone(family)
    if phase != "start":
        assert f"of step {where.step}" in said[3]
        last = lives.read(run.folder)[-1]
        assert last.facts["exit_code"] == 86
        assert f"rank {rank}" in last.facts["why"]
        other = run.folder / "logs" / f"stacks-0001-rank-{1 - rank:04d}.txt"
        assert "trainer.py" in other.read_text()
        assert "stopped" in (run.folder / "logs" / f"stacks-0001-rank-{rank:04d}.txt").read_text()


def killed(run, phase, *, rank):
    run.signal_in(phase, rank=rank, number=signal.SIGKILL)
    family = run.family()
    code, err, seconds = run.ended(within=60)
    assert code == 137, err
    assert seconds < 5, err
    assert re.search(rf"ecdit: rank {rank} was ended by SIGKILL in {phase}", err), err
    assert gone(family)


def test_a_stopped_rank_ends_the_run(tiny_shards, tmp_path):
    with running(tmp_path / "run", tiny_shards, *EP) as run:
        stopped(run, "forward", rank=1)


def test_a_killed_rank_ends_the_run(tiny_shards, tmp_path):
    with running(tmp_path / "run", tiny_shards, *EP) as run:
        killed(run, "exchange", rank=0)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("layout", [EP, TP], ids=["ep", "tp"])
def test_each_rank_is_stopped_in_each_phase(layout, phase, rank, tiny_shards, tmp_path, record_property):
    start = (f"watch.start={START}",) if phase == "start" else ()
    with running(tmp_path / "run", tiny_shards, *layout, *start) as run:
        stopped(run, phase, rank=rank)
    record_property("stops", 1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_each_rank_is_killed_in_each_phase(phase, rank, tiny_shards, tmp_path):
    """With launcher and watchdog; many more kills, of what they leave: tests/faults/test_kills.py."""
    with running(tmp_path / "run", tiny_shards, *(EP, TP)[rank]) as run:
        killed(run, phase, rank=rank)


def test_a_killed_launcher_takes_stopped_ranks_with_it(tiny_shards, tmp_path):
    with running(tmp_path / "run", tiny_shards, *EP) as run:
        run.signal_in("forward", rank=1, number=signal.SIGSTOP)
        family = run.family()
        run.process.kill()
        run.process.wait()
        assert gone(family, within=5)


@pytest.mark.slow
def test_a_killed_launcher_s_ranks_save_first(tiny_shards, tmp_path):
    with running(tmp_path / "run", tiny_shards, *EP) as run:
        run.signal_in("forward", rank=1, number=signal.SIGCONT, after=4)
        family = run.family()
        run.process.kill()
        run.process.wait()
        assert gone(family, within=20)
    assert lives.read(tmp_path / "run")[-1].facts["exit_code"] == 75


def test_one_process_is_watched_too(tiny_shards, tmp_path):
    with running(tmp_path / "run", tiny_shards, nproc=1) as run:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.0)
        family = run.family()
        run.process.send_signal(signal.SIGSTOP)
        code, err, seconds = run.ended(within=60)
        assert seconds < 90  # the first step's bound, at worst
        assert code in (86, -signal.SIGKILL), err
        assert re.search(r"HangError: rank 0 has been in \S+ of step \d+ .* is stopped", err), err
        assert gone(family)


LAB = """
import ctypes, os, time
from dataclasses import dataclass
from ecdit_train.model.experts.swiglu import SwiGLU, SwiGLUExperts

calls = []

@dataclass(frozen=True, kw_only=True)
class Stuck(SwiGLU):
    def build(self, *, width, hidden, num_experts):
        return StuckExperts(width, hidden=hidden, num_experts=num_experts)

class StuckExperts(SwiGLUExperts):
    def compute(self, x_eRD):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) > 60:
            {trouble}
        return super().compute(x_eRD)
"""


def lab(folder, trouble: str) -> tuple[str, ...]:
    """Words for experts that get into trouble on rank 1 after some steps."""
    (folder / "moe" / "experts").mkdir(parents=True)
    (folder / "stuck.py").write_text(LAB.format(trouble=trouble))
    (folder / "moe" / "experts" / "stuck.yaml").write_text("_target_: stuck.Stuck\n")
    return (*EP, "moe/experts=stuck", f"--config-dir={folder}")


@pytest.mark.parametrize(
    "trouble", ["ctypes.PyDLL(None).sleep(600)", "time.sleep(600)"], ids=["holds the lock", "sleeps"]
)
def test_a_rank_that_blocks_is_told_from_one_that_waits_for_it(trouble, tiny_shards, tmp_path):
    """Both are in `forward` of the same step: one computes, the other waits for it in an exchange."""
    with running(tmp_path / "run", tiny_shards, *lab(tmp_path / "lab", trouble)) as run:
        code, err, _ = run.ended(within=120)
        assert code == 86, err
        assert re.search(
            r"HangError: rank 1 has been in forward of step \d+ for .* is sleeping.*; 1 other rank waits for it", err
        )
        assert "in compute" in (tmp_path / "run" / "logs" / "stacks-0001-rank-0001.txt").read_text()


def test_an_error_on_one_rank_is_told_first_and_ends_all(tiny_shards, tmp_path):
    with running(tmp_path / "run", tiny_shards, *lab(tmp_path / "lab", "raise KeyError('broken experts')")) as run:
        family: list[int] = []
        while run.process.poll() is None:
            family = run.family() or family
            time.sleep(0.05)
        code, err, _ = run.ended(within=10)
        assert code == 1, err
        assert "KeyError: 'broken experts'" in err
        assert "PeerLostError" not in err
        assert err.count("Traceback (most recent call last)") == 1, err
        assert gone(family)
    facts = lives.read(tmp_path / "run")[-1].facts
    assert (facts["exit_code"], facts["why"]) == (1, "rank 1: KeyError: 'broken experts'")


def test_a_full_memory_on_one_rank_is_told_once(tiny_shards, tmp_path):
    with running(tmp_path / "run", tiny_shards, *lab(tmp_path / "lab", "x_eRD.new_empty(1 << 58)")) as run:
        code, err, _ = run.ended(within=120)
        assert code == 91, err
        assert re.search(
            r"OutOfMemoryError \[rank 1\]: no memory left at ecdit_train/\S+:\d+: .* 1152921504606846976",
            err,
        ), err
        assert err.count("OutOfMemoryError") == 1, err
        assert "PeerLostError" not in err
    facts = lives.read(tmp_path / "run")[-1].facts
    assert facts["exit_code"] == 91
    assert facts["why"].startswith("rank 1: OutOfMemoryError: no memory left at ecdit_train/")


@pytest.mark.slow
def test_under_torchrun(tiny_shards, tmp_path):
    """The first rank of the machine starts the watchdog; it ends with them."""
    with running(tmp_path / "run", tiny_shards, *EP, launcher=TORCHRUN) as run:
        run.signal_in("backward", rank=1, number=signal.SIGSTOP)
        family = run.family()
        code, err, seconds = run.ended(within=60)
        assert code == 1, err  # torchrun's
        assert seconds < BOUND + 10
        assert re.search(r"HangError: rank 1 has been in backward of step \d+ .* is stopped", err), err
        assert gone(family)
    assert lives.read(tmp_path / "run")[-1].facts["exit_code"] == 86
