"""Rules of data: captions, sources and what is used of them."""

from __future__ import annotations

import re

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig


def check_data(check: Checker) -> None:
    _captions(check)
    _sources(check)
    _places(check)


def _places(check: Checker) -> None:
    """Of `data.shards`, and what a stream without an index has not."""
    check.at_least(1, ["data.shuffle"])
    shards = check.values["data.shards"]
    if check.values["data.order"] == "streamed":
        rule = "needs data.order=exact: what has no index has no place to go by"
        for key in ("data.keep", "data.take_down"):
            check.require(not check.values[key], key, rule=rule, nearest=[])
        check.require(check.values["data.manifest"] is None, "data.manifest", rule=rule)
        check.require(not check.values["validation.images"], "validation.images", rule=rule, nearest=0)
        check.require(not _buckets(check), "data.buckets", shown=_buckets(check), rule=rule, nearest={})
        mixed = any(key.startswith("data.sources.") for key in check.values)
        check.require(not mixed, "data.order", rule="a mixture has indexed sources (data.sources)", nearest="exact")
        rule = "a pipe runs a command that the configuration names; data.allow_pipe=true allows it"
        check.require(not shards.startswith("pipe:") or check.values["data.allow_pipe"], "data.shards", rule=rule)
        return
    scheme, _, rest = shards.partition("://")
    rule = "must be a folder or begin with s3://, https:// or http://"
    check.require(not rest or scheme in ("s3", "http", "https"), "data.shards", rule=rule, nearest=f"s3://{rest}")
    rule = (
        "names tars or a command: index them (ecdit data index URL --out FOLDER), or read them with data.order=streamed"
    )
    check.require(not (shards.startswith("pipe:") or shards.endswith(".tar")), "data.shards", rule=rule)


def _captions(check: Checker) -> None:
    sources, weights = check.values["data.captions"], check.values["data.caption_weights"]
    for source in sources:
        ok = re.fullmatch(r"(\w+\.)*(txt|json|json:.+)", source) is not None
        check.require(ok, "data.captions", shown=source, rule="must be txt, json or json:KEY", nearest="json:caption")
    rule = f"must be one number for each of data.captions = {list(sources)}, none below 0, one above it; or none"
    ok = not weights or (len(weights) == len(sources) and min(weights) >= 0 and sum(weights) > 0)
    check.require(ok, "data.caption_weights", rule=rule, nearest=[1.0] * len(sources))


def _buckets(check: Checker) -> list[str]:
    return [key.split(".")[2] for key in check.values if re.fullmatch(r"data\.buckets\.[^.]+\.height", key)]


def check_buckets(cfg: RunConfig, check: Checker) -> None:
    """Whole patches, and as many left by the mask as in the square: what follows the mask has one shape."""
    names = _buckets(check)
    if not names:
        return
    rule = "buckets are of data.shards alone, of pictures, and nothing is held out"
    check.require(not cfg.data.sources, "data.buckets", shown=names, rule=rule, nearest={})
    check.require(not cfg.encoders.image.stored, "data.buckets", shown=names, rule=rule, nearest={})
    check.require(cfg.validation.images == 0, "validation.images", rule=rule, nearest=0)
    unit, kept = cfg.encoders.image.factor * cfg.model.patch, cfg.tokens_per_image
    for name in names:
        bucket = cfg.data.buckets[name]
        sides = {"height": bucket.height, "width": bucket.width}
        for side, pixels in sides.items():
            rule = f"must be a multiple of encoders.image.factor * model.patch = {unit}"
            near = max(unit, round(pixels / unit) * unit)
            check.require(pixels > 0 and pixels % unit == 0, f"data.buckets.{name}.{side}", rule=rule, nearest=near)
        patches = (bucket.height // unit) * (bucket.width // unit)
        if cfg.tokens_per_image == cfg.patches_per_image:
            ok, rule = (
                patches == kept,
                f"nothing is masked: must have just the {kept} patches of the square of data.resolution",
            )
        else:
            ok, rule = patches >= kept, f"must have at least the {kept} patches that the mask keeps"
        rule += f"; {bucket.height} x {bucket.width} pixels have {patches}"
        check.require(ok, f"data.buckets.{name}.height", rule=rule)


def _sources(check: Checker) -> None:
    """Of a mixture, and of what is used of data; files are looked at when a run starts."""
    weights = [key for key in check.values if re.fullmatch(r"data\.sources\.[^.]+\.weight", key)]
    check.positive(weights)
    for key in weights:
        name = key.split(".")[2]
        rule = "a source's name is letters, digits, - and _"
        check.require(re.fullmatch(r"[\w-]+", name) is not None, key, shown=name, rule=rule)
        shards = key.removesuffix("weight") + "shards"
        check.require(bool(check.values[shards].strip()), shards, rule="must not be empty")
    for key in ("data.keep", "data.manifest"):
        rule = "is of data.shards, which is not read where there are data.sources: give it to one of those"
        nearest: object = [] if key == "data.keep" else None
        check.require(not (weights and check.values[key]), key, rule=rule, nearest=nearest)
    for key in [key for key in check.values if key.startswith("data.") and key.endswith(".manifest")]:
        told = check.values[key]
        ok = told is None or re.fullmatch(r"[0-9a-f]{12,64}", told) is not None
        check.require(ok, key, rule="must be 12 digits or more of a fingerprint, as a file of manifests/ is named")
