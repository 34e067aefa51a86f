"""The report in a real browser, as its readers use it: on a desktop, on a phone, in the dark, by keys alone, on paper."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages_hands import set_range

from ecdit_train.observe.journal import read_records


def whole_width(page: Any) -> bool:
    """Nothing makes the page itself scroll sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_the_page_is_quiet_and_asks_nobody(url: str, look: Callable[..., Any]) -> None:
    for how in ({}, {"dark": True}, {"phone": True}, {"java_script_enabled": False}):
        opened = look(url, **how)
        assert opened.page.title() == "demo"
        assert whole_width(opened.page)
        opened.fine()


# --- charts ----------------------------------------------------------------------------------------------------------


def x_ticks(page: Any) -> list[str]:
    return list(page.locator("#chart-loss svg text[text-anchor=middle]").all_text_contents())


def test_a_chart_zooms_by_drag_and_wheel_and_shows_all_again(url: str, look: Callable[..., Any]) -> None:
    opened = look(url)
    page = opened.page
    box = page.locator("#chart-loss .plot").bounding_box()
    whole = x_ticks(page)
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.5 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], middle, steps=4)
    page.mouse.up()
    zoomed = x_ticks(page)
    assert zoomed != whole
    steps = [int(t.replace(",", "")) for t in zoomed]
    assert min(steps) > 440
    assert max(steps) < 740
    page.mouse.dblclick(box["x"] + 0.5 * box["width"], middle)
    assert x_ticks(page) == whole
    scrolled = page.evaluate("scrollY")
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_function("!document.querySelector('#chart-loss [data-do=reset]').hidden")
    assert x_ticks(page) != whole
    assert page.evaluate("scrollY") == scrolled
    page.get_by_role("button", name="Loss: whole curve").click()
    assert x_ticks(page) == whole
    opened.fine()


def test_keys_read_every_value_of_the_log(run: Path, url: str, look: Callable[..., Any]) -> None:
    """Arrows go from record to record; what is read is what the log says."""
    records = read_records(run)
    opened = look(url)
    page = opened.page
    page.evaluate("document.querySelector('#chart-loss .plot').focus()")
    page.keyboard.press("End")
    for back in range(3):
        record = records[-1 - back]
        said = page.locator("#chart-loss .legend").inner_text()
        assert f"step {record['step']:,}" in said
        raw = float(re.search(r"\(([\d.e-]+)\)", said)[1])
        assert raw == pytest.approx(record["train/loss"], rel=1e-3)
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("Home")
    assert "step 10" in page.locator("#chart-loss .legend output").inner_text()
    assert "training" in page.locator("#chart-loss .legend output .unseen").text_content()  # for those who hear it
    before = x_ticks(page)
    page.keyboard.press("+")
    assert x_ticks(page) != before
    page.keyboard.press("0")
    assert x_ticks(page) == before
    scale = page.locator("#chart-loss .scale")
    logarithmic = "log" in scale.inner_text()
    page.keyboard.press("l")
    assert ("log" in scale.inner_text()) is not logarithmic
    opened.fine()


def test_axis_smoothing_and_curves_can_be_chosen(url: str, look: Callable[..., Any]) -> None:
    opened = look(url)
    page = opened.page
    assert page.locator("#chart-loss svg path").count() == 2  # the mean and the records
    strong = page.locator("#chart-loss path.curve").get_attribute("d")
    set_range(page, "#smoothing", 0)
    assert page.locator("#chart-loss svg path").count() == 1
    assert page.locator("#chart-loss path.curve").get_attribute("d") != strong
    assert page.locator("#smoothing").get_attribute("aria-valuetext") == "none"
    page.locator("#x-axis").select_option("images")
    assert "images" in page.locator("#chart-loss .plot").text_content()
    assert x_ticks(page)[-1].replace(",", "") == "60000"  # 64 an update
    page.locator("#x-axis").select_option("time")
    assert "hours" in page.locator("#chart-loss .plot").text_content()
    largest = page.locator("#chart-gradient-norm .legend button").nth(1)
    assert page.locator("#chart-gradient-norm path.curve").count() == 2
    largest.click()
    assert largest.get_attribute("aria-pressed") == "false"
    assert page.locator("#chart-gradient-norm path.curve").count() == 1
    opened.fine()


def test_two_fingers_zoom_a_chart(url: str, look: Callable[..., Any]) -> None:
    opened = look(url, phone=True)
    page = opened.page
    box = page.locator("#chart-loss .plot").bounding_box()
    y = box["y"] + box["height"] / 2
    whole = x_ticks(page)
    fingers = page.context.new_cdp_session(page)

    def touch(kind: str, *xs: float) -> None:
        points = [{"x": box["x"] + x * box["width"], "y": y, "id": n} for n, x in enumerate(xs)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 0.5, 0.6)
    for spread in (0.02, 0.05, 0.1, 0.15):
        touch("touchMove", 0.5 - spread, 0.6 + spread)
    touch("touchEnd")
    assert not page.locator("#chart-loss [data-do=reset]").is_hidden()
    assert x_ticks(page) != whole
    assert page.evaluate("visualViewport.scale") == 1  # the page itself stays
    opened.fine()


# --- samples, sections, colours ------------------------------------------------------------------------------------


def test_samples_follow_the_slider_with_their_prompts(url: str, look: Callable[..., Any]) -> None:
    page = look(url).page
    slider = page.get_by_role("slider", name="training step").first
    shown = page.locator(".slide.on")
    assert "step 1,000" in shown.inner_text()
    assert "a red circle" in shown.inner_text()
    slider.focus()
    page.keyboard.press("Home")
    assert shown.count() == 1
    assert "step 166" in shown.inner_text()
    assert slider.get_attribute("aria-valuetext") == "step 166"
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.querySelector('.slide.on').dataset.label === 'step 333'")


def contrast(page: Any, selector: str) -> float:
    """Of a text against the page (WCAG)."""
    colors = page.eval_on_selector(
        selector,
        """text => { let box = text; while (getComputedStyle(box).backgroundColor === 'rgba(0, 0, 0, 0)') box = box.parentElement;
        return [getComputedStyle(text).color, getComputedStyle(box).backgroundColor]; }""",
    )
    light = []
    for color in colors:
        r, g, b = (int(c) / 255 for c in re.findall(r"\d+", color)[:3])
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b)]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_dark_follows_the_system_and_the_switch(url: str, look: Callable[..., Any]) -> None:
    def ground(page: Any) -> int:
        return int(re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])

    for dark in (False, True):
        page = look(url, dark=dark).page
        assert (ground(page) < 40) is dark
        for text in ("h1", ".lead", ".note", ".tile span", ".legend button", ".places a", ".about summary"):
            assert contrast(page, text) >= 4.5, (text, dark)
        page.get_by_role("button", name="colours").click()  # light
        assert ground(page) > 200
        page.get_by_role("button", name="colours").click()  # dark
        assert ground(page) < 40
        page.reload()
        assert ground(page) < 40


def test_a_phone_sees_every_column_and_a_short_page(url: str, look: Callable[..., Any]) -> None:
    opened = look(url, phone=True)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollHeight") < 4000
    page.locator("#values > summary").click()
    question = page.get_by_text("Is it learning?").last
    box = question.bounding_box()
    assert 0 <= box["x"] <= box["x"] + box["width"] <= 390
    for section in ("explorer", "routing", "speed", "evaluation", "configuration"):
        page.locator(f"#{section} > summary").click()
    assert whole_width(page)
    page.locator("#explorer").scroll_into_view_if_needed()
    page.locator(".map canvas").tap()
    assert "Patch at row 5, column 5" in page.locator(".patch").inner_text()
    opened.fine()


def test_keys_alone_reach_everything(url: str, look: Callable[..., Any]) -> None:
    page = look(url).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    seen, hidden = set(), []
    for _ in range(300):
        page.keyboard.press("Tab")
        name, outline, width = page.evaluate(
            """() => { const at = document.activeElement, style = getComputedStyle(at), box = at.getBoundingClientRect();
            return [at.id || at.className || at.dataset.set || at.tagName, style.outlineStyle, box.width]; }"""
        )
        if name == "BODY":
            break
        seen.add(name)
        if outline == "none" or not width:
            hidden.append(name)
    assert hidden == []
    assert {"theme", "x-axis", "smoothing", "plot", "map", "step", "layer", "time", "opacity", "expert"} <= seen


def test_paper_shows_every_section_and_no_controls(url: str, look: Callable[..., Any]) -> None:
    page = look(url, dark=True).page
    page.locator("#speed > summary").click()
    page.emulate_media(media="print", color_scheme=None)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details.section:not([hidden])')].every(d => d.open)")
    for control in (".bar", ".sliders", ".slider", ".tools"):
        assert not page.locator(control).first.is_visible()
    assert page.locator(".still img").first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not page.evaluate("document.querySelector('#speed').open")
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF")
    pages = re.findall(rb"/Type\s*/Page\b", pdf + b"".join(_streams(pdf)))
    assert 3 <= len(pages) <= 16


def _streams(pdf: bytes) -> list[bytes]:
    found = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, flags=re.DOTALL):
        try:
            found.append(zlib.decompress(stream))
        except zlib.error:
            continue
    return found
