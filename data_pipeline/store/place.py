"""What a user calls a place: a folder, `https://host/set`, `s3://bucket/set`."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import StoreTrouble
from data_pipeline.store.contract import Store
from data_pipeline.store.local import LocalStore
from data_pipeline.store.patience import Patience

REMOTE = ("http", "https", "s3")


def is_remote(place: Path | str) -> bool:
    """Whether a place is a URL, also one that no store of ours can read."""
    return isinstance(place, str) and ("://" in place or place.startswith(tuple(f"{scheme}:" for scheme in REMOTE)))


def open_store(place: Path | str, *, patience: Patience | None = None) -> Store:
    """Nothing is asked of the store yet.

    Raises:
        StoreTrouble: a URL of another kind, or without a host or bucket.
    """
    if not is_remote(place):
        return LocalStore(Path(place))
    assert isinstance(place, str)
    scheme, slashes, rest = place.partition("://")
    if not slashes:
        scheme, _, rest = place.partition(":")
        rest = rest.strip("/")
        raise StoreTrouble(f"{place}: no URL; must be as {scheme}://{rest}")
    if scheme.lower() not in REMOTE:
        allowed = ", ".join(f"{one}://" for one in REMOTE)
        raise StoreTrouble(f"{place}: no store is of the kind {scheme}://; must be a folder or begin with {allowed}")
    if not rest.strip("/") or rest.startswith("/"):
        what = "bucket" if scheme.lower() == "s3" else "host"
        raise StoreTrouble(f"{place}: names no {what}; must be as {scheme}://{what.upper()}/folder")
    if "@" in rest.partition("/")[0]:
        host = rest.partition("/")[0].rpartition("@")[2]
        raise StoreTrouble(f"{scheme}://{host}: names a user or password; set credentials in the environment")
    from data_pipeline.store.remote import RemoteStore

    return RemoteStore(place, patience=patience or Patience())


def expanded(place: str) -> tuple[str, tuple[str, ...]]:
    """A URL with braces, as `https://host/set/{000..239}.tar` -> (`https://host/set`, the names of the tars in it). Without
    a `.tar` at its end: (the URL, nothing).

    Raises:
        StoreTrouble: the braces do not close, or stand before the last folder.
    """
    from braceexpand import braceexpand

    if not place.endswith(".tar"):
        return place, ()
    base = place.partition("{")[0].rpartition("/")[0]
    try:
        return base, tuple(one.removeprefix(f"{base}/") for one in braceexpand(place))
    except ValueError as error:
        raise StoreTrouble(f"{place}: braces that do not close; must be as {base}/{{000..239}}.tar") from error


def join(place: Path | str, path: str) -> str:
    """A file of a place as a person writes it."""
    return f"{str(place).rstrip('/')}/{path}"
