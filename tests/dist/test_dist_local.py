"""`ecdit --nproc 2` as a person meets it: what is printed, which exit code comes back, and that nobody stays behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dist_harness import run_distributed
from dist_runs import TWO_HEADS
from tiny_runs import records, words

from ecdit_train.checkpoint import folder
from ecdit_train.errors import EncoderError, PeerRefusedError

PROGRESS = re.compile(r"step \d+/\d+  loss .*|stopped by .*|resumed from step \d+")
LONG = ("train.steps=2000", "checkpoint.every_steps=1000", "optim.schedule=constant")


def start(*line: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ecdit_train.cli", *line]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of stdout and of stderr."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out.splitlines(), err.splitlines()


def train(run: Path, shards: Path, *extra: str) -> subprocess.Popen:
    return start("--nproc", "2", "train", *words(run, shards, *TWO_HEADS, "train.microbatch=2", *extra))


def ranks_of(process: subprocess.Popen, run: Path, *, step: int) -> list[int]:
    """The pids of the ranks, once the run has come to `step`."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 180
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    _, *pids = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(pids) == 2  # after the guard
    return pids


def told(out: list[str]) -> list[str]:
    """Without what a run says of its beginning (tests/unit/test_header.py)."""
    return [line for line in out if not line.startswith(("ecdit ", "  "))]


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_asked_to_stop_and_gone_on_elsewhere(tiny_shards, tmp_path):
    """Two tensor-parallel ranks stop with everything saved; one process draws from that, and goes on with it."""
    process = train(tmp_path, tiny_shards, *LONG, "parallel.tp=2", "parallel.ep=2")
    pids = ranks_of(process, tmp_path, step=3)
    process.send_signal(signal.SIGTERM)
    code, out, err = ended(process)
    assert (code, err) == (75, [])
    assert gone(pids)
    out = told(out)
    assert [line for line in out if not PROGRESS.fullmatch(line)] == []
    last = records(tmp_path)[-1]["step"]
    assert len(out) == last + 1
    assert out[-1].startswith(f"stopped by SIGTERM after step {last}, everything saved; go on with: ecdit resume ")
    assert [found.step for found in folder.find(tmp_path / "checkpoints")] == [last]

    code, out, err = ended(start("sample", f"run={tmp_path}", "prompts=a red circle|a blue square|a green cross"))
    assert (code, len(out), err) == (0, 1, [])
    assert Path(out[0].rpartition(": ")[2]).stat().st_size > 500

    code, out, err = ended(
        start("resume", str(tmp_path), "--stop-after", str(last + 2), "parallel.tp=1", "parallel.ep=1")
    )
    assert (code, err) == (75, [])
    assert told(out)[0] == f"resumed from step {last}"
    assert [line["step"] for line in records(tmp_path)] == list(range(1, last + 3))


def test_a_rank_is_killed(tiny_shards, tmp_path):
    process = train(tmp_path, tiny_shards, *LONG, "parallel.ep=2")
    pids = ranks_of(process, tmp_path, step=2)
    os.kill(pids[1], signal.SIGKILL)
    code, _, err = ended(process)
    assert code == 128 + signal.SIGKILL
    assert gone(pids)
    assert re.fullmatch(r"ecdit: rank 1 was ended by SIGKILL in [a-z]+ of step \d+", err[0])
    assert err[1:] == []  # who lost it need not say so


@pytest.mark.parametrize(("name", "code", "extra", "said"), [
    ("config", 77, ("parallel.tp=4",),
     "ConfigError [rank 0]: parallel.tp = 4: must divide model.heads = 2; nearest valid: 2"),
    ("shards", 60, ("data.shards=/nowhere",), "MissingShard [rank 0]: "),
    ("diverged", 80, ("optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=0", "optim/optimizer=rmsprop"),
     "NonFiniteError [rank 0]: step 2, samples 8 to 15: loss "),  # inf or nan: as this machine's vector units round
], ids=lambda value: value if isinstance(value, str) and value.isalpha() else "")  # fmt: skip
def test_errors_are_told_once(name, code, extra, said, tiny_shards, tmp_path):
    found, out, err = ended(train(tmp_path / "run", tiny_shards, *extra))
    assert found == code, err
    assert len([line for line in err if line.startswith(f"ecdit: {said}")]) == 1, err
    assert all(line.startswith("ecdit: ") and "[rank 0]" in line for line in err), err
    assert len(set(err)) == len(err)
    step, alert = told(out) or ("", "")
    assert step.startswith("step 1/") == alert.startswith("alert: non-finite at step 2") == (name == "diverged")
    assert (tmp_path / "run").exists() == (name == "diverged")  # what cannot start leaves no trace


def test_a_sample_that_one_rank_cannot_read(tiny_shards, tmp_path):
    """The code and the words are those of the rank that met it, not of the one that was waiting for it."""
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    tar = sorted(shards.glob("*.tar"))[2]
    data = bytearray(tar.read_bytes())
    middle = data.find(b"\x89PNG", len(data) // 2)
    data[middle + 60 : middle + 70] = bytes(10)
    tar.write_bytes(data)
    code, _, err = ended(train(tmp_path / "run", shards, "train.steps=25", "data.prefetch=0"))
    told = [line for line in err if "PeerLostError" not in line]
    assert 60 <= code <= 69, err
    assert len(told) == 1, err
    assert tar.name in told[0]
    assert all(line.startswith("ecdit: ") for line in err), err


def refused(here: Any) -> list[Any]:
    """What each rank makes of work that fails on some."""
    answers: list[Any] = [here.together(lambda: here.rank)]

    def on(*ranks: int) -> Any:
        def work() -> int:
            if here.rank in ranks:
                raise EncoderError(f"no folder, as {len(ranks)} ranks say")
            return 1

        return work

    for ranks in ((1,), (1, 2)):
        try:
            here.together(on(*ranks))
        except (EncoderError, PeerRefusedError) as e:
            answers.append((type(e).__name__, e.exit_code))
    return answers


def test_what_one_rank_cannot_start_none_starts():
    quiet, loud = ("PeerRefusedError", EncoderError.exit_code), ("EncoderError", EncoderError.exit_code)
    assert run_distributed(3, refused) == [[0, quiet, quiet], [1, loud, loud], [2, quiet, quiet]]
