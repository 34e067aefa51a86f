"""Dashboards as code: every panel shows metrics that exist, every metric is shown, and applying twice is applying once."""

from __future__ import annotations

import json
import re

import pytest
from observe_wandb_server import KEY, serving

from ecdit_train import cli
from ecdit_train.observe import dashboard
from ecdit_train.observe.metrics import METRICS, metric_key

SHOWN_ELSEWHERE = {
    "ckpt/step",
    "ckpt/interval",
    "moe/{name}",
    "moe/{name}_max",
    "moe/L{n}/{name}",
    "moe/L{n}/{name}_max",
    "train/{name}_loss",
    "train/images",
    "perf/tokens_per_s",
}
"""Counters, doubles, and what a router of one's own reports: W&B has a panel for a name that somebody looks for."""
ROOMS = ("diffusion/", "eval/", "mem/", "samples/", "perf/time/", "perf/goodput", "perf/mfu_of_plan", "ckpt/age_s")
MORE = ("t{b}", "edge_margin", "expert_similarity", "expert_timestep_std", "dead_experts", "data/loader", "validation/")
OTHER = ("perf/memory_gib",)
"""Metrics of which the table has either the ones or the others."""


def ecdit(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    return int(end.value.code or 0)


def test_every_pattern_is_of_a_metric():
    unknown = [p for p in dashboard.patterns() if not dashboard.matches(p, METRICS)]
    assert [p for p in unknown if not (p.startswith(ROOMS) or any(m in p for m in MORE) or p in OTHER)] == []


def test_every_metric_is_shown():
    shown = {key for pattern in dashboard.patterns() for key in dashboard.matches(pattern, METRICS)}
    rooms = ("moe/", "data/loader/samples", "loader/samples")  # over layers, where each layer is shown
    missing = {key for key in set(METRICS) - shown - SHOWN_ELSEWHERE if not key.startswith(rooms)}
    assert {key for key in missing if not key.endswith("selection_drift")} == set()
    assert {key for key in METRICS if key.startswith("moe/L{n}/") and "{name}" not in key} <= shown


def test_a_place_in_a_name_stands_for_what_is_logged_there():
    shown = dashboard.read(known=["moe/L{n}/entropy", "data/bad/{kind}", "diffusion/loss_t{b}", "train/loss"])
    regexes = [panel.regex for section in shown.sections for panel in section.panels if panel.regex]
    for name in ("moe/L12/entropy", "data/bad/cut-jpeg", "diffusion/loss_t3"):
        assert any(re.search(regex, name) for regex in regexes), name
    for name in ("moe/L12/entropy_max", "xmoe/L1/entropy", "moe/entropy"):
        assert not any(re.search(regex, name) for regex in regexes), name
    assert metric_key("moe/L12/entropy") in METRICS


def test_another_version_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("version: 2\nname: x\nreport: y\nsections: []\n")
    with pytest.raises(ValueError, match="version 2"):
        dashboard.read(path)


def test_applied_twice_it_is_there_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert ecdit("dash", "apply", "--project", "p") == 0
        first, views = capsys.readouterr().out, {name: view["spec"] for name, view in server.views.items()}
        assert ecdit("dash", "apply", "--project", "p") == 0
        again = capsys.readouterr().out
        sent = [(name, v) for name, v in server.operations if name in ("upsertView", "UpsertView2")]
    assert (first.split()[0], again.split()[0]) == ("created", "updated")
    assert f"{server.url}/me/p?nw=ecdittraining" in first
    assert {name: view["spec"] for name, view in server.views.items()} == views, "the same two, unchanged"
    assert sorted(view["type"] for view in server.views.values()) == ["project-view", "runs"]
    assert [v.get("id") for _, v in sent] == [None, None, "view0", "view1"]
    assert ecdit("dash", "apply", "--project", "p", "--entity", "me", "--dry-run") == 0
    shown = json.loads(capsys.readouterr().out)
    by_type = {view["type"]: json.loads(view["spec"]) for view in server.views.values()}
    assert by_type["project-view"] == shown["workspace"]["spec"], "what a dry run prints is what is sent"


def test_a_server_that_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("ecdit_train.observe.wandb_views.apply", _refused)
    assert ecdit("dash", "apply", "--project", "p", "--entity", "me") == 87
    assert "W&B does not take the dashboards of p: ConnectionError: no route" in capsys.readouterr().err


def _refused(*args: object, **kwargs: object) -> None:
    raise ConnectionError("no\nroute")


def test_without_a_project_or_a_key_it_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert ecdit("dash", "apply") == 77
    assert "--project" in capsys.readouterr().err
    assert ecdit("dash", "apply", "--project", "p") == 77
    assert "wandb login" in capsys.readouterr().err
    assert ecdit("dash", "show") == 0
    assert "Entropy by layer" in capsys.readouterr().out
