"""Where the tars that are indexed lie: in the folder itself, or in a store, from which one at a time is on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from data_pipeline.errors import MissingShard
from data_pipeline.promises import stats_path
from data_pipeline.store.contract import Found, Store


class Tars(Protocol):
    """Tars by the paths that they have, or would have, in the folder of their indexes."""

    @property
    def base(self) -> str:
        """URL of the store; none for a folder."""
        ...

    def files(self) -> list[Path]:
        """All files that are there, sorted; of a folder of indexes that lies elsewhere, those of the store."""
        ...

    def status(self, tar: Path) -> tuple[int, int]:
        """(bytes, nanoseconds since 1970 of the last change). Raises OSError."""
        ...

    def here(self, tar: Path) -> AbstractContextManager[Path]:
        """Where the tar can be read while this is open.

        Raises StoreTrouble, ChangedShard, MissingShard, OSError: nothing is known of the tar then."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalTars:
    """See `Tars`."""

    folder: Path
    base: str = ""

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def status(self, tar: Path) -> tuple[int, int]:
        """Also of a file that kept its time of modification when it was replaced."""
        status = tar.stat()
        return status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)

    @contextmanager
    def here(self, tar: Path) -> Iterator[Path]:
        yield tar


class RemoteTars:
    """See `Tars`. Downloads one tar at a time to a folder of its own beside the index, and removes that: tars that lie there
    already are a user's, and another process may read the same ones.

    Args:
        names: of the tars; none asks the store for its list.
    """

    def __init__(self, store: Store, *, folder: Path, names: tuple[str, ...] = ()) -> None:
        self._store, self._folder, self.base = store, folder, store.name
        self._found: dict[Path, Found] = {folder / one.path: one for one in store.sizes(names or None)}
        if missing := [name for name in names if folder / name not in self._found]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise MissingShard(f"{store.name} has no {', '.join(missing[:3])}{more}")

    def files(self) -> list[Path]:
        return sorted(self._found)

    def status(self, tar: Path) -> tuple[int, int]:
        return self._found[tar].size, int(self._found[tar].changed * 1e9)

    @contextmanager
    def here(self, tar: Path) -> Iterator[Path]:
        tar.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".ecdit-", dir=tar.parent) as name:
            private = Path(name)
            # What img2dataset says of a tar is held against it, where the store has it.
            for path in (tar, stats_path(tar)):
                if path in self._found:
                    self._store.read_to(self._found[path].path, str(private / path.name))
            yield private / tar.name
