"""One of several processes that share the work on a data set: part 2 of 4 takes every fourth shard, from the second on.

Parts know nothing of each other. The one that finds all shards finished writes the manifest; two that find it write the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Part:
    """`number` (from 1) of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Of `2/4`. Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"{text!r} is no part: must be I/N with 1 <= I <= N, as 2/4")
        return cls(number=int(match[1]), of=int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Every `of`-th item; may be none."""
        return items[self.number - 1 :: self.of]
