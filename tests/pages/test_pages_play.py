"""The playground draws what `open_run` draws, shows who worked where, and takes orders from its own page alone."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest
from tiny_runs import configure, live

from ecdit_train.observe.figures import opened, small_picture
from ecdit_train.opened import open_run
from ecdit_train.play import MAX_FRAMES, Playground

PROMPT = "a photo of a red circle"


def trained(folder: Path, shards: Any, *words: str) -> str:
    config = configure(
        folder / "run",
        shards,
        "train.steps=8",
        "sample.steps=6",
        f"observe.prompts=[{PROMPT}]",
        "model.layers=4",
        *words,
    )
    live(config)
    return config.run


@pytest.fixture(scope="module")
def run(tiny_shards: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(tmp_path_factory.mktemp("play"), tiny_shards)


@pytest.fixture(scope="module")
def ground(run: str) -> Iterator[Any]:
    yield from serve(run)


def serve(run: str) -> Iterator[Any]:
    playground = Playground(open_run(run, device="cpu"))
    with playground.server() as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield playground, served
        served.shutdown()
        thread.join()


def ask(served: Any, path: str, **words: Any) -> dict[str, Any]:
    with urlopen(f"{served.url}{path}?{urlencode(words)}", timeout=30) as reply:
        return json.load(reply)


def whole(playground: Playground, served: Any, **words: Any) -> list[dict[str, Any]]:
    """Every event of a drawing."""
    number = ask(served, "start.json", key=playground.key, **words)["drawing"]
    events: list[dict[str, Any]] = []
    until = time.monotonic() + 60
    while not events or events[-1]["kind"] in ("begun", "frame"):
        assert time.monotonic() < until
        answer = ask(served, "events.json", key=playground.key, drawing=number, seen=len(events))
        assert answer["drawing"] == number
        events += answer["events"]
    return events


def test_frames_are_those_of_python(ground: Any, run: str) -> None:
    playground, served = ground
    events = whole(playground, served, prompt=PROMPT, steps=5, guidance=3, seed=4)
    frames = []
    drawn = open_run(run, device="cpu").draw(PROMPT, steps=5, guidance=3.0, seed=4, on_frame=frames.append)
    assert [e["kind"] for e in events] == ["begun", *["frame"] * 5, "done"]
    assert events[0]["unknown"] == []
    for place, (event, frame) in enumerate(zip(events[1:-1], frames, strict=True)):
        assert event["place"] == place
        assert event["t"] == pytest.approx(frame.t, abs=1e-4)
        assert event["picture"] == small_picture(frame.images[0])
        assert base64.b64decode(event["chosen"]) == frame.chosen[:, 0].tobytes()
    assert events[-1]["picture"] == small_picture(drawn.images[0])


def test_words_that_no_caption_had_are_told(ground: Any) -> None:
    begun = whole(*ground, prompt="a photo of a red circel", steps=1)[0]
    assert begun["unknown"] == [{"word": "circel", "nearest": "circle"}]


def test_many_steps_are_thinned_out_and_keep_their_ends(ground: Any) -> None:
    events = whole(*ground, prompt=PROMPT, steps=MAX_FRAMES * 2 + 1, guidance=1)
    frames = [e for e in events if e["kind"] == "frame"]
    assert len(frames) <= MAX_FRAMES
    assert [f["place"] for f in frames] == list(range(len(frames)))
    assert frames[0]["t"] == 0
    assert frames[-1]["t"] == pytest.approx(1 - 1 / (MAX_FRAMES * 2 + 1), abs=1e-3)


def test_a_new_drawing_ends_the_one_before(ground: Any) -> None:
    playground, served = ground
    first = ask(served, "start.json", key=playground.key, prompt=PROMPT, steps=1000)["drawing"]
    before = playground._now
    events = whole(playground, served, prompt=PROMPT, steps=2)
    assert events[-1]["kind"] == "done"
    assert playground._now.number == first + 1
    assert not before.wanted
    assert all(e["kind"] != "done" for e in before.events)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 3000}, "prompt"),
        ({"prompt": PROMPT, "steps": "0"}, "nearest valid: 1"),
        ({"prompt": PROMPT, "steps": "many"}, "steps"),
        ({"prompt": PROMPT, "guidance": "nan"}, "guidance"),
        ({"prompt": PROMPT, "seed": "-1"}, "seed"),
        ({"prompt": PROMPT, "scope": "grup"}, "nearest valid: group"),
    ],
)
def test_what_cannot_be_drawn_is_said(ground: Any, words: dict[str, str], said: str) -> None:
    playground, served = ground
    before = playground._now
    assert said in ask(served, "start.json", key=playground.key, **words)["error"]
    assert playground._now is before


def test_other_pages_cannot_start_anything(ground: Any) -> None:
    playground, _ = ground
    before = playground._now
    for key in ({}, {"key": ""}, {"key": "guess"}, {"key": "é"}):
        assert playground.answer("/start.json", {"prompt": PROMPT, **key}) is None
        assert playground.answer("/events.json", key) is None
    assert playground.answer("/etc/passwd", {"key": playground.key}) is None
    assert playground._now is before


def decoded(source: str) -> np.ndarray:
    return np.asarray(opened(base64.b64decode(source.partition(",")[2])).convert("RGB"))


@pytest.mark.parametrize("phone", [False, True])
def test_a_prompt_becomes_a_picture_and_its_map(
    ground: Any, run: str, look: Callable[..., Any], shot: Any, phone: bool
) -> None:
    _, served = ground
    window = look(served.url, phone=phone, dark=phone)
    view = window.page
    view.fill("textarea", PROMPT)
    view.press("textarea", "Enter")
    view.get_by_text("drawn in").wait_for(timeout=30_000)
    drawn = open_run(run, device="cpu").draw(PROMPT, timesteps=6)
    np.testing.assert_array_equal(decoded(view.get_attribute("#picture", "src")), drawn.images[0])
    assert view.locator("#film button").count() == 6

    # The explorer shows the last timestep of the deepest layer; then the first of the other, as the routing says.
    sums = view.eval_on_selector_all(".multiples button", "all => all.map(b => +b.dataset.sum)")
    assert sums == drawn.maps.counts[:, :, 0].sum((-1, -2)).T.flatten().tolist()
    view.locator("#film button").first.focus()
    view.keyboard.press("Enter")
    assert view.locator("#time").input_value() == "0"
    view.locator("[data-set=layer]").fill("0")
    view.locator(".map").focus()
    view.keyboard.press("ArrowRight")
    told = view.locator(".patch").inner_text()
    side = drawn.maps.counts.shape[-1]
    row, column = map(int, re.search(r"row (\d+), column (\d+)", told).groups())
    who = np.flatnonzero(drawn.maps.experts_at(0, layer=0, image=0)[row - 1, column - 1]) + 1
    assert (f"({', '.join(map(str, who))})" if len(who) else "goes on unchanged") in told
    assert 1 <= row <= side
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shot(view, "play-phone" if phone else "play")
    window.fine()


def test_knobs_draw_anew_and_words_unknown_are_shown(ground: Any, run: str, look: Callable[..., Any]) -> None:
    _, served = ground
    view = (window := look(served.url)).page
    view.click("[data-prompt]")
    view.get_by_text("drawn in").wait_for(timeout=30_000)
    first = view.get_attribute("#picture", "src")
    view.click("#other")
    view.wait_for_function("src => picture.src !== src && !save.hidden", arg=first)
    seed = open_run(run).config.sample.seed + 1
    wanted = open_run(run, device="cpu").draw(PROMPT, seed=seed).images[0]
    np.testing.assert_array_equal(decoded(view.get_attribute("#picture", "src")), wanted)
    assert not view.locator("#unknown").is_visible()
    view.fill("textarea", "a mauve circle")
    view.click("button.main")
    view.get_by_text("No training caption had “mauve”").wait_for(timeout=30_000)
    window.fine()


def test_a_dense_run_has_pictures_and_no_map(tiny_shards: Any, tmp_path: Path, look: Callable[..., Any]) -> None:
    for _, served in serve(trained(tmp_path, tiny_shards, "moe=dense")):
        view = (window := look(served.url)).page
        view.click("button.main")
        view.get_by_text("drawn in").wait_for(timeout=30_000)
        assert view.locator("#film button").count() == 6
        assert view.locator(".explorer").count() == 0
        window.fine()


def test_a_page_whose_server_has_ended_says_so(run: str, look: Callable[..., Any]) -> None:
    going = serve(run)
    _, served = next(going)
    view = look(served.url).page
    assert next(going, None) is None
    view.click("button.main")
    view.get_by_text("ecdit play has ended").wait_for()
