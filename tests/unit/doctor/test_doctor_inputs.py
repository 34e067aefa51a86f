"""What `ecdit doctor` asks about data and W&B."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from tiny_runs import configure

from ecdit_train.doctor import run_inputs

KEY = "0123456789abcdef" * 2 + "01234567"


def by_name(found) -> dict:
    return {one.what: one for one in found}


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """No login, no proxy."""
    monkeypatch.setattr(run_inputs.reach, "NETRC", tmp_path / "netrc")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "netrc"


def test_a_run_that_is_offline(nobody):
    (one,) = run_inputs.wandb("offline", environ={})
    assert (one.state, "offline" in one.found) == ("ok", True)
    (one,) = run_inputs.wandb(None, environ={})
    assert one.state == "ok"


def test_online_without_a_key_or_a_way(nobody):
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        found = by_name(run_inputs.wandb("online", environ={"WANDB_BASE_URL": url}))
    assert (found["wandb"].state, found["wandb key"].state) == ("warning", "fail")
    assert "wandb.mode=offline" in found["wandb"].fix


@pytest.mark.parametrize("where", ["environment", "netrc"])
def test_online_with_a_key_that_is_never_shown(where, nobody):
    environ = {}
    if where == "environment":
        environ["WANDB_API_KEY"] = KEY
    else:
        nobody.write_text(f"machine 127.0.0.1 login user password {KEY}\n")
        nobody.chmod(0o600)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        found = by_name(run_inputs.wandb("online", environ=environ))
    assert {one.state for one in found.values()} == {"ok"}
    assert KEY not in str(found)


def test_the_proxy_on_the_way(nobody, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{server.getsockname()[1]}")
        found = by_name(run_inputs.wandb("online", environ={"WANDB_API_KEY": KEY}))
    assert found["wandb"].found == "api.wandb.ai answers through the proxy 127.0.0.1"
    assert "secret" not in str(found)


def test_the_mode_of_a_run(tmp_path):
    assert run_inputs.mode(configure(tmp_path, "x")) is None
    assert run_inputs.mode(configure(tmp_path, "x", "observe/sinks=wandb")) == "offline"


def test_data(tiny_shards, tmp_path):
    cfg = configure(tmp_path / "run", tiny_shards)
    assert [one.state for one in run_inputs.there(cfg)] == ["ok"]
    (one,) = run_inputs.shards(cfg)
    assert (one.state, one.found.startswith("200 samples in 5 shards")) == ("ok", True)


def test_data_that_is_not_there_or_damaged(tiny_shards, tmp_path):
    nowhere = configure(tmp_path / "run", tmp_path / "nowhere")
    (one,) = run_inputs.there(nowhere)
    assert (one.state, "is not a folder" in one.found) == ("fail", True)
    assert list(run_inputs.shards(nowhere)) == [], "said once"
    copy = Path(shutil.copytree(tiny_shards, tmp_path / "copy"))
    tar = next(copy.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    (one,) = run_inputs.shards(configure(tmp_path / "run", copy))
    assert (one.state, tar.name in one.found) == ("fail", True)
