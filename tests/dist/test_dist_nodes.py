"""Two node launchers, as two machines of a job start them (here over loopback, told by hand): one run, one first cause, and nobody
who stays behind a node that failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dist_runs import TWO_HEADS
from test_dist_local import LONG, gone
from tiny_runs import records, words

from ecdit_train.errors import PeerLostError
from ecdit_train.supervise import lives, processes
from launch import reports
from launch.local import free_port


def node(number: int, *, port: int, life: Path, line: list[str]) -> subprocess.Popen:
    env = {**os.environ, "NODE_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {reports.VARIABLE: str(life), "ECDIT_EXIT_FILE": str(life / reports.EXIT), "SLURMD_NODENAME": f"n{number}"}
    command = [sys.executable, "-m", "ecdit_train.cli", "--nproc", "1", "--nodes", "2", *line]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_over_two_nodes_and_one_of_them_fails(tiny_shards, tmp_path):
    life, run, port = tmp_path / "life", tmp_path / "run", free_port()
    life.mkdir()
    line = ["train", *words(run, tiny_shards, *TWO_HEADS, "train.microbatch=4", *LONG)]
    nodes = [node(number, port=port, life=life, line=line) for number in range(2)]
    try:
        deadline = time.monotonic() + 180
        while not (run / "metrics.jsonl").exists() or len(records(run)) < 3:
            assert all(process.poll() is None for process in nodes), [process.communicate() for process in nodes]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [(report.node, report.code) for report in reports.read(life)] == [(0, None), (1, None)]
        pids = [pid for process in nodes for pid in processes.descendants(process.pid)]
        family = processes.descendants(nodes[1].pid)
        rank = next(pid for pid in family if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(rank, signal.SIGKILL)
        began = time.monotonic()
        said = [process.communicate(timeout=60)[1] for process in nodes]
        assert time.monotonic() - began < 20
    finally:
        for process in nodes:
            process.kill()
    assert [process.returncode for process in nodes] == [PeerLostError.exit_code, 128 + signal.SIGKILL]
    assert "ecdit: rank 1 was ended by SIGKILL in " in said[1]
    code, why = reports.first_cause(life)
    assert code == 137
    assert why.startswith("rank 1 was ")
    assert [report.code for report in reports.read(life)] == [PeerLostError.exit_code, 137]
    assert gone(pids)
    (record,) = lives.read(run)
    assert record.facts["exit_code"] == PeerLostError.exit_code
    assert record.facts["why"].startswith("PeerLostError: another rank left")
