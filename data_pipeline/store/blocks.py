"""Which ranges to fetch, in which order, and what may be dropped: a byte budget and a queue, without a clock or a network.

A block is one range of one shard. Samples that are read soon want it; a thread that needs it now waits for it. What is
planned starts in the order of the plan while the budget has room; what a thread waits for goes first and may push out blocks
that are only wanted. So some block that is waited for is always under way or here, however small the budget is.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

State = Literal["planned", "under_way", "here", "dropped"]


@dataclass(eq=False, slots=True, kw_only=True)
class Block:
    """`length` bytes of a shard from `start` on."""

    shard: int
    start: int
    length: int
    state: State = "planned"
    wants: int = 0
    """Reads that were planned and have not come."""
    waiting: int = 0
    """Threads that are about to copy from it."""
    unread: int = 0
    """Bytes that no read has taken yet."""
    demanded: bool = False
    content: Future[bytearray] = field(default_factory=Future)


class Blocks:
    """Not thread-safe: its owner holds a lock.

    Args:
        budget: bytes, of what is under way and what is here.
        in_flight: blocks under way.
        keep: a block stays until each byte of it has been read (or room is needed); else until nobody wants it.
    """

    def __init__(self, *, budget: int, in_flight: int, keep: bool) -> None:
        self._budget, self._in_flight, self._keep = budget, in_flight, keep
        self._known: dict[tuple[int, int, int], Block] = {}
        self._planned: deque[Block] = deque()
        self._demanded: deque[Block] = deque()
        self._here: OrderedDict[Block, None] = OrderedDict()
        self._under_way = 0
        self.held = self.most_held = 0

    def want(self, shard: int, *, start: int, length: int) -> Block:
        """The block, planned if nobody has; one more read will come for it."""
        block = self._find(shard, start, length)
        block.wants += 1
        return block

    def demand(self, shard: int, *, start: int, length: int) -> Block:
        """The block for a thread that waits for it now; `taken` follows."""
        block = self._find(shard, start, length)
        block.waiting += 1
        if block.state == "planned" and not block.demanded:
            block.demanded = True
            self._demanded.append(block)
        return block

    def taken(self, block: Block, *, num_bytes: int, wanted: bool) -> None:
        """A thread has copied its bytes, or has given up."""
        block.waiting -= 1
        block.wants -= wanted and block.wants > 0
        block.unread -= num_bytes
        if block.state == "here":
            self._here.move_to_end(block)
            if not block.wants and not block.waiting and (block.unread <= 0 or not self._keep):
                self._drop(block)

    def to_start(self) -> Iterator[Block]:
        """Blocks that may start now; each counts as under way from here on."""
        while self._under_way < self._in_flight and (block := self._next()) is not None:
            if not self._room(block):
                return
            (self._demanded if block.demanded else self._planned).popleft()
            block.state = "under_way"
            self._under_way += 1
            self.held += block.length
            self.most_held = max(self.most_held, self.held)
            yield block

    def came(self, block: Block) -> None:
        """Its bytes are here."""
        self._under_way -= 1
        block.state = "here"
        self._here[block] = None

    def failed(self, block: Block) -> None:
        """Its bytes did not come: the next who needs it asks anew."""
        self._under_way -= 1
        self._drop(block)

    def forget(self) -> None:
        """Nothing of what was planned will be read. What is here stays until room is needed."""
        for block in list(self._known.values()):
            block.wants = 0
            if block.state == "planned" and not block.waiting:
                self._drop(block)

    def end(self) -> list[Block]:
        """Nothing more will come: those that threads may wait for."""
        return [block for block in self._known.values() if block.state in ("planned", "under_way")]

    def _find(self, shard: int, start: int, length: int) -> Block:
        block = self._known.get((shard, start, length))
        if block is None:
            block = Block(shard=shard, start=start, length=length, unread=length)
            self._known[shard, start, length] = block
            self._planned.append(block)
        return block

    def _next(self) -> Block | None:
        for queue in (self._demanded, self._planned):
            while queue:
                block = queue[0]
                if block.state == "planned" and (block.demanded is (queue is self._demanded)):
                    return block
                queue.popleft()
        return None

    def _room(self, block: Block) -> bool:
        """Drop what nobody wants, the longest unused first; for a thread that waits, also what is wanted later, the last first."""
        while self.held and self.held + block.length > self._budget:
            free = next((b for b in self._here if not b.waiting and not b.wants), None)
            if free is None and block.demanded:
                free = next((b for b in reversed(self._here) if not b.waiting), None)
            if free is None:
                return False
            self._drop(free)
        return True

    def _drop(self, block: Block) -> None:
        if block.state != "planned":
            self.held -= block.length
        if block.state == "here":
            del self._here[block]
            block.content = Future()  # nobody waits for it; who planned to read it may still hold the block
        block.state = "dropped"
        if self._known.get(key := (block.shard, block.start, block.length)) is block:
            del self._known[key]
