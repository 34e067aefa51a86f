"""Ranks of a stream as real processes, killed with SIGKILL and resumed elsewhere: what tests of exactness run.

A *leg* is some ranks that read on from a place until they are killed. Every rank writes a line for each batch it was handed. What
a training would have kept at that moment is the last step that all ranks had; the next leg goes on from its state, on other
ranks and threads. In the end each position of the stream must have come once, with the bytes of an undisturbed process.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.contract import Batch
from data_pipeline.decoders import ImageDecoder
from data_pipeline.loader import StreamingLoader
from data_pipeline.sources import DataSet, Named, SizeNamed, open_data
from data_pipeline.stages import Stages

GLOBAL_BATCH = 16
RESOLUTION = 16
PACE = 0.004
"""Seconds that a rank rests between two batches: a kill must have something to hit."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What is read, and how: all of it can be sent to another process."""

    sources: tuple[tuple[str, Named], ...]
    take_down: tuple[str, ...] = ()
    buckets: tuple[tuple[str, SizeNamed], ...] = ()
    decoder: str = "plain"
    stages: bool = False
    seed: int = 11

    def data(self) -> DataSet:
        return open_data(dict(self.sources), take_down=self.take_down, buckets=dict(self.buckets))

    def open(self, *, rank: int = 0, world: int = 1, threads: int = 0) -> StreamingLoader:
        return StreamingLoader(
            self.data(), global_batch=GLOBAL_BATCH, rank=rank, world=world, seed=self.seed, resolution=RESOLUTION,
            threads=threads, on_bad="substitute", max_bad=1, decoder=_decoder(self.decoder),
            stages=Stages(_stages()) if self.stages else None,
        )  # fmt: skip


def _decoder(name: str) -> ImageDecoder | None:
    if name == "plain":
        return None
    from data_pipeline.dali import DaliDecoder

    return DaliDecoder(at_once=4)


def _stages() -> list[Any]:
    """As a user writes them: one that decodes, one that draws by position, one that leaves samples out."""
    import webdataset as wds

    def turn(sample: dict[str, Any]) -> dict[str, Any]:
        times = int(np.random.default_rng(sample["__position__"]).integers(4))
        return sample | {"jpg": np.ascontiguousarray(np.rot90(sample["jpg"], times))}

    return [wds.decode("rgb8"), wds.map(turn), wds.select(lambda sample: "7" not in sample["txt"])]


def digests(batch: Batch) -> list[int]:
    """A number for each sample: its key, caption and pixels."""
    assert batch.images is not None
    assert batch.captions is not None
    words = zip(batch.keys, batch.captions, batch.images, strict=True)
    return [zlib.crc32(image.tobytes(), zlib.crc32(f"{key}\n{text}".encode())) for key, text, image in words]


def undisturbed(stream: Stream, *, steps: int) -> list[int]:
    """Digests by position, by one process without threads."""
    loader = stream.open()
    found = [digest for batch in islice(loader, steps) for digest in digests(batch)]
    loader.close()
    return found


def _rank(
    stream: Stream, rank: int, world: int, threads: int, state: dict[str, Any] | None, steps: int, log: str
) -> None:
    loader = stream.open(rank=rank, world=world, threads=threads)
    if state is not None:
        loader.load_state_dict(state)
    with Path(log).open("w") as file:
        while loader.state_dict()["step"] < steps:
            batch = next(loader)
            line = {"position": batch.position.tolist(), "digest": digests(batch), "state": loader.state_dict()}
            file.write(json.dumps(line) + "\n")
            file.flush()
            time.sleep(PACE)
    loader.close()


@dataclass(kw_only=True)
class Trial:
    """Legs of one stream until `steps` are delivered.

    `change`: may give the stream another form between two legs (a take-down).
    """

    stream: Stream
    steps: int
    chance: random.Random
    folder: Path
    worlds: tuple[int, ...] = (1, 2, 4, 8)
    threads: tuple[int, ...] = (0, 1, 3)
    change: Callable[[Stream, int], Stream] = lambda stream, leg: stream
    found: dict[int, int] = field(default_factory=dict)
    changed_at: list[tuple[int, Stream]] = field(default_factory=list)
    legs: int = 0
    kills: int = 0
    largest_state: int = 0

    def run(self) -> None:
        state: dict[str, Any] | None = None
        step = 0
        while step < self.steps:
            stream = self.change(self.stream, self.legs)
            if stream != self.stream:
                self.changed_at.append((step, stream))
                self.stream = stream
            step, state = self._leg(step, state)
            self.legs += 1
            assert self.legs < 60, "no leg gets anywhere"

    def _leg(self, step: int, state: dict[str, Any] | None) -> tuple[int, dict[str, Any] | None]:
        world, threads = self.chance.choice(self.worlds), self.chance.choice(self.threads)
        logs = [self.folder / f"{self.legs}-{rank}.jsonl" for rank in range(world)]
        context = multiprocessing.get_context("forkserver")
        ranks = [
            context.Process(
                target=_rank, args=(self.stream, rank, world, threads, state, self.steps, str(log)), daemon=True
            )
            for rank, log in enumerate(logs)
        ]
        for rank in ranks:
            rank.start()
        last_leg = self.legs >= self.chance.randint(2, 5)
        if not last_leg:
            while any(rank.is_alive() for rank in ranks) and not all(
                log.exists() and log.stat().st_size for log in logs
            ):
                time.sleep(0.002)
            time.sleep(self.chance.uniform(0, 20 * PACE))
            for rank in ranks:
                if rank.is_alive():
                    rank.kill()
                    self.kills += 1
        for rank in ranks:
            rank.join(60)
            assert rank.exitcode in (0, -signal.SIGKILL), f"a rank ended with {rank.exitcode}"
        lines = [_lines(log) for log in logs]
        delivered = min(len(one) for one in lines)
        for one in lines:
            for line in one[:delivered]:
                for position, digest in zip(line["position"], line["digest"], strict=True):
                    assert position not in self.found, f"position {position} came twice"
                    self.found[position] = digest
        if not delivered:
            return step, state
        states = [one[delivered - 1]["state"] for one in lines]
        assert all(other == states[0] for other in states), "ranks differ in their place"
        self.largest_state = max(self.largest_state, len(json.dumps(states[0])))
        return step + delivered, states[0]


def _lines(log: Path) -> list[dict[str, Any]]:
    """Whole ones: the last may have been cut."""
    if not log.exists():
        return []
    text = log.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def with_take_down(stream: Stream, path: Path) -> Stream:
    return replace(stream, take_down=(*stream.take_down, str(path)))
