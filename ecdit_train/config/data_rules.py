"""Rules of data: captions, sources and what is used of them."""

from __future__ import annotations

import re

from ecdit_train.config.rules import Checker


def check_data(check: Checker) -> None:
    _captions(check)
    _sources(check)


def _captions(check: Checker) -> None:
    sources, weights = check.values["data.captions"], check.values["data.caption_weights"]
    for source in sources:
        ok = re.fullmatch(r"(\w+\.)*(txt|json|json:.+)", source) is not None
        check.require(ok, "data.captions", shown=source, rule="must be txt, json or json:KEY", nearest="json:caption")
    rule = f"must be one number for each of data.captions = {list(sources)}, none below 0, one above it; or none"
    ok = not weights or (len(weights) == len(sources) and min(weights) >= 0 and sum(weights) > 0)
    check.require(ok, "data.caption_weights", rule=rule, nearest=[1.0] * len(sources))


def _sources(check: Checker) -> None:
    """Of a mixture, and of what is used of data; files are looked at when a run starts."""
    weights = [key for key in check.values if re.fullmatch(r"data\.sources\.[^.]+\.weight", key)]
    check.positive(weights)
    for key in weights:
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
