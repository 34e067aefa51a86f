"""Somebody who reads a page about data and types its commands in a folder of their own, one after the other.

The networks of the pages are read as one that fits here (`FILL`); all else is typed as it stands. What is typed goes through
`ecdit`'s own `main`, in this process where it can.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from tiny_runs import WORDS

from ecdit_train import cli

ROOT = Path(__file__).resolve().parents[2]
HOW_TO = ROOT / "docs" / "how-to"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
NOT_TRIED = "  # not tried: "
"""What a line ends with that cannot be run here, and then why."""
SMALL = " ".join((*WORDS, "train.steps=6", "checkpoint.every_steps=3", "optim.warmup_steps=1"))
TINY = " ".join(
    [word for word in SMALL.split() if not word.startswith(("encoders.", "data.resolution", "moe.group_size"))]
    + ["moe.group_size=18"]
)
"""The same with the encoders and the pictures that the experiment has itself."""
FILL = {"experiment=ec_dit_xl_8e": SMALL, "experiment=shapes_tiny": TINY}


def text_of(page: str) -> str:
    return (HOW_TO / f"{page}.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """From a heading to the next one of its level, or above."""
    level = heading.partition(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {heading!r}"
    return found[1]


def lines_of(body: str) -> list[str]:
    """Of one block; those that go on in the next line as one."""
    return [line.strip() for line in body.replace("\\\n", " ").splitlines() if line.strip()]


def commands(text: str) -> list[str]:
    """The command lines of the bash blocks, but for those that say why they cannot be run here."""
    bodies = [body for language, body in FENCE.findall(text) if language == "bash"]
    return [line for body in bodies for line in lines_of(body) if NOT_TRIED.strip() not in line]


def shown(text: str) -> dict[str, str]:
    """Command -> the output that the page shows: a `text` block behind a bash block is what its last command says."""
    blocks = list(FENCE.finditer(text))
    return {
        lines_of(typed[2])[-1]: said[2]
        for typed, said in itertools.pairwise(blocks)
        if typed[1] == "bash" and said[1] == "text"
    }


def unrun(text: str) -> list[str]:
    """Commands that nobody would type: in a block of another kind, indented, or left out without a reason."""
    blocks = [body for language, body in FENCE.findall(text) if language in ("", "sh", "shell", "console")]
    indented = re.findall(r"^    (?:[A-Z_]+=\S+ )*ecdit .*$", FENCE.sub("", text), re.MULTILINE)
    bodies = [body for language, body in FENCE.findall(text) if language == "bash"]
    silent = [
        line for body in bodies for line in lines_of(body)
        if "# not tried" in line and len(line.partition(NOT_TRIED)[2]) < 5
    ]  # fmt: skip
    return [*blocks, *indented, *silent]


def files_of(text: str) -> dict[str, str]:
    """Path -> content of the files that a page tells its reader to save: "as `PATH`:" before a block."""
    return dict(re.findall(r"\b[aA]s\s+`([\w/.-]+)`:\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def steady(said: str) -> str:
    """An output without what differs from machine to machine: sums, what a library calls a damaged picture, speeds,
    blanks at the end."""
    said = re.sub(r"\b[0-9a-f]{12}\b", "<sum>", said)
    said = re.sub(r"(undecodable \(.*?\.jpg: ).*", r"\1...", said)
    return "\n".join(line.rstrip() for line in said.strip().splitlines())


class Reader:
    """In a working directory of their own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, *, fill: Mapping[str, str] | None = None) -> None:
        """`fill`: words of the page -> what they stand for here, besides `FILL`."""
        self.folder, self._patch, self._fill = folder, patch, {**FILL, **(fill or {})}
        patch.chdir(folder)

    def save(self, files: Mapping[str, str]) -> None:
        for path, content in files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(content)

    def types(self, line: str, *more: str) -> tuple[int, str]:
        """Exit code, and standard output and error together. `more`: words at the end of an `ecdit` line."""
        said = "|".join(sorted(map(re.escape, self._fill), key=len, reverse=True))
        line = re.sub(rf"(?:{said})(?![\w.-])", lambda found: self._fill[found[0]], line)
        words = shlex.split(line, comments=True)
        if words[0] == "export":
            for word in words[1:]:
                name, _, value = word.partition("=")
                self._patch.setenv(name, value)
            return 0, ""
        if words[0] == "ecdit":
            return ecdit(*words[1:], *more)
        if words[0] == "python":
            words[0] = sys.executable
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def must(self, line: str, *more: str) -> str:
        """What a line says that has to succeed, at the first try."""
        code, said = self.types(line, *more)
        assert code == 0, f"{line}\nexit code {code}\n{said}"
        return said


def ecdit(*words: str) -> tuple[int, str]:
    """`ecdit` in this process."""
    said = io.StringIO()
    heard = logging.StreamHandler(said)  # pytest's handlers keep warnings from stderr, where a user sees them
    heard.setLevel(logging.WARNING)
    logging.getLogger().addHandler(heard)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as left:
            cli.main(list(words))
    finally:
        logging.getLogger().removeHandler(heard)
    code = left.value.code
    return (code if isinstance(code, int) else int(code is not None)), said.getvalue()
