"""Words of the verbs that make data (`ecdit data ...`), read by `arguments`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ecdit_train.arguments import word

if TYPE_CHECKING:
    Task = str  # `arguments.types` puts the six names in its place


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What `ecdit data shapes` makes."""

    out: str = word("FOLDER")
    count: int = word("N", least=1, default=4000)
    resolution: int = word("PIXELS", least=1, default=32)
    seed: int = word("N", least=0, default=0)
    per_shard: int = word("N", least=1, default=500)
    mix: dict[Task, float] | None = word("{task: weight, ...}", default=None)  # noqa: RUF009 - it is `field`
    """None: all six alike."""
    scale: tuple[float, float] = word("[LOW,HIGH]", default=(0.2, 0.35))
    format: Literal["png", "jpg"] = word("png|jpg", default="png")


@dataclass(frozen=True, kw_only=True)
class Pack:
    """What `ecdit data pack` makes of pictures."""

    resolution: int = word("PIXELS", least=1, default=256)
    crop: Literal["centre", "none"] = word("centre|none", default="centre")
    least: int | None = word("PIXELS", least=1, default=None)
    """Of the shorter side; None: the resolution, so that nothing is enlarged."""
    aspect: float = word("RATIO", default=3.0)
    quality: int = word("1..100", least=1, default=95)
    captions: tuple[str, ...] = word("[txt,json,json:KEY,...]", default=("txt", "json"))
    no_caption: Literal["reject", "keep"] = word("reject|keep", default="reject")
    form: Literal["set", "tars", "parquet", "files"] | None = word("set|tars|parquet|files", default=None)
    """None: by what lies there."""
    table: str | None = word("FILE", default=None)
    per_shard: int = word("N", least=1, default=1000)
    """Of pictures in folders; other forms keep their shards."""
    workers: int = word("N", least=1, default=1)
    runner: Literal["local", "ray"] = word("local|ray", default="local")


@dataclass(frozen=True, kw_only=True)
class Encode:
    """What `ecdit data encode` makes by the encoders of a configuration."""

    batch: int = word("N", least=1, default=32)
    latents: bool = word("true|false", default=True)
    text: bool = word("true|false", default=True)
    device: Literal["auto", "cpu", "cuda"] = word("auto|cpu|cuda", default="auto")
    threads: int = word("N", least=1, default=2)
    """That decode, of one worker."""
    workers: int = word("N", least=1, default=1)
    runner: Literal["local", "ray"] = word("local|ray", default="local")
    actors: int = word("N", least=1, default=1)
    """Of runner=ray: encoders, each on a GPU where there are some."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Where `ecdit data filter` writes, and how the tables that it asks are made."""

    out: str = word("FILE")
    """The keep-bitmap, for `data.keep`."""
    tables: str | None = word("FOLDER", default=None)
    """None: `tables` inside of the data set."""
    workers: int = word("N", least=1, default=1)
    runner: Literal["local", "ray"] = word("local|ray", default="local")


@dataclass(frozen=True, kw_only=True)
class Dedup(Filter):
    """What `ecdit data dedup` takes for duplicates."""

    distance: int = word("BITS", least=-1, default=4)
    """In which fingerprints of 64 bits may differ; -1: equal pixels only."""


@dataclass(frozen=True, kw_only=True)
class Buckets(Filter):
    """Among which sizes `ecdit data buckets` shares out a data set."""

    sizes: tuple[str, ...] = word("[HEIGHTxWIDTH,...]")
    least: int = word("N", least=1, default=1)
    """Samples that a size must have; those of a smaller one go to the nearest of the others."""
    out: str = word("FOLDER")
    """Where the lists of samples are written, one for each size."""


@dataclass(frozen=True, kw_only=True)
class Report(Dedup):
    """What `ecdit data report` shows."""

    out: str | None = word("FILE", default=None)  # type: ignore[assignment]
    """None: `report.html` inside of the data set."""
