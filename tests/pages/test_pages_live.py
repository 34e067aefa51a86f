"""The served page follows a run, and is for this machine only; the page of `ecdit compare` shows runs over each other."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from observe_demo_run import build, routing_maps, write_pictures

from ecdit_train import comparison
from ecdit_train import run_folder as folder
from ecdit_train.errors import EcditError
from ecdit_train.observe import compare_page
from ecdit_train.observe.journal import Journal
from ecdit_train.observe.serve import server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("runs") / "demo", steps=200, grids=2)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "demo"))


@contextmanager
def serving(*runs: Path) -> Iterator[Any]:
    with server(runs) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield served
        finally:
            served.shutdown()
            thread.join()


def get(served: Any, path: str, *, method: str = "GET", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text


# --- the server ------------------------------------------------------------------------------------------------------


def test_it_answers_this_machine_and_reads_only(run: Path) -> None:
    with serving(run) as served:
        assert served.server_address[0] == "127.0.0.1"
        assert get(served, "/")[0] == 200
        for host in ("localhost:9000", "127.0.0.1", "[::1]:80"):  # as through `ssh -L`
            assert get(served, "/update.json", host=host)[0] == 200
        for host in ("evil.example", f"127.0.0.1.evil.example:{served.port}", "", "localhost.evil"):
            assert get(served, "/", host=host)[0] == 403
            assert get(served, "/update.json", host=host)[0] == 403
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"):
            assert get(served, "/", method=method)[0] == 405
        for path in (
            "/metrics.jsonl",
            "/../demo/resolved.yaml",
            "//etc/passwd",
            "/samples/",
            "/%2e%2e/",
            "/1/",
            "/update",
        ):
            assert get(served, path)[0] == 404
        with pytest.raises(EcditError, match=f"port {served.port} .* is taken"):
            server([run], port=served.port)


def test_only_what_changed_is_sent_and_a_run_that_goes_back_is_shown_so(run: Path) -> None:
    with serving(run) as served:
        first = json.loads(get(served, "/update.json")[1])["parts"]
        assert set(first) == {"records", "samples", "routing", "allocation", "evaluation", "configuration"}
        seen = "&".join(f"{name}={part['stamp']}" for name, part in first.items())
        assert json.loads(get(served, f"/update.json?{seen}")[1])["parts"] == {}
        steps = first["records"]["data"]["curves"]["step"]
        log = Journal(run, life=2, after=100)
        log.log(110, {"train/loss": 0.25})
        log.close()
        for part in served_parts(served, seen):
            assert part["data"]["curves"]["step"] == [n for n in steps if n <= 100] + [110]
            assert part["data"]["curves"]["series"]["train/loss"]["y"][-1] == 0.25


def served_parts(served: Any, seen: str) -> Iterator[Any]:
    """The records part once it is new: a part rests for some times as long as it took to make."""
    for _ in range(300):
        parts = json.loads(get(served, f"/update.json?{seen}")[1])["parts"]
        if parts:
            assert set(parts) == {"records"}
            yield parts["records"]
            return
        threading.Event().wait(0.05)
    pytest.fail("nothing new for 15 s")


def test_several_runs_have_a_list(run: Path, made: Path) -> None:
    with serving(run, made) as served:
        status, text = get(served, "/")
        assert status == 200
        assert 'href="/1/"' in text
        assert str(made) in text
        assert get(served, "/2/")[0] == get(served, "/2/update.json")[0] == 200
        assert 'url=/2/"' in get(served, "/2")[1]
        assert get(served, "/3")[0] == get(served, "/3/")[0] == get(served, "/update.json")[0] == 404


def test_ctrl_c_ends_the_command_cleanly(run: Path) -> None:
    def listens() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    command = [sys.executable, "-m", "ecdit_train.cli", "report", str(run), "--serve"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listens
    ) as process:
        line = process.stdout.readline()
        port = re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1]
        assert f"ssh -N -L {port}:127.0.0.1:{port} " in process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in told
    assert not (run / "report.html").exists()


def until(page: Any, true: str) -> None:
    """Not `wait_for_function`, which the page's own policy forbids: it makes code of a string."""
    for _ in range(100):
        if page.evaluate(true):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"not so after 10 s: {true}")


# --- its page --------------------------------------------------------------------------------------------------------


def test_the_page_follows_the_run_without_a_reload(run: Path, look: Callable[..., Any]) -> None:
    with serving(run) as served:
        opened = look(served.url)
        page = opened.page
        assert "live" in page.locator("#live").inner_text()
        page.evaluate("window.same = true")
        scale = page.locator("#chart-loss [data-do=log]")
        scale.click()
        chosen = scale.get_attribute("aria-pressed")
        page.locator("#more-learning > summary").click()
        page.locator("[data-set=expert]").select_option("3")
        slider = page.get_by_role("slider", name="training step").first
        slider.focus()
        page.keyboard.press("Home")
        page.locator(".multiples").scroll_into_view_if_needed()
        place = page.evaluate("scrollY")
        log = Journal(run, life=2, after=200)
        log.log(210, {"train/loss": 0.0123, "optim/grad_norm": 1.0, "toy/new": 1.0, "train/new_loss": 0.5})
        log.close()
        until(page, "document.querySelector('#tiles').textContent.includes('0.0123')")
        assert page.evaluate("charts.columns.step.at(-1)") == 210
        until(page, "!!document.querySelector('#chart-auxiliary-losses path.curve')")  # a curve that was not there
        assert scale.get_attribute("aria-pressed") == chosen
        assert page.locator("#more-learning").get_attribute("open") is not None
        write_pictures(run, step=210, noise=0.1)
        routing_maps(210).save(folder.routing_path(run, step=210))
        until(page, "document.querySelectorAll('.slide').length === 3")
        assert "step 100" in page.locator(".slide.on").inner_text()  # where the reader was
        until(page, "document.querySelector('.total').textContent.includes('step 210')")
        assert page.locator("[data-set=expert]").input_value() == "3"
        log = Journal(run, life=3, after=150)
        log.log(160, {"train/loss": 0.0777})
        log.close()
        until(page, "charts.columns.step.at(-1) === 160")
        assert "0.0777" in page.locator("#tiles").inner_text()
        assert page.evaluate("window.same") is True
        assert abs(page.evaluate("scrollY") - place) < 400  # a section above may have grown by a chart
        opened.fine()
    until(page, "document.querySelector('#live').classList.contains('lost')")


def test_a_page_opened_before_the_first_record_fills_itself(tmp_path: Path, look: Callable[..., Any]) -> None:
    (tmp_path / "resolved.yaml").write_text("experiment: early\ntrain: {steps: 100}\n")
    with serving(tmp_path) as served:
        opened = look(served.url)
        page = opened.page
        assert "no record yet" in page.locator("#live").inner_text()
        assert not page.locator("#learning").is_visible()
        log = Journal(tmp_path)
        log.log(10, {"train/loss": 0.5, "moe/L2/entropy": 0.9})
        routing_maps(10).save(folder.routing_path(tmp_path, step=10))
        write_pictures(tmp_path, step=10, noise=0.1)
        until(page, "!!document.querySelector('#chart-loss path.curve') && !!document.querySelector('.slide')")
        until(page, "(document.querySelector('.total') || {}).textContent?.includes('step 10')")
        for section in ("learning", "samples", "explorer", "routing"):
            assert page.locator(f"#{section}").is_visible()
            assert page.locator(f'.places a[href="#{section}"]').is_visible()
        log.log(20, {"train/loss": 0.25, "moe/L2/entropy": 0.8})
        log.close()
        until(page, "charts.columns.step.at(-1) === 20")
        assert page.locator("#tiles").inner_text().split()[:4] == ["20", "of", "100", "steps"]
        opened.fine()


# --- runs over each other --------------------------------------------------------------------------------------------


def test_the_page_of_a_comparison(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[..., Any], shot: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(made, f"runs/{name}")
    log = Path("runs/b/metrics/0001.jsonl")
    lines = log.read_text().splitlines()
    cut = [json.loads(line) for line in lines[:12]]
    for record in cut[8:]:
        record["train/loss"] *= 1.5
    log.write_text("".join(json.dumps(record) + "\n" for record in cut))
    resolved = Path("runs/b/resolved.yaml")
    resolved.write_text(resolved.read_text().replace("seed: 0", "seed: 1").replace("lr: 0.0003", "lr: 0.001"))
    found = comparison.compared(["runs/a", "runs/b"])
    runs = [(r.letter, r.folder.name, r.folder) for r in found.runs]
    out = compare_page.write_page(tmp_path / "deep/er/c.html", runs=runs, told=found.told())
    for how in ({}, {"dark": True}, {"phone": True}):
        opened = look(out.as_uri(), **how)
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert f"first apart at step {cut[8]['step']}: train/loss" in page.locator("#runs").inner_text()
        assert page.locator("#chart-train-loss path.curve").count() == 2
        opened.fine()
    page = look(out.as_uri()).page
    assert page.locator("#configurations").get_by_text("0.001").count() == 1
    shot(page, "compare")
    page.evaluate("document.querySelector('#chart-train-loss .plot').focus()")
    page.keyboard.press("End")
    said = page.locator("#chart-train-loss .legend").inner_text()
    assert "step 200" in said  # where the shorter run has no record, its last one is read
    read = [float(n) for n in page.locator("#chart-train-loss .legend b").all_inner_texts()]
    assert read == pytest.approx([json.loads(lines[-1])["train/loss"], cut[-1]["train/loss"]], rel=1e-3)
    page.locator("#x-axis").select_option("images")
    assert page.locator("#chart-train-loss path.curve").count() == 2
