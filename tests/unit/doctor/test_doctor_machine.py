"""What `ecdit doctor` asks of a machine, with machines that are not fit."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from ecdit_train.doctor import machine, software


def only(found):
    (one,) = list(found)
    return one


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


# --- software ---------------------------------------------------------------------------------------------------------


def test_this_environment_is_the_one_that_is_pinned():
    assert only(software.python()).state == "ok"
    assert only(software.packages()).state == "ok"


def test_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(software.sys, "version_info", (3, 9, 2, "final", 0))
    one = only(software.python())
    assert (one.state, one.found) == ("fail", "3.9.2, and >=3.11,<3.14 is needed")


def test_packages_that_are_missing_or_others():
    missing, other = software.packages(["numpy>=1", "no_such_package==1.0", "pillow==0.1"])
    assert (missing.state, missing.found) == ("fail", "not installed: no_such_package==1.0")
    assert other.state == "warning"
    assert "(==0.1)" in other.found
    assert only(software.packages([])).state == "warning"


@pytest.mark.parametrize(
    ("version", "wanted", "outside"),
    [("2.13.0+cpu", ">=2.11,<=2.13.0", False), ("2.13.1", "<=2.13.0", True), ("2.9", ">=2.11", True), ("1.2", "==1.2.0", False),
     ("3.14.0", "<3.14", True), ("1.10", ">1.9", False)],
)  # fmt: skip
def test_ranges(version, wanted, outside):
    assert software._outside(version, wanted) is outside


def test_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(software, "PROBE", "raise ImportError('libcudart.so.12: cannot open')")
    one = only(software.torch(None))
    assert (one.state, one.found) == ("fail", "cannot be imported: ImportError: libcudart.so.12: cannot open")


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """An nvidia-smi that answers this."""

    def say(memory: str, *, code: int = 0) -> None:
        body = f'case "$*" in *driver*) echo 570.1; echo 570.1;; *) printf "{memory}"; exit {code};; esac'
        program(tmp_path, "nvidia-smi", body)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return say


@pytest.mark.parametrize(
    ("memory", "names", "cuda", "wanted", "state", "said"),
    [
        ("0, 0\n1, 0\n", ["H100", "H100"], "12.8", 2, "ok", "2 x H100, driver 570.1"),
        ("0, 0\n1, 0\n", ["H100", "H100"], "12.8", 8, "fail", "8 are needed"),
        ("0, 0\n1, 0\n", [], "12.8", 2, "fail", "2 in this machine, and torch sees none"),
        ("0, 0\n", [], None, 1, "fail", "install torch's CUDA build"),
        ("0, 7\n", ["H100"], "12.8", 1, "fail", "GPU 0 has 7 uncorrected memory errors"),
    ],
)
def test_gpus(memory, names, cuda, wanted, state, said, smi):
    smi(memory)
    found = list(software.gpus(names, cuda=cuda, wanted=wanted))
    assert state in {one.state for one in found}
    assert any(said in f"{one.found} {one.fix}" for one in found)


def test_a_driver_that_does_not_answer(smi):
    smi("Failed to initialize NVML", code=9)
    assert only(software.gpus([], cuda="12.8", wanted=1)).found == "nvidia-smi: Failed to initialize NVML"


def test_two_ranks_meet():
    one = only(software.all_reduce())
    assert one.state == "ok", one
    assert one.found.startswith("2 ranks over gloo and loopback: ")


@pytest.mark.parametrize(
    ("body", "said"),
    [("echo 'port is taken' >&2; exit 88", "exit code 88: port is taken"), ("sleep 60", "did not meet")],
)
def test_ranks_that_do_not_meet(body, said, tmp_path, monkeypatch):
    program(tmp_path, "python", f"exec 1>/dev/null; {body.replace('sleep', 'exec sleep')}")
    monkeypatch.setattr(software.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(software, "MEET_SECONDS", 11.0)
    one = only(software.all_reduce())
    assert one.state == "fail"
    assert said in one.found


# --- names, ports, memory, files --------------------------------------------------------------------------------------


def test_this_machine_is_fit():
    for ask in (machine.port, machine.shared_memory, machine.open_files, lambda: machine.interfaces(None)):
        assert only(ask()).state in ("ok", "warning")
    assert only(machine.port()).state == "ok"


@pytest.mark.parametrize(("nodes", "state"), [(1, "warning"), (2, "fail")])
def test_a_name_that_nobody_knows(nodes, state, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(machine.socket, "getaddrinfo", unknown)
    one = only(machine.host_name(nodes=nodes))
    assert one.state == state
    assert "does not resolve" in one.found
    assert "/etc/hosts" in one.fix


def test_a_name_of_another_machine(monkeypatch):
    monkeypatch.setattr(machine.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("203.0.113.9", 0))])
    one = only(machine.host_name(nodes=2))
    assert (one.state, "no address of this machine" in one.found) == ("fail", True)


def test_a_port_that_cannot_be_reached(monkeypatch):
    def refused(*_, **__):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(machine.socket, "create_connection", refused)
    one = only(machine.port())
    assert one.state == "fail"
    assert "cannot be reached at 127.0.0.1" in one.found


def test_an_interface_that_is_not_here():
    one = only(machine.interfaces("ib7"))
    assert (one.state, one.found.startswith("ib7 is not here; there are ")) == ("warning", True)


def test_a_containers_shared_memory(tmp_path, monkeypatch):
    assert only(machine.shared_memory(tmp_path / "none")).state == "fail"
    monkeypatch.setattr(machine, "SHM_BYTES", 1 << 62)
    one = only(machine.shared_memory(tmp_path))
    assert (one.state, "--shm-size" in one.fix) == ("warning", True)


def test_few_open_files(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 4096))
    one = only(machine.open_files())
    assert (one.state, one.found) == ("warning", "256 (hard limit 4096)")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (machine.resource.RLIM_INFINITY,) * 2)
    assert only(machine.open_files()).found == "unlimited"
    assert sys.platform.startswith("linux")
