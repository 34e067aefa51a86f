"""What looks like a secret, by the name it goes under or by its own form, and how to show text without it.

Own patterns, because the kept libraries of this kind are programs that search repositories, with a network client as a dependency:
a login node needs a dozen expressions. Forms are those that issuers print on their tokens, so ordinary values do not match.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

REDACTED = "[redacted]"

_ENDINGS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "COOKIE")
_WHOLE = {"PW", "PWD", "PASS", "SSHPASS", "PAT", "AUTH", "APIKEY", "BEARER", "CRED", "CREDS"}
_WORDS = {"MONKEY", "DONKEY", "TURKEY", "HOCKEY", "JOCKEY", "WHISKEY"}
"""Of the language, with an ending that says nothing."""
_FOLDERS = {"PWD", "OLDPWD"}
"""The shell's own."""

_FORMS = {
    "a GitHub token": r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}",
    "a GitLab token": r"gl(?:pat|dt|rt|cbt|ptt|soat)-[A-Za-z0-9_-]{20,}",
    "a Hugging Face token": r"(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "an API key": r"sk-(?=[\w-]*\d)(?:[a-z0-9]+-)*[A-Za-z0-9_]{20,}|nvapi-[A-Za-z0-9_-]{20,}|AIza[A-Za-z0-9_-]{35}",
    "a W&B key": r"wandb_v\d_[A-Za-z0-9_]{20,}|local-[0-9a-f]{40}",
    "an AWS key": r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    "a Slack token": r"xox[abeprs]-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/[A-Za-z0-9_/-]{20,}",
    "a Docker token": r"dckr_pat_[A-Za-z0-9_-]{20,}",
    "a package registry's token": r"npm_[A-Za-z0-9]{36}|pypi-AgEI[A-Za-z0-9_-]{20,}",
    "a Google token": r"ya29\.[A-Za-z0-9_.-]{20,}",
    "an Azure key": r"AccountKey=[A-Za-z0-9+/]{40,}|(?<=[?&;])sig=[A-Za-z0-9%+/=]{20,}",
    "an age key": r"AGE-SECRET-KEY-1[A-Z0-9]{50,}",
    "what somebody logs in with": r"(?i:authorization\s*[:=]\s*(?:basic|token)|bearer)\s+(?=\S*\d)[A-Za-z0-9._~+/=-]{20,}",
    "a JSON web token": r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
}
_PEM = r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
_URL = r"[^/\s:@'\"\[]*:(?!\d+/)[^\s@'\"{}$]+"  # digits and a slash: a port
_FORM = re.compile(
    "|".join(f"(?P<form{n}>(?<![A-Za-z0-9_])(?:{form}))" for n, form in enumerate(_FORMS.values()))
    + rf"|(?P<pem>{_PEM})|(?<=://)(?P<url>{_URL})(?=@)"
)
_ANY = tuple(re.compile(form) for form in (*_FORMS.values(), _PEM, f"://{_URL}@"))
"""Where `_FORM` finds something, so does one of these, and all of them pass over a text in a quarter of its time: what they begin
with is looked for at once."""
_HEX = re.compile(r"(?<![\w/:@.+-])[0-9a-f]{40}(?![\w/:@.+-])")
"""W&B's older keys. A commit of that form stands in a path or an address, or says what it is."""
_FORTY = re.compile(r"[0-9A-Fa-f]{40}")
_NAMED_HEX = re.compile(
    r"(?i)(?:key|token|secret|passw(?:or)?d|wandb)\w*['\"]?\s*[:=]\s*['\"]?(?P<hex>[0-9a-f]{40})(?![0-9a-f])"
)


def is_secret_name(name: str) -> bool:
    """Whether a variable or key is named like a secret; TOKENIZERS_PARALLELISM is not, nor is PATH."""
    if name in _FOLDERS:
        return False
    parts = re.split(r"[_\W]+", name.upper())
    endings = tuple(ending + plural for ending in _ENDINGS for plural in ("", "S"))
    return any(p in _WHOLE or (p.endswith(endings) and p.removesuffix("S") not in _WORDS) for p in parts)


def form_of(value: str) -> str | None:
    """What a configuration's value looks like, whatever its name: "a GitHub token"; None for anything else."""
    return next((what for what, _, _ in _found(value, hexes=_HEX)), None)


def in_file(text: str) -> tuple[int, str] | None:
    """(line from 1, what it looks like) of the first secret in a source file. 40 hex digits are one only under a
    telling name: files of code name commits."""
    return next(((text.count("\n", 0, start) + 1, what) for what, start, _ in _found(text, hexes=_NAMED_HEX)), None)


def _found(text: str, *, hexes: re.Pattern[str]) -> Iterator[tuple[str, int, int]]:
    """(what, start, end) of each form."""
    kinds = list(_FORMS)
    for match in _FORM.finditer(text) if any(form.search(text) for form in _ANY) else ():
        group = match.lastgroup or ""
        named = {"pem": "a private key", "url": "an address with a password in it"}
        yield named.get(group) or kinds[int(group.removeprefix("form"))], match.start(), match.end()
    for match in hexes.finditer(text) if _FORTY.search(text) else ():
        yield "a W&B key", match.start(), match.end()


def hide_forms(text: str) -> str:
    """`text` without what has the form of a secret: for messages that quote what somebody typed."""
    return _HEX.sub(REDACTED, _FORM.sub(REDACTED, text))
