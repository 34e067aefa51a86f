"""The ranks of one node among several: their numbers, where they meet, over which interface, what is told of their end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ecdit_train.errors import ConfigError, PeerLostError
from launch import interface, local, place, reports
from launch.place import Place

STEP = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[4-5]"}


def test_slurm_says_where(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames n[4-5]" ] && printf "n4\\nn5\\n"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert place.find(2, environ=STEP) == Place(node=1, nodes=2, address="n4", port=20000 + 7 * 8)
    again = place.find(2, environ=STEP | {"SLURM_RESTART_COUNT": "3"})
    assert again.port == 20000 + 7 * 8 + 3


@pytest.mark.parametrize(
    ("names", "hosts"),
    [
        ("n1", "n1"),
        ("n[1-3,7],m5", "n1 n2 n3 n7 m5"),
        ("gpu[008-011]", "gpu008 gpu009 gpu010 gpu011"),
        ("r[1-2]n[01-02]-ib,x", "r1n01-ib r1n02-ib r2n01-ib r2n02-ib x"),
        ("n[1-x]", ""),
    ],
)
def test_a_list_of_hosts_can_be_read_where_slurm_does_not_answer(names, hosts, tmp_path, monkeypatch):
    """As on a node without clients, or while the controller is away."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert place.expand(names) == hosts.split()


def test_the_supervisor_and_a_hand_win():
    assert place.find(2, environ=STEP | {"MASTER_ADDR": "n9", "MASTER_PORT": "4000"}) == Place(
        node=1, nodes=2, address="n9", port=4000
    )
    by_hand = {"NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    assert place.find(3, environ=STEP | by_hand) == Place(node=0, nodes=3, address="10.0.0.1", port=4000)


def test_neighbours_and_lives_meet_at_other_ports():
    ports = [place.port_of(str(job), life=life) for job in range(100, 110) for life in range(8)]
    assert len(set(ports)) == len(ports)
    assert all(20000 <= place.port_of(str(job), life=job % 300) < 30000 for job in range(0, 10**7, 99991))


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "NODE_RANK = '': must be the number of this machine, 0 to 1"),
        ({"NODE_RANK": "2"}, "NODE_RANK = '2'"),
        ({"NODE_RANK": "1"}, "MASTER_ADDR = None: must name the first machine"),
        (STEP | {"SLURM_STEP_NUM_NODES": "3"}, "the step has 3 nodes: srun --nodes=2; nearest valid: 3"),
        (STEP | {"SLURM_LOCALID": "1"}, "srun --ntasks-per-node=1"),
        (STEP | {"MASTER_ADDR": "n4", "MASTER_PORT": "x"}, "MASTER_PORT = 'x'"),
    ],
)
def test_what_cannot_be_is_one_clear_error(environ, said):
    with pytest.raises(ConfigError) as caught:
        place.find(2, environ=environ)
    assert said in str(caught.value)


def test_an_interface_of_this_machine_alone_is_none():
    assert interface.towards("127.0.0.1", port=80) is None
    assert interface.towards("no such host.invalid", port=80) is None


def test_the_interface_has_the_address_that_the_route_uses(monkeypatch):
    monkeypatch.setattr(interface, "addresses", lambda: {"eth0": "10.9.9.9", "ib0": "127.0.0.1"})
    assert interface.towards("127.0.0.1", port=80) == "ib0"
    monkeypatch.setattr(interface, "addresses", lambda: {"docker0": "127.0.0.1"})
    assert interface.towards("127.0.0.1", port=80) is None
    assert interface.variables("ib0") == {"NCCL_SOCKET_IFNAME": "=ib0", "GLOO_SOCKET_IFNAME": "ib0"}


def test_addresses_of_this_machine():
    assert interface.addresses()["lo"] == "127.0.0.1"


@pytest.fixture
def node(tmp_path, monkeypatch):
    """`node(body)`: the launcher's code as the second of two nodes, each with two ranks that run `body`."""

    def run(body: str) -> int:
        script = tmp_path / "rank.py"
        script.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + body)
        monkeypatch.setattr(local, "COMMAND", (sys.executable, str(script)))
        monkeypatch.setenv(reports.VARIABLE, str(tmp_path))
        monkeypatch.setenv("ECDIT_EXIT_FILE", str(tmp_path / "exit"))
        monkeypatch.setattr(interface, "towards", lambda host, port: "ib7")
        return local.run_ranks([], nproc=2, place=Place(node=1, nodes=2, address="n4", port=4321))

    return run


def test_ranks_are_counted_over_the_nodes(node, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NCCL_SOCKET_IFNAME")
    names += ("GLOO_SOCKET_IFNAME",)
    assert node(f"open(f'{tmp_path}/said-{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names}))") == 0
    for rank in (2, 3):
        assert (tmp_path / f"said-{rank}").read_text() == f"{rank - 2} 4 2 n4 4321 =ib7 mine"
    (report,) = reports.read(tmp_path)
    assert (report.node, report.code) == (1, 0)
    assert reports.first_cause(tmp_path) is None


def test_a_killed_rank_is_the_first_cause_for_all_nodes(node, tmp_path, capfd):
    began = time.monotonic()
    code = node(f"os.kill(os.getpid(), signal.SIGKILL) if rank == 3 else sys.exit({PeerLostError.exit_code})")
    assert code == 137
    assert time.monotonic() - began < 20
    assert reports.first_cause(tmp_path) == (137, "rank 3 was ended by SIGKILL")
    assert reports.read(tmp_path)[0].why == "rank 3 was ended by SIGKILL"
    assert "ecdit: rank 3 was ended by SIGKILL\n" in capfd.readouterr().err


def test_losing_the_other_node_is_no_cause(node, tmp_path):
    """It is the other node's, or nobody's who could write; the end is told, so that nobody waits for it."""
    assert node(f"sys.exit({PeerLostError.exit_code})") == PeerLostError.exit_code
    assert reports.first_cause(tmp_path) is None
    assert reports.read(tmp_path)[0].code == PeerLostError.exit_code


def test_an_earlier_cause_stays(node, tmp_path):
    (tmp_path / "exit").write_text("80\nNonFiniteError: step 4\n")
    assert node("sys.exit(137)") == 137
    assert reports.first_cause(tmp_path) == (80, "NonFiniteError: step 4")


def test_a_folder_that_is_gone_ends_nothing(node, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "VARIABLE", "ECDIT_NOWHERE")
    monkeypatch.setenv("ECDIT_NOWHERE", str(tmp_path / "gone"))
    assert node("sys.exit(0)") == 0


def test_the_command_line_wants_ranks_with_nodes():
    for words in (["--nodes", "2", "resume", "x"], ["--nproc", "1", "--nodes", "2", "status", "x"]):
        command = [sys.executable, "-m", "ecdit_train.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        assert done.returncode == 2
        assert "argument --nodes" in done.stderr
