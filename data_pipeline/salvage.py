"""A damaged tar's whole samples, written into a new one."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.commit import commit, temporary_sibling
from data_pipeline.errors import BadSplit
from data_pipeline.index import scan
from data_pipeline.tally import Tally
from data_pipeline.tar import BLOCK, RECORD


def salvage(tar: Path, *, out: Path) -> Tally:
    """Copies the samples that `index.scan` calls whole, byte by byte, to a tar of the same name in `out`; says what is left behind.

    Raises:
        DataError: what `scan` raises.
        BadSplit: `out` is where the tar lies: it would be replaced.
    """
    target = out / tar.name
    if out.resolve() == tar.parent.resolve():
        raise BadSplit(f"{out} holds {tar.name} itself, and a tar is never replaced; choose another folder")
    scanned = scan(tar)
    out.mkdir(parents=True, exist_ok=True)
    part = temporary_sibling(target)
    try:
        with tar.open("rb") as source, part.open("wb") as new:
            for sample in range(len(scanned.index)):
                start, size = scanned.index.span(sample)
                source.seek(start)
                new.write(source.read(size))
            end = new.tell() + 2 * BLOCK
            new.write(bytes(2 * BLOCK + -end % RECORD))
        commit(part, target)
    finally:
        part.unlink(missing_ok=True)
    return Tally.of(scanned.found)
