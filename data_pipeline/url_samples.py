"""Samples of one tar at a URL, from its front, by webdataset's readers. Importing this is cheap; reading imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.errors import BadMember, DataError, MissingShard
from data_pipeline.reader import RawSample
from data_pipeline.tar import split_name

PROBED = 64
"""Samples that are looked at to learn what a stream holds."""


def samples_of(url: str) -> Iterator[RawSample]:
    """Samples of one tar in its order, of what `tar.split_name` allows. Raises MissingShard where it cannot be read to its end."""
    import webdataset as wds

    def allowed(name: str) -> bool:
        try:
            split_name(name)
        except BadMember:
            return False
        return True

    try:
        for found in wds.tariterators.tarfile_samples([{"url": url}], select_files=allowed):
            fields = {name: memoryview(value) for name, value in found.items() if not name.startswith("__")}
            if fields:
                size = sum(len(value) for value in fields.values())
                yield RawSample(key=found["__key__"], fields=dict(fields), num_bytes=size)
    except Exception as error:
        words = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise MissingShard(f"{url} cannot be read to its end: {words}") from error


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What the first samples of some URLs hold."""

    samples: tuple[RawSample, ...]

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(name for raw in self.samples for name in raw.fields)


def probe(urls: Sequence[str], *, patient: bool) -> Probed:
    """The first samples of the first URL that has any; `patient`: one that breaks is passed over. Raises MissingShard."""
    last: DataError | None = None
    for url in urls:
        try:
            if found := list(_first(samples_of(url), PROBED)):
                return Probed(samples=tuple(found))
        except DataError as error:
            last = error
            if not patient:
                raise
    raise MissingShard(f"no sample in any of {len(urls)} URLs; last: {last or 'empty'}")


def _first(samples: Iterable[RawSample], count: int) -> Iterator[RawSample]:
    for number, sample in enumerate(samples, start=1):
        yield sample
        if number == count:
            return
