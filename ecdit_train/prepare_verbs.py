"""`ecdit data pack`: pictures of any form become shards of ours. Each verb is one call of `data_pipeline.preparing`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecdit_train import arguments, errors
from ecdit_train.submit_verbs import declare_part

PACK = """make shards of pictures and captions: WebDataset tars, img2dataset's output, or folders; every one that is not taken is counted

  ecdit data pack downloads data/images resolution=256 workers=8
  ecdit submit cluster=h100_ib400 --array 32 data pack downloads data/images resolution=256 workers=16"""


def declare(verb: Callable[..., argparse.ArgumentParser], group: Any) -> None:
    """The words of these verbs."""
    p = verb("pack", data_pack, PACK, parent=group)
    p.add_argument(
        "source", metavar="IN", help="a folder: tars, parquet, pictures with captions beside them or in a table"
    )
    p.add_argument("out", metavar="OUT")
    p.add_argument("words", nargs="*", metavar="WORD", help=arguments.forms(arguments.Pack))
    declare_part(p)


def data_pack(args: argparse.Namespace) -> int:
    from data_pipeline.preparing.pack import PackRule, pack
    from data_pipeline.preparing.progress import watch
    from data_pipeline.preparing.sources import find

    asked = arguments.read(arguments.Pack, args.words, alone=True).build(arguments.Pack)
    rule = PackRule(
        resolution=asked.resolution, crop=asked.crop, least=asked.least, most_aspect=asked.aspect, quality=asked.quality,
        captions=asked.captions, no_caption=asked.no_caption,
    )  # fmt: skip
    packed = pack(
        find(args.source, form=asked.form, table=asked.table, per_shard=asked.per_shard), Path(args.out), rule=rule,
        runner=_runner(asked.runner, workers=asked.workers), part=args.part, watch=watch("pack"),
    )  # fmt: skip
    return _say(packed.done, packed.view, args)


def _runner(name: str, *, workers: int) -> Any:
    if name == "ray":
        from data_pipeline.preparing.on_ray import OnRay

        return OnRay(workers=workers)
    from data_pipeline.preparing.local import Local

    return Local(workers=workers)


def _say(done: Any, view: Any, args: argparse.Namespace) -> int:
    if args.part is not None:
        more = (
            "" if view is not None else f"; {done.of - len(done.records)} shards are still in the hands of other parts"
        )
        print(f"part {args.part}: done{more}")
    if view is not None:
        print("\n".join([*done.lines(), f"{args.out}: {view.sha256[:12]}"]))
    return errors.EXIT_OK
