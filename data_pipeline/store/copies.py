"""Local copies of what cannot be read in pieces: a manifest while this process lives, a tar while it is scanned."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import MissingShard
from data_pipeline.store.contract import Store
from data_pipeline.store.place import open_store


def copied_manifest(url: str, *, earlier: str | None = None) -> Path:
    """A temporary folder with the `manifest.json` of a URL and the table that it names, removed when the process ends; with that
    manifest of earlier, too, by 12 digits or more of its name, if it was kept there (`manifest.HISTORY`).

    Raises:
        MissingShard: there is no manifest.
        StoreTrouble: the store cannot be read.
    """
    store = open_store(url)
    try:
        try:
            raw = store.read("manifest.json")
        except MissingShard as error:
            rule = f"make one with: ecdit data index {url} --out FOLDER, and give data.shards=FOLDER"
            raise MissingShard(f"no manifest.json at {store.name}: {rule}") from error
        folder = Path(tempfile.mkdtemp(prefix="ecdit-manifest-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _copy(store, raw, "manifest.json", folder=folder)
        if earlier is not None:
            name = f"manifests/{earlier[:12]}.json"
            with suppress(MissingShard):  # the reader says so, unless the present one is meant
                _copy(store, store.read(name), name, folder=folder)
        return folder
    finally:
        close(store)


def _copy(store: Store, raw: bytes, name: str, *, folder: Path) -> None:
    """A manifest that was read, and its table."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(raw)
    try:
        table = json.loads(raw).get("table", {}).get("name")
    except (ValueError, AttributeError):
        table = None  # the reader of manifests says what is wrong with it
    if isinstance(table, str) and not table.startswith("/") and ".." not in table.split("/"):
        (folder / table).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / table).exists():
            store.read_to(table, str(folder / table))


@contextmanager
def downloaded(store: Store, path: str) -> Iterator[BinaryIO]:
    """A file of a store, opened for reading, on this machine while it is needed. Raises MissingShard, StoreTrouble."""
    with tempfile.NamedTemporaryFile(prefix="ecdit-", suffix=".tar") as file:
        store.read_to(path, file.name)
        yield file  # type: ignore[misc]


def close(store: Store) -> None:
    """End what a store may have running."""
    getattr(store, "close", lambda: None)()
