"""`ecdit data pack|encode|filter|dedup|buckets|report`: a data set is prepared. Each verb is a call
or two of `data_pipeline.preparing`."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecdit_train import arguments, data_words, errors
from ecdit_train.config.overrides import quoted
from ecdit_train.errors import ConfigError
from ecdit_train.submit_verbs import declare_part

PACK = """make shards of pictures and captions: WebDataset tars, img2dataset's output, or folders; what is not taken is counted

  ecdit data pack downloads data/images resolution=256 workers=8
  ecdit submit cluster=h100_ib400 --array 32 data pack downloads data/images resolution=256 workers=16"""

ENCODE = """run frozen encoders once: latents (the mean, unscaled) and text embeddings (real tokens), float16, beside captions

  ecdit data encode data/images data/latents experiment=ec_dit_xl_8e workers=8
  ecdit data encode data/images data/latents experiment=ec_dit_xl_8e text=false runner=ray workers=64 actors=8"""

FILTER = """write which samples satisfy a condition: SQL over what is known of picture, caption, json and side file

  ecdit data filter data/images out=data/good.keep --where "width >= 256 and caption_length > 10 and similarity > 0.3"
  ecdit train experiment=ec_dit_xl_8e data.shards=data/images data.keep=[data/good.keep] run=runs/good"""

DEDUP = """write which samples are no duplicates: equal pixels, or fingerprints that differ in a few of 64 bits; the first is kept

  ecdit data dedup data/images out=data/unique.keep workers=8"""

BUCKETS = """write which samples are trained at which size: the one that is nearest to the shape of their picture, by its header

  ecdit data buckets data/images out=data/sizes sizes='[256x256,192x320,320x192]'"""

REPORT = """one HTML file about a data set: what became of every sample, sizes, pictures with captions, duplicates

  ecdit data report data/images out=report.html"""


def declare(verb: Callable[..., argparse.ArgumentParser], group: Any) -> None:
    """The words of these verbs."""
    p = verb("pack", data_pack, PACK, parent=group)
    p.add_argument(
        "source", metavar="IN", help="a folder: tars, parquet, pictures with captions beside them or in a table"
    )
    p.add_argument("out", metavar="OUT")
    p.add_argument("words", nargs="*", metavar="WORD", help=arguments.forms(data_words.Pack))
    declare_part(p)
    p = verb("encode", data_encode, ENCODE, parent=group)
    p.add_argument("source", metavar="IN", help="a data set, or anything that `pack` takes")
    p.add_argument("out", metavar="OUT")
    more = "any other word is about the configuration whose encoders run"
    p.add_argument("words", nargs="+", metavar="WORD", help=f"{arguments.forms(data_words.Encode)}; {more}")
    p.add_argument("--config-dir", metavar="DIR", help="your own configuration and modules")
    declare_part(p)
    p = verb("filter", data_filter, FILTER, parent=group)
    p.add_argument("set", metavar="SET")
    p.add_argument("--where", required=True, metavar="SQL", help="a condition on one sample, in DuckDB's SQL")
    p.add_argument("words", nargs="*", metavar="WORD", help=arguments.forms(data_words.Filter))
    declare_part(p)
    p = verb("dedup", data_dedup, DEDUP, parent=group)
    p.add_argument("set", metavar="SET")
    p.add_argument("words", nargs="*", metavar="WORD", help=arguments.forms(data_words.Dedup))
    declare_part(p)
    p = verb("buckets", data_buckets, BUCKETS, parent=group)
    p.add_argument("set", metavar="SET")
    p.add_argument("words", nargs="+", metavar="WORD", help=arguments.forms(data_words.Buckets))
    declare_part(p)
    p = verb("report", data_report, REPORT, parent=group)
    p.add_argument("set", metavar="SET")
    p.add_argument("words", nargs="*", metavar="WORD", help=arguments.forms(data_words.Report))


def data_pack(args: argparse.Namespace) -> int:
    from data_pipeline.preparing.pack import PackRule, pack
    from data_pipeline.preparing.progress import watch
    from data_pipeline.preparing.sources import find

    asked = arguments.read(data_words.Pack, args.words, alone=True).build(data_words.Pack)
    rule = PackRule(
        resolution=asked.resolution, crop=asked.crop, least=asked.least, most_aspect=asked.aspect, quality=asked.quality,
        captions=asked.captions, no_caption=asked.no_caption,
    )  # fmt: skip
    packed = pack(
        find(args.source, form=asked.form, table=asked.table, per_shard=asked.per_shard), Path(args.out), rule=rule,
        runner=_runner(asked.runner, workers=asked.workers), part=args.part, watch=watch("ecdit: pack"),
    )  # fmt: skip
    return _say(packed.done, packed.view, args)


def data_encode(args: argparse.Namespace) -> int:
    from data_pipeline.preparing.encode import EncodeRule, encode
    from data_pipeline.preparing.progress import watch
    from data_pipeline.preparing.sources import find
    from ecdit_train.batches.frozen import FrozenEncoders
    from ecdit_train.config.compose import compose

    request = arguments.read(data_words.Encode, args.words)
    try:
        config = compose(request.rest, config_dir=args.config_dir)
    except ConfigError as error:
        request.build(data_words.Encode, *error.problems)
        raise
    asked = request.build(data_words.Encode)
    encoders = FrozenEncoders(config=config.encoders, latents=asked.latents, text=asked.text, device=asked.device)
    rule = EncodeRule(
        resolution=config.data.resolution, batch=asked.batch, captions=config.data.captions or ("txt", "json"),
        no_caption="reject" if asked.text else "keep", threads=asked.threads,
    )  # fmt: skip
    made = encode(
        find(args.source), Path(args.out), rule=rule, encoders=encoders, identity=encoders.identity(),
        runner=_runner(asked.runner, workers=asked.workers, actors=asked.actors, device=asked.device), part=args.part,
        watch=watch("ecdit: encode"),
    )  # fmt: skip
    return _say(made.done, made.view, args)


def data_filter(args: argparse.Namespace) -> int:
    from data_pipeline import views
    from data_pipeline.preparing.select import check_grammar, make_facts, select

    asked = arguments.read(data_words.Filter, args.words, alone=True).build(data_words.Filter)
    check_grammar(args.where)
    work, complete = _make(make_facts, asked, args)
    if not complete:
        return errors.EXIT_OK
    found = select(work, where=args.where)
    views.write_keep(found.view, found.mask, reason=f"filter: {args.where}", out=Path(asked.out))
    print("\n".join([*found.lines(), f"{asked.out}: use it with data.keep=[{asked.out}]"]))
    return errors.EXIT_OK


def data_dedup(args: argparse.Namespace) -> int:
    from data_pipeline import views
    from data_pipeline.preparing.dedup import find_duplicates, make_prints, write_clusters

    asked = arguments.read(data_words.Dedup, args.words, alone=True).build(data_words.Dedup)
    work, complete = _make(make_prints, asked, args)
    if not complete:
        return errors.EXIT_OK
    found = find_duplicates(work, distance=asked.distance)
    views.write_keep(found.view, found.mask, reason=f"dedup: distance {asked.distance}", out=Path(asked.out))
    clusters = write_clusters(found, Path(f"{asked.out}.clusters.jsonl"))
    print("\n".join([*found.lines(), f"{clusters}: what is dropped, and for what"]))
    print(f"{asked.out}: use it with data.keep=[{asked.out}]")
    return errors.EXIT_OK


def data_buckets(args: argparse.Namespace) -> int:
    from data_pipeline.preparing.select import make_facts
    from data_pipeline.preparing.sizes import read_size, sort_by_size

    asked = arguments.read(data_words.Buckets, args.words, alone=True).build(data_words.Buckets)
    sizes = [read_size(one) for one in asked.sizes]
    work, complete = _make(make_facts, asked, args)
    if not complete:
        return errors.EXIT_OK
    found = sort_by_size(work, sizes=sizes, least=asked.least)
    written = found.write(Path(asked.out))
    print("\n".join(f"{count:>12,} samples  {written[size]}" for size, count in found.counts.items()))
    for name, count in found.left_out.items():
        few = f", fewer than {asked.least}: they are with another size" if count else ", so it is left out"
        print(f"{count:>12,} samples are nearest to {name}{few}")
    if found.without:
        print(f"{found.without:>12,} samples have no picture that can be read, and are of no size")
    named = ", ".join(
        f"{size.name}: {{samples: {_word(str(path))}, height: {size.height}, width: {size.width}}}"
        for size, path in written.items()
    )
    print("train on them with " + shlex.quote(f"data.buckets={{{named}}}"))
    return errors.EXIT_OK


def _word(text: str) -> str:
    """As Hydra's grammar reads it back."""
    return text if re.fullmatch(r"[\w./-]*[A-Za-z_/][\w./-]*", text, re.ASCII) else quoted(text)


def data_report(args: argparse.Namespace) -> int:
    from data_pipeline.preparing.dedup import find_duplicates, made_prints
    from data_pipeline.preparing.report import write_report
    from data_pipeline.preparing.select import make_facts

    asked = arguments.read(data_words.Report, args.words, alone=True).build(data_words.Report)
    args.part = None
    work, _ = _make(make_facts, asked, args)
    prints = made_prints(args.set, tables=None if asked.tables is None else Path(asked.tables))
    duplicates = None if prints is None else find_duplicates(prints, distance=asked.distance)
    out = write_report(work, out=Path(asked.out or Path(args.set) / "report.html"), duplicates=duplicates)
    print(out)
    return errors.EXIT_OK


def _make(make: Callable[..., Any], asked: Any, args: argparse.Namespace) -> tuple[Any, bool]:
    """Tables of a data set, and whether all are there."""
    from data_pipeline.preparing.progress import watch

    tables = None if asked.tables is None else Path(asked.tables)
    runner = _runner(asked.runner, workers=asked.workers)
    work, done = make(
        args.set,
        tables=tables,
        runner=runner,
        part=args.part,
        watch=watch(f"ecdit: {make.__name__.removeprefix('make_')}"),
    )
    if args.part is not None:
        _say_part(done, args)
    return work, done.complete


def _runner(name: str, *, workers: int, actors: int = 1, device: str = "cpu") -> Any:
    if name == "ray":
        from data_pipeline.preparing.on_ray import OnRay

        return OnRay(workers=workers, encoders=actors, encoder_gpus=0.0 if device == "cpu" else None)
    from data_pipeline.preparing.local import Local

    return Local(workers=workers)


def _say(done: Any, view: Any, args: argparse.Namespace) -> int:
    if args.part is not None:
        _say_part(done, args)
    if view is not None:
        print("\n".join([*done.lines(), f"{args.out}: {view.sha256[:12]}"]))
    return errors.EXIT_OK


def _say_part(done: Any, args: argparse.Namespace) -> None:
    left = done.of - len(done.records)
    print(f"part {args.part}: done{f'; {left} shards are still in the hands of other parts' if left else ''}")
