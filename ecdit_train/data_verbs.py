"""`ecdit data`: make, index, look at and repair shards. Nothing here needs torch."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecdit_train import arguments, data_words, errors, prepare_verbs, set_verbs
from ecdit_train.submit_verbs import declare_part


def declare(verb: Callable[..., argparse.ArgumentParser], group: Any) -> None:
    """The words of the group."""
    p = verb(
        "shapes",
        data_shapes,
        "draw the procedural coloured-shapes set into WebDataset shards\n\n"
        "  ecdit data shapes out=data/shapes count=4000 resolution=32",
        parent=group,
    )
    p.add_argument("words", nargs="+", metavar="WORD", help=arguments.forms(data_words.Shapes))
    declare_part(p)
    p = verb(
        "index",
        data_index,
        "index plain WebDataset tars: an .idx beside each tar and a manifest.json; says what is used and what is not\n\n"
        "  ecdit data index data/images\n  ecdit data index data/images --on-bad-shard salvage\n"
        "  ecdit data index s3://bucket/images --out data/images\n"
        "  ecdit data index 'https://host/images/{000..239}.tar' --out data/images",
        parent=group,
    )
    p.add_argument("folder", help="of tars, or their URL")
    p.add_argument("--out", metavar="FOLDER", help="where the indexes of tars at a URL are written")
    p.add_argument(
        "--on-bad-shard",
        choices=("set_aside", "salvage", "fail"),
        default="set_aside",
        help="a damaged tar: use nothing of it (default), its samples that are certainly whole, or stop",
    )
    p.add_argument("--again", action="store_true", help="read tars whose index is fresh, too")
    declare_part(p)
    p = verb(
        "stats",
        data_stats,
        "what a data set holds: samples, bytes, fields, what was ignored, rejected and set aside; or what a run of some\n"
        "words reads of its sources, and what an epoch leaves out\n\n"
        "  ecdit data stats data/images --global-batch 256\n"
        "  ecdit data stats experiment=ec_dit_xl_8e data.shards=data/images 'data.keep=[good.keep]'",
        parent=group,
    )
    p.add_argument("what", nargs="+", metavar="FOLDER|WORD", help="a folder or URL; or words of a configuration")
    p.add_argument("--global-batch", type=int, metavar="N", help="also say what an epoch of such batches leaves out")
    p.add_argument("--config-dir", metavar="DIR", help="your own configuration and modules")
    p = verb(
        "salvage",
        data_salvage,
        "write the samples of damaged tars that are certainly whole into new tars\n\n"
        "  ecdit data salvage data/images/00017.tar --out data/salvaged",
        parent=group,
    )
    p.add_argument("tars", nargs="+", metavar="TAR")
    p.add_argument("--out", required=True, metavar="FOLDER", help="where tars of the same names are written")
    set_verbs.declare(verb, group)
    p = verb(
        "verify", data_verify, "read every byte of a data set and check it against its index and manifest", parent=group
    )
    p.add_argument("folder")
    declare_part(p)
    prepare_verbs.declare(verb, group)


def data_shapes(args: argparse.Namespace) -> int:
    from data_pipeline.shapes.make import make_shapes
    from data_pipeline.shapes.prompts import TASKS

    asked = arguments.read(data_words.Shapes, args.words, alone=True).build(data_words.Shapes)
    made = make_shapes(
        Path(asked.out),
        count=asked.count,
        resolution=asked.resolution,
        seed=asked.seed,
        mix=asked.mix or dict.fromkeys(TASKS, 1.0),
        scale=asked.scale,
        samples_per_shard=asked.per_shard,
        image_format=asked.format,
        part=args.part,
    )
    _say_part(args.part, last=made is not None)
    if made is not None:
        print(f"{made.num_samples} samples in {len(made.shards)} shards: {asked.out}")
    return errors.EXIT_OK


def _say_part(part: Any, *, last: bool) -> None:
    if part is not None:
        print(f"part {part}: done{'' if last else '; other parts are not yet, and the last one writes the manifest'}")


def data_index(args: argparse.Namespace) -> int:
    from data_pipeline import indexing, tally

    tars_at, folder = _tars_at(args.folder, out=args.out)
    indexed = indexing.index_tars(
        folder, on_bad_shard=args.on_bad_shard, again=args.again, part=args.part, tars_at=tars_at
    )
    _say_part(args.part, last=indexed is not None)
    if indexed is None:
        return errors.EXIT_OK
    print("\n".join([*tally.table(indexed.tallies), f"{folder}: {indexed.view.sha256[:12]}"]))
    if any(one.set_aside and one.damage for one in indexed.tallies.values()):
        where = shlex.join([args.folder] if args.out is None else [args.folder, "--out", args.out])
        print(f"to use their whole samples: ecdit data index {where} --on-bad-shard salvage")
    return errors.EXIT_OK


def _tars_at(place: str, *, out: str | None) -> tuple[Any, Path]:
    """(None, the folder), or (where the tars at a URL lie, the folder of their indexes)."""
    from data_pipeline.store.place import expanded, is_remote, open_store
    from data_pipeline.tars import RemoteTars

    if not is_remote(place):
        if out is not None:
            raise errors.EcditError("--out is for tars at a URL; the indexes of a folder lie beside its tars")
        return None, Path(place)
    if out is None:
        raise errors.EcditError(f"{place}: name the folder for its indexes and the manifest with --out FOLDER")
    base, names = expanded(place)
    return RemoteTars(open_store(base), folder=Path(out), names=names), Path(out)


def data_stats(args: argparse.Namespace) -> int:
    from data_pipeline import stats

    if len(args.what) == 1 and ("=" not in args.what[0] or Path(args.what[0]).exists()):
        print(stats.text(stats.look(args.what[0]), global_batch=args.global_batch))
        return errors.EXIT_OK
    print(_stats_of_run(args.what, global_batch=args.global_batch, config_dir=args.config_dir))
    return errors.EXIT_OK


def _stats_of_run(words: list[str], *, global_batch: int | None, config_dir: str | None) -> str:
    from data_pipeline import stats
    from ecdit_train.batches.sources import open_sources
    from ecdit_train.config.compose import compose

    config = compose(words, config_dir=config_dir)
    if config.data.order == "streamed":
        raise errors.EcditError(
            "data.order=streamed: what nobody has indexed cannot be counted; see `ecdit data index`"
        )
    data = open_sources(config.data, check_files=True)
    asked = global_batch or config.train.global_batch
    return stats.of_run(data, global_batch=asked, held_out=config.validation.images)


def data_salvage(args: argparse.Namespace) -> int:
    from data_pipeline import tally
    from data_pipeline.salvage import salvage

    done = {tar: salvage(Path(tar), out=Path(args.out)) for tar in args.tars}
    print("\n".join([*tally.table(done), f"index them: ecdit data index {args.out}"]))
    return errors.EXIT_OK


def data_verify(args: argparse.Namespace) -> int:
    from data_pipeline import indexing, tally
    from data_pipeline.manifest import open_view, verify

    verify(args.folder, part=args.part)
    if args.part is None:
        print("\n".join(tally.table(indexing.tallies_of(open_view(args.folder)))))
    which = "" if args.part is None else f" of part {args.part}"
    print(f"{args.folder}: every byte{which} agrees with the index and the manifest")
    return errors.EXIT_OK
