"""The routing explorer in a real browser: what it shows is what the run's files say."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages_hands import set_range

from ecdit_train import run_folder as folder
from ecdit_train.observe.report import write_report
from ecdit_train.observe.routing import RoutingMaps


@pytest.fixture(scope="module")
def maps(run: Path) -> RoutingMaps:
    """The newest, which the explorer starts with."""
    return RoutingMaps.load(folder.by_step(run / folder.ROUTING, suffix=".npz")[-1][1])


def numbers(page: Any) -> np.ndarray:
    """(side, side) of the open table below the map."""
    cells = page.eval_on_selector_all(
        ".numbers td + td, .numbers th + td", "cells => cells.map(c => Number(c.textContent))"
    )
    side = int(len(cells) ** 0.5)
    return np.array(cells).reshape(side, side)


def matrix(page: Any, which: int) -> np.ndarray:
    """(rows, E) of a matrix of a patch's experts."""
    return np.array(
        page.eval_on_selector(
            f".matrices > .scroll:nth-of-type({which + 1}) tbody",
            "body => [...body.rows].map(r => [...r.cells].slice(1, -1).map(c => Number(c.textContent || 0)))",
        )
    )


def test_counts_and_experts_are_those_of_the_file(url: str, maps: RoutingMaps, look: Callable[..., Any]) -> None:
    opened = look(url)
    page = opened.page
    page.locator(".numbers > summary").click()
    T, L = len(maps.timesteps), len(maps.layers)
    for b, t, layer, expert in (
        (0, 0, 0, None),
        (2, T - 1, 1, None),
        (1, 2, L - 1, 3),
        (3, T - 1, 0, maps.experts - 1),
    ):
        page.get_by_role("radio", name=maps.prompts[b]).click()
        set_range(page, "[data-set=time]", t)
        set_range(page, "[data-set=layer]", layer)
        page.locator("[data-set=expert]").select_option("" if expert is None else str(expert))
        taken = maps.experts_at(t, layer=layer, image=b)
        should = maps.counts[t, layer, b] if expert is None else taken[..., expert]
        np.testing.assert_array_equal(numbers(page), should)
        total = page.locator(".total").inner_text()
        assert f"Layer {maps.layers[layer]}, t = {maps.timesteps[t]:.2f}, step {maps.step:,}" in total
        if expert is None:
            assert f"{int(should.sum())} choices over {should.size} patches" in total
            assert f"{int((should == 0).sum())} (" in total
        else:
            assert f"expert {expert + 1} takes {int(should.sum())} of {should.size} patches" in total
            assert maps.prompts[b] in total
        sums = page.eval_on_selector_all(".multiples button", "all => all.map(b => Number(b.dataset.sum))")
        each = [
            maps.counts[n, m, b].sum() if expert is None else maps.experts_at(n, layer=m, image=b)[..., expert].sum()
            for m in range(L)
            for n in range(T)
        ]
        assert sums == each
    opened.fine()


def test_a_patch_shows_its_experts_over_time_and_training(
    run: Path, url: str, maps: RoutingMaps, look: Callable[..., Any]
) -> None:
    page = look(url).page
    set_range(page, "[data-set=time]", 1)
    set_range(page, "[data-set=layer]", 2)
    side = maps.counts.shape[-1]
    box = page.locator(".map canvas").bounding_box()
    cell = box["width"] / side
    page.locator(".map canvas").click(position={"x": 2.5 * cell, "y": 5.5 * cell})
    row, column = 5, 2
    found = np.flatnonzero(maps.experts_at(1, layer=2, image=0)[row, column])
    said = page.locator(".patch").inner_text()
    assert f"row {row + 1}, column {column + 1}" in said
    assert said.count("expert") >= 1
    assert [int(n) - 1 for n in re.findall(r"\d+", said.partition("(")[2])] == found.tolist()
    over_time = np.stack([maps.experts_at(t, layer=2, image=0)[row, column] for t in range(len(maps.timesteps))])
    np.testing.assert_array_equal(matrix(page, 0), over_time)
    files = [RoutingMaps.load(path) for _, path in folder.by_step(run / folder.ROUTING, suffix=".npz")]
    over_training = np.stack([m.experts_at(1, layer=2, image=0)[row, column] for m in files])
    np.testing.assert_array_equal(matrix(page, 1), over_training)
    page.locator(".map").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert f"row {row}, column {column + 2}" in page.locator(".patch").inner_text()
    page.keyboard.press("Escape")
    assert "Click a patch" in page.locator(".patch").inner_text()


def test_the_overlay_is_where_the_expert_works(url: str, maps: RoutingMaps, look: Callable[..., Any]) -> None:
    page = look(url).page
    set_range(page, "[data-set=opacity]", 100)
    set_range(page, "[data-set=time]", 4)
    set_range(page, "[data-set=layer]", 0)
    page.locator("[data-set=expert]").select_option("2")
    side = maps.counts.shape[-1]
    red = page.eval_on_selector(
        ".map canvas",
        """(canvas, side) => { const cell = canvas.width / side, context = canvas.getContext('2d');
        return Array.from({length: side * side}, (_, k) => {
          const [r, g] = context.getImageData((k % side + 0.5) * cell, (Math.floor(k / side) + 0.5) * cell, 1, 1).data;
          return r > 200 && g < 60; }); }""",
        side,
    )
    np.testing.assert_array_equal(np.array(red).reshape(side, side), maps.experts_at(4, layer=0, image=0)[..., 2])


def test_training_steps_can_be_chosen_and_small_maps_lead_there(run: Path, url: str, look: Callable[..., Any]) -> None:
    page = look(url).page
    first = RoutingMaps.load(folder.by_step(run / folder.ROUTING, suffix=".npz")[0][1])
    page.locator("[data-set=step]").focus()
    page.keyboard.press("Home")
    page.locator(".multiples button[data-at='1 3']").click()
    total = page.locator(".total").inner_text()
    assert f"Layer {first.layers[1]}, t = {first.timesteps[3]:.2f}, step {first.step:,}" in total
    assert f"{int(first.counts[3, 1, 0].sum())} choices" in total


def test_pictures_for_the_documents(url: str, look: Callable[..., Any], shot: Callable[..., None]) -> None:
    """They show a real run where one is named; the tests above hold for a made-up one."""
    real = os.environ.get("ECDIT_PICTURES_OF")
    shown = write_report(Path(real)).as_uri() if real else url
    for name, how in (("", {}), ("-dark", {"dark": True}), ("-phone", {"phone": True})):
        page = look(shown, **how).page
        if name != "-dark":
            shot(page, f"report{name}")
        page.add_style_tag(content=".bar { position: static !important; }")
        page.eval_on_selector("#explorer", "section => { section.open = true; }")
        page.locator(".map").focus()
        page.keyboard.press("ArrowLeft")
        assert "expert" in page.locator(".patch").inner_text()
        page.evaluate("document.activeElement.blur()")
        if name != "-phone":
            shot(page.locator("#explorer"), f"explorer{name}")
        if not name:
            page.locator("[data-set=expert]").select_option("3")
            shot(page.locator("#explorer"), "explorer-expert")
