"""Where tars are that nobody has indexed: URLs with braces, and pipes where they are asked for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import BadSplit, MissingShard

_STRANGE = re.compile(r"[\s'\"`$;&|<>\\]")


def expand(shards: str, *, allow_pipe: bool = False) -> list[str]:
    """URLs of `https://host/set/{000..239}.tar`, `pipe:cat {0..3}.tar`, or the tars of a folder.

    webdataset opens http by a shell command and a pipe is one: a URL holds no sign that a shell reads, `pipe:` must be allowed.

    Raises:
        BadSplit: a pipe that was not asked for, or such a sign.
        MissingShard: a folder without tars.
    """
    from braceexpand import braceexpand

    folder = Path(shards)
    if "://" not in shards and not shards.startswith("pipe:") and folder.is_dir():
        tars = sorted(str(path) for path in folder.rglob("*.tar"))
        if not tars:
            raise MissingShard(f"no *.tar in {shards}")
        return tars
    urls = list(braceexpand(shards))
    for url in urls:
        if url.startswith("pipe:"):
            if not allow_pipe:
                raise BadSplit(
                    f"data.shards = {url}: a pipe runs a command of the configuration; data.allow_pipe=true allows it"
                )
        elif "@" in url.partition("://")[2].partition("/")[0]:
            rule = "a password does not belong into a URL, which is written down; use ~/.netrc, or index the tars of a store"
            raise BadSplit(f"data.shards = {url.partition('://')[0]}://...@...: {rule}")
        elif (strange := _STRANGE.search(url)) is not None:
            raise BadSplit(
                f"data.shards = {url}: {strange[0]!r} may not stand in a URL, webdataset gives it to a shell"
            )
    return urls


def digest_of(urls: Sequence[str]) -> str:
    """Names a list of URLs in a loader's state."""
    return hashlib.sha256("\n".join(urls).encode()).hexdigest()
