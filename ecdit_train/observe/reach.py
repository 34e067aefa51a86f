"""Whether W&B can be reached from here, and whether it would let us in. Standard library only."""

from __future__ import annotations

import contextlib
import netrc
import os
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROBE_SECONDS = 1.5
NETRC = Path("~/.netrc")


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where connections to W&B go."""

    host: str
    """W&B's."""
    proxy: str | None
    """The proxy's host on the way there."""
    connect: tuple[str, int]
    """The first of them."""


def address(environ: Mapping[str, str] = os.environ) -> Address:
    url = urllib.parse.urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    proxy = urllib.request.getproxies().get(url.scheme)
    place = urllib.parse.urlsplit(proxy) if proxy else url
    port = place.port or {"http": 80}.get(place.scheme, 443)
    return Address(
        host=url.hostname or "", proxy=place.hostname if proxy else None, connect=(place.hostname or "", port)
    )


def answers(*, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether somebody answers at W&B's address, or at the proxy on the way there."""
    place, answered = address(environ).connect, threading.Event()

    def call() -> None:  # in a thread: a name server that does not answer has no timeout of its own
        with contextlib.suppress(OSError):
            socket.create_connection(place, timeout=PROBE_SECONDS).close()
            answered.set()

    threading.Thread(target=call, name="wandb-probe", daemon=True).start()
    return answered.wait(PROBE_SECONDS)


def key(*, environ: Mapping[str, str] = os.environ) -> str | None:
    """Where W&B's own client would find a key; it is never shown. None where there is none."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if environ.get(name):
            return name
    try:
        known = netrc.netrc(Path(environ.get("NETRC") or NETRC).expanduser()).authenticators(address(environ).host)
    except (OSError, netrc.NetrcParseError):
        return None
    return "a login in ~/.netrc" if known is not None else None
