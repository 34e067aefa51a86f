"""`ecdit data pack|encode|filter|dedup|report`: a data set is prepared. Each verb is one call of `data_pipeline.preparing`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecdit_train import arguments, errors
from ecdit_train.errors import ConfigError
from ecdit_train.submit_verbs import declare_part

PACK = """make shards of pictures and captions: WebDataset tars, img2dataset's output, or folders; what is not taken is counted

  ecdit data pack downloads data/images resolution=256 workers=8
  ecdit submit cluster=h100_ib400 --array 32 data pack downloads data/images resolution=256 workers=16"""


ENCODE = """run frozen encoders once: latents (the mean, unscaled) and text embeddings (real tokens), float16, beside captions

  ecdit data encode data/images data/latents experiment=ec_dit_xl_8e workers=8
  ecdit data encode data/images data/latents experiment=ec_dit_xl_8e text=false runner=ray workers=64 actors=8"""


def declare(verb: Callable[..., argparse.ArgumentParser], group: Any) -> None:
    """The words of these verbs."""
    p = verb("pack", data_pack, PACK, parent=group)
    p.add_argument(
        "source", metavar="IN", help="a folder: tars, parquet, pictures with captions beside them or in a table"
    )
    p.add_argument("out", metavar="OUT")
    p.add_argument("words", nargs="*", metavar="WORD", help=arguments.forms(arguments.Pack))
    declare_part(p)
    p = verb("encode", data_encode, ENCODE, parent=group)
    p.add_argument("source", metavar="IN", help="a data set, or anything that `pack` takes")
    p.add_argument("out", metavar="OUT")
    p.add_argument(
        "words",
        nargs="+",
        metavar="WORD",
        help=f"{arguments.forms(arguments.Encode)}; any other word is about the configuration whose encoders run",
    )
    p.add_argument("--config-dir", metavar="DIR", help="your own configuration and modules")
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


def data_encode(args: argparse.Namespace) -> int:
    from data_pipeline.preparing.encode import EncodeRule, encode
    from data_pipeline.preparing.progress import watch
    from data_pipeline.preparing.sources import find
    from ecdit_train.batches.frozen import FrozenEncoders
    from ecdit_train.config.compose import compose

    request = arguments.read(arguments.Encode, args.words)
    try:
        config = compose(request.rest, config_dir=args.config_dir)
    except ConfigError as error:
        request.build(arguments.Encode, *error.problems)
        raise
    asked = request.build(arguments.Encode)
    encoders = FrozenEncoders(config=config.encoders, latents=asked.latents, text=asked.text, device=asked.device)
    rule = EncodeRule(
        resolution=config.data.resolution, batch=asked.batch, captions=config.data.captions or ("txt", "json"),
        threads=asked.threads,
    )  # fmt: skip
    made = encode(
        find(args.source), Path(args.out), rule=rule, encoders=encoders, identity=encoders.identity(),
        runner=_runner(asked.runner, workers=asked.workers, actors=asked.actors, device=asked.device), part=args.part,
        watch=watch("encode"),
    )  # fmt: skip
    return _say(made.done, made.view, args)


def _runner(name: str, *, workers: int, actors: int = 1, device: str = "cpu") -> Any:
    if name == "ray":
        from data_pipeline.preparing.on_ray import OnRay

        return OnRay(workers=workers, encoders=actors, encoder_gpus=0.0 if device == "cpu" else None)
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
