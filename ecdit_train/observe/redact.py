"""Keeps secrets out of everything that leaves the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ecdit_train.secrets import REDACTED, hide_forms

_SECRET_NAME = re.compile(
    r"(api_?key|secret|passw(or)?d|credential|private_?key|(^|_)token$|(^|_)auth$)", re.IGNORECASE
)
_ASSIGNMENT = re.compile(r"\b([A-Za-z_][A-Za-z0-9_]*)(\s*[=:]\s*)([^\s,'\"\]]+)")


def redact_text(text: str) -> str:
    """Values of secret environment variables, `NAME=value` where the name says secret, and what has the form of
    a secret, become [redacted]."""
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, REDACTED)
    return _ASSIGNMENT.sub(lambda m: m[1] + m[2] + REDACTED if _SECRET_NAME.search(m[1]) else m[0], hide_forms(text))


def redact(value: Any, *, name: str = "") -> Any:
    """A configuration tree without secrets, for everything that leaves the machine."""
    if isinstance(value, Mapping):
        return {k: redact(v, name=str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(v, name=name) for v in value]
    if _SECRET_NAME.search(name) and value not in (None, ""):
        return REDACTED
    return redact_text(value) if isinstance(value, str) else value
