"""`ecdit data keep` and `takedown`: which samples of a data set are used, as files that a run names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecdit_train import errors


def declare(verb: Callable[..., argparse.ArgumentParser], group: Any) -> None:
    """The words of both."""
    p = verb(
        "keep",
        data_keep,
        "write which samples of a data set a run uses; the run names the file in data.keep\n\n"
        "  ecdit data keep data/images --keys good.txt --out good.keep\n"
        "  ecdit data keep data/images --drop-keys copies.txt --out once.keep",
        parent=group,
    )
    p.add_argument("folder")
    which = p.add_mutually_exclusive_group(required=True)
    lines = "one key on each line, or SHARD, a tab and a key"
    which.add_argument("--keys", metavar="FILE", help=f"the samples to use: {lines}")
    which.add_argument("--drop-keys", metavar="FILE", help=f"those not to use, all others are: {lines}")
    _declare_out(p, "why, for people")
    p = verb(
        "takedown",
        data_takedown,
        "write which samples must not be delivered any more; a run that goes on names it in data.take_down, behind older ones\n\n"
        "  ecdit data takedown data/images --keys asked.txt --out asked.down\n"
        "  ecdit train run=runs/mine 'data.take_down=[asked.down]'",
        parent=group,
    )
    p.add_argument("folder")
    p.add_argument("--keys", metavar="FILE", required=True, help=lines)
    _declare_out(p, "who asked for it, for people")


def _declare_out(p: argparse.ArgumentParser, meaning: str) -> None:
    p.add_argument("--out", metavar="FILE", required=True, help="the file to write; a bit for each sample")
    p.add_argument("--reason", metavar="TEXT", help=f"{meaning}; by default the name of the list")
    p.add_argument("--manifest", metavar="DIGITS", help="of a manifest that was replaced since, as data.manifest")


def data_keep(args: argparse.Namespace) -> int:
    from data_pipeline import keys, views
    from data_pipeline.manifest import open_view

    view = open_view(args.folder, which=args.manifest)
    path = Path(args.keys or args.drop_keys)
    named = keys.find(view, keys.read_list(path))
    mask = named.mask if args.keys else ~named.mask
    made = views.write_keep(view, mask, reason=args.reason or path.name, out=args.out)
    print(f"{args.out}: {made.num_set:,} of {view.num_samples:,} samples are kept")
    _say_unknown(named, view)
    return errors.EXIT_OK


def data_takedown(args: argparse.Namespace) -> int:
    from data_pipeline import keys, taken
    from data_pipeline.manifest import open_view

    view = open_view(args.folder, which=args.manifest)
    named = keys.find(view, keys.read_list(Path(args.keys)))
    made = taken.write_take_down(view, named.mask, reason=args.reason or Path(args.keys).name, out=args.out)
    print(f"{args.out}: {made.num_set:,} of {view.num_samples:,} samples are taken down")
    _say_unknown(named, view)
    return errors.EXIT_OK


def _say_unknown(named: Any, view: Any) -> None:
    from data_pipeline import keys

    if named.unknown:
        print(f"not in {view.place}: {len(named.unknown):,} keys: {keys.shown(named.unknown)}")
