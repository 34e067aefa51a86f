"""The section `data`: shards, which of their samples are used, and how they are read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ecdit_train.config.slots import DecoderConfig, StagesConfig


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set of a mixture."""

    shards: str
    """As `data.shards`, of this source."""
    weight: float
    """Its samples are this share of all, over the sum of all weights; exact where they are short decimals."""
    keep: tuple[str, ...] = ()
    """As `data.keep`, of this source."""
    manifest: str | None = None
    """As `data.manifest`, of this source."""


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """Samples that are trained on at a height and width of their own."""

    samples: str
    """File that names them (`ecdit data buckets`, or any that `data.keep` takes)."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Shards and how they are read."""

    shards: str
    """Folder with tars, indexes and manifest.json (`ecdit data` writes it), or `https://HOST/SET`, `s3://BUCKET/SET`:
    the credentials and the endpoint of a bucket come from the environment (AWS_*) or the files of the AWS tools. Not
    read where there are `sources`."""
    sources: Mapping[str, SourceConfig]
    """Data sets that are mixed, by name: {photos: {shards: FOLDER, weight: 0.7}, art: {shards: FOLDER, weight:
    0.3}}; empty reads `shards`."""
    keep: tuple[str, ...]
    """Files that say which samples are used (`ecdit data keep`, filters, duplicates); of several, those that all of them keep."""
    take_down: tuple[str, ...]
    """Files of samples that are not to be delivered any more (`ecdit data takedown`); a resume may add some at the end."""
    manifest: str | None
    """Go on with a manifest that `ecdit data index` has replaced since: the first 12 digits of its
    fingerprint. null: the folder's."""
    order: Literal["exact", "streamed"]
    """exact: over indexed tars, resumed to the sample. streamed: `shards` are URLs of tars that nobody has indexed,
    with braces as in `https://HOST/{000..239}.tar`, read from the front by webdataset; at least once: a resume sees a
    part of its last shards again."""
    shuffle: int
    """Samples in the buffer of a stream, from which each is drawn; read only with `order: streamed`."""
    allow_pipe: bool
    """Whether `shards` may be `pipe:COMMAND`, which runs the command; read only with `order: streamed`."""
    buckets: Mapping[str, BucketConfig]
    """Heights and widths of pictures, by name: {wide: {samples: FILE, height: 192, width: 320}, ...}; every global batch
    is of one. Each must leave the mask as many patches as the square of `resolution` has. Empty: all are that square."""
    resolution: int
    """Side of the square training image, pixels."""
    threads: int
    """Decoding threads per rank."""
    prefetch: int
    """Global steps decoded ahead of the one being trained."""
    on_bad: Literal["fail", "substitute"]
    """An undecodable sample stops the run (fail) or is replaced by a good one and counted (substitute)."""
    max_bad: float
    """Largest tolerated share of replaced samples."""
    captions: tuple[str, ...]
    """Where captions stand: `txt`, `json` (its key `caption`), `json:KEY`; empty takes txt, then json, where
    the shards have them."""
    caption_weights: tuple[float, ...]
    """One for each of `captions`: a sample with several has one drawn in each epoch; empty takes the first that it has."""
    no_caption: Literal["bad", "skip", "unconditional"]
    """A sample without a caption is bad (see `on_bad`), replaced by another and counted (skip), or trained on without text."""
    decoder: DecoderConfig
    """Files of pictures to pixels."""
    stages: StagesConfig
    """What of your own is done to each sample before that."""
    in_flight: int
    """Ranges of remote shards that a rank has under way at once; independent of `threads`."""
    read_budget: int
    """Bytes of remote shards that a rank has under way or keeps. Where all shards that it reads at once fit, each
    is fetched once and not by the sample."""
    read_retries: int
    """Requests after the first that failed, for one range of a remote shard."""
    read_deadline: float
    """Seconds for one range of a remote shard, all its requests together; then the run stops, to be started again where it was."""
    hedge_after: float | None
    """Seconds after which a range is asked for a second time and the first answer is taken; null learns it from the
    durations of late, 0 never asks twice."""

    @property
    def named(self) -> Mapping[str, SourceConfig]:
        """Indexed data sets that are read, by name: the sources, or the one of `shards`."""
        if self.order == "streamed":
            return {}
        one = SourceConfig(shards=self.shards, weight=1.0, keep=self.keep, manifest=self.manifest)
        return self.sources or {"data": one}
