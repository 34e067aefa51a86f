"""What an object store answers, sorted: wait and ask again, or tell the user what to set."""

from __future__ import annotations

import re
from typing import Literal

from data_pipeline.errors import DataError, MissingShard, StoreTrouble

Passing = Literal["http_5xx", "http_429", "timeout", "reset", "short"]
PASSING: tuple[Passing, ...] = ("http_5xx", "http_429", "timeout", "reset", "short")
"""Kinds of trouble that pass, as they are counted: the server's own, too many requests, no byte for too long, a connection that is
refused or breaks, an answer that ends early and says so."""

_STATUS = re.compile(r"status code: (\d{3})")
_GOT_LESS = re.compile(r"Requested (\d+)\.\.(\d+), got (\d+)\.\.(\d+)")
_NO_CREDENTIALS = "169.254.169.254"
"""obstore asks this machine's cloud for credentials where it finds none."""
_ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE and a credentials file; AWS_SKIP_SIGNATURE=true for a "
    "public bucket), AWS_REGION, and AWS_ENDPOINT_URL where it is not Amazon's",
    "http": "the address: http stores are read without credentials",
}


def passing(error: BaseException) -> Passing | None:
    """Which kind of passing trouble an error of obstore or asyncio is; None for one that stays."""
    if isinstance(error, TimeoutError):
        return "timeout"
    words = str(error)
    if (status := _status(words)) is not None:
        if status in (408, 425):
            return "timeout"
        return "http_429" if status == 429 else "http_5xx" if status >= 500 and status != 501 else None
    if (got := _GOT_LESS.search(words)) is not None:
        asked_from, asked_to, from_, to = map(int, got.groups())
        return "short" if from_ == asked_from and to < asked_to else None
    if _NO_CREDENTIALS in words:
        return None
    if "kind: Timeout" in words or "TimedOut" in words:
        return "timeout"
    if "HTTP error: " in words and "kind: Unknown" not in words and "builder error" not in words:
        return "reset"
    return None


def lasting(error: BaseException, *, url: str) -> DataError:
    """The one error that a user sees of trouble that does not pass by itself."""
    kind, words = url.partition(":")[0].replace("https", "http"), str(error).partition("\n")[0]
    status, body = _status(words), re.search(r"<Code>(\w+)</Code>", str(error))
    code = body[1] if body else ""
    if code == "NoSuchBucket":
        return StoreTrouble(f"{url}: there is no such bucket; check the name, AWS_REGION and AWS_ENDPOINT_URL")
    if isinstance(error, FileNotFoundError) or status == 404:
        return MissingShard(f"{url} is not there (404)")
    if _NO_CREDENTIALS in words:
        return StoreTrouble(f"{url}: no credentials; set {_ENVIRONMENT[kind]}")
    if status in (400, 401, 403):
        said = f"{status}{' ' + code if code else ''}"
        return StoreTrouble(f"{url}: access is refused ({said}); set {_ENVIRONMENT[kind]}")
    if status in (301, 307, 308):
        return StoreTrouble(f"{url}: the bucket lies elsewhere ({status} {code}); set AWS_REGION or AWS_ENDPOINT_URL")
    if status == 416:
        return StoreTrouble(f"{url}: the file ends before this range (416): it is not the one that was indexed")
    if "non-partial" in words or "Range request not supported" in words:
        rule = "a store must answer ranges (206), or a whole shard would come for each sample"
        return StoreTrouble(f"{url}: the server sends the whole file where a range was asked for (200); {rule}")
    if _GOT_LESS.search(words):
        return StoreTrouble(f"{url}: the server sends another range than was asked for: {words}")
    return StoreTrouble(f"{url}: {words or type(error).__name__}")


def _status(words: str) -> int | None:
    found = _STATUS.search(words)
    return int(found[1]) if found else None
