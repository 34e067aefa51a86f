"""The data sets that a configuration names, opened. Imports no torch."""

from __future__ import annotations

from data_pipeline.sources import DataSet, Named, SizeNamed, open_data
from ecdit_train.config.data_schema import DataConfig


def open_sources(config: DataConfig, *, check_files: bool) -> DataSet:
    """Raises what `data_pipeline.sources.open_data` raises."""
    return open_data(
        {
            name: Named(shards=one.shards, weight=one.weight, keep=one.keep, manifest=one.manifest)
            for name, one in config.named.items()
        },
        take_down=config.take_down,
        buckets={
            name: SizeNamed(samples=one.samples, height=one.height, width=one.width)
            for name, one in config.buckets.items()
        },
        check_files=check_files,
    )
