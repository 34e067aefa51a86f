"""Routing maps as the explorer of a page takes them: who took which patch, a bit each, within a bound on their size."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecdit_train import run_folder as folder
from ecdit_train.errors import RunFolderError

from .figures import small_picture
from .routing import RoutingMaps

logger = logging.getLogger("ecdit.observe")

MAX_BYTES = 3_000_000
"""Of all maps of a page, as base64."""
MAX_STEPS, MAX_PROMPTS = 12, 8


def pack(run: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any] | None:
    """`steps`, one entry for each embedded file, and `note`, what was left out and where it lies. None without a sound file.

    The newest file sets how many prompts fit into half of the bound; earlier files share what is left.
    """
    found = folder.by_step(run / folder.ROUTING, suffix=".npz")
    newest = None
    while found and newest is None:
        newest = _load(found[-1][1])
        if newest is None:
            found = found[:-1]
    if newest is None:
        return None
    room = max_bytes * 3 // 4  # base64 makes 4 bytes of 3
    cost = _cost(newest)
    prompts = min(len(newest.prompts), MAX_PROMPTS, max(1, room // 2 // cost))
    times = evenly(
        range(len(newest.timesteps)), max(1, min(len(newest.timesteps), room * len(newest.timesteps) // cost))
    )
    steps = min(len(found), MAX_STEPS, max(1, room // (cost * prompts)))
    entries = []
    for _, path in [*evenly(found[:-1], steps - 1), found[-1]] if steps > 1 else found[-1:]:
        maps = newest if path == found[-1][1] else _load(path)
        if maps is not None:
            shared = times if len(maps.timesteps) == len(newest.timesteps) else range(len(maps.timesteps))
            entries.append(_entry(maps, prompts=min(prompts, len(maps.prompts)), times=list(shared)))
    return {
        "steps": entries,
        "note": _note(newest, prompts=prompts, times=len(times), steps=len(entries), of=len(found)),
    }


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them in order, first and last included (the last alone, of one)."""
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return list(items[-1:]) if most else []
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _load(path: Path) -> RoutingMaps | None:
    try:
        return RoutingMaps.load(path)
    except RunFolderError as error:
        logger.warning("left out of the report: %s", error)
        return None


def _cost(maps: RoutingMaps) -> int:
    """Bytes of one picture."""
    T, L, _, side, _ = maps.counts.shape
    return int(T * L * side * side * (1 if maps.chosen is None else maps.chosen.shape[-1]))


def _entry(maps: RoutingMaps, *, prompts: int, times: list[int]) -> dict[str, Any]:
    """Arrays lie as (B, T, L, side, side, bytes), so that a picture's are together."""

    def packed(values: np.ndarray) -> str:
        return base64.b64encode(
            np.ascontiguousarray(np.moveaxis(values[times][:, :, :prompts], 2, 0)).tobytes()
        ).decode()

    return {
        "step": maps.step,
        "experts": maps.experts,
        "budget": maps.capacity_factor,
        "caption": maps.caption(),
        "side": maps.counts.shape[-1],
        "timesteps": [round(float(maps.timesteps[t]), 4) for t in times],
        "layers": list(maps.layers),
        "prompts": list(maps.prompts[:prompts]),
        "pictures": [small_picture(maps.images[b]) for b in range(prompts)],
        "chosen": None if maps.chosen is None else packed(maps.chosen),
        "counts": None if _bits_count(maps) else packed(maps.counts),
    }


def _bits_count(maps: RoutingMaps) -> bool:
    """Whether the counts can be had from the bits."""
    return maps.chosen is not None and bool((np.bitwise_count(maps.chosen).sum(-1) == maps.counts).all())


def _note(maps: RoutingMaps, *, prompts: int, times: int, steps: int, of: int) -> str:
    parts = [
        f"{have} of {there} {what}"
        for have, there, what in (
            (prompts, len(maps.prompts), "prompts"),
            (times, len(maps.timesteps), "timesteps"),
            (steps, of, "saved steps"),
        )
        if have < there
    ]
    kept = f"Embedded here: {', '.join(parts)}; all of them are in the run's {folder.ROUTING} folder. " if parts else ""
    named = "" if maps.chosen is not None else "These maps count experts but do not name them: a newer run's do. "
    return kept + named
