"""Writes the pages of docs/reference that restate the code, so that they cannot drift from it.

    python docs/generate.py           write them
    python docs/generate.py --check   write nothing; exit 1 and name the pages that are out of date

`tests/unit/test_docs.py` makes the same comparison. Imports no torch except through ecdit_train.observe.metrics.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- Written by docs/generate.py (make docs) from {source}. Edit that, not this page. -->\n\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells may hold Markdown, `|` is escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def one_line(text: str) -> str:
    return " ".join(text.split())


# --- commands.md -----------------------------------------------------------------------------------------------------


def commands() -> str:
    from ecdit_train.cli import make_parser

    parser = make_parser()
    parts = [
        NOTE.format(source="the argument parser in ecdit_train/cli.py"),
        "# Commands\n\n",
        "`ecdit VERB --help` prints the same. A WORD is `GROUP=CHOICE` or `section.key=value`: see "
        "[configuration](configuration.md) and [write a config](../how-to/write-a-config.md). What a command returns is in "
        "[exit codes](exit-codes.md).\n\n",
        "Before the verb, for every verb:\n\n",
        _arguments(parser),
    ]
    for name, verb in _verbs(parser):
        text, _, example = (verb.description or "").partition("\n\n")
        parts.append(f"\n## {name}\n\n`{_usage(name, verb)}`\n\n{_sentence(text)}\n")
        if example.strip():
            lines = "\n".join(line.strip() for line in example.strip().splitlines())
            parts.append(f"\n```\n{lines}\n```\n")
        if arguments := _arguments(verb):
            parts.append("\n" + arguments)
    return "".join(parts)


def _verbs(parser: argparse.ArgumentParser, prefix: str = "ecdit") -> list[tuple[str, argparse.ArgumentParser]]:
    """Every leaf verb with its full name, in the parser's order."""
    found: list[tuple[str, argparse.ArgumentParser]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                inner = _verbs(sub, f"{prefix} {name}")
                found += inner or [(f"{prefix} {name}", sub)]
    return found


def _actions(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.Action]]:
    """(name as typed, action) of every argument that is the verb's own."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        value = str(action.metavar or action.dest.upper()) if action.nargs != 0 else ""
        name = f"{action.option_strings[-1]} {value}".strip() if action.option_strings else value
        found.append((name + {"*": " ...", "+": " ..."}.get(str(action.nargs), ""), action))
    return found


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    words = [f"[{text}]" if action.option_strings or action.nargs == "*" else text for text, action in _actions(parser)]
    return " ".join([name, *words])


def _arguments(parser: argparse.ArgumentParser) -> str:
    rows = [[f"`{name}`", _sentence(one_line(action.help))] for name, action in _actions(parser) if action.help]
    return table(["argument", "meaning"], rows) if rows else ""


def _sentence(text: str) -> str:
    """Upper case at the start, unless the first word is to be typed as it stands; a full stop at the end."""
    first = text.partition(" ")[0]
    start = text[:1] if "=" in first else text[:1].upper()
    return (start + text[1:]).rstrip(".") + "." if text else ""


# --- configuration.md ------------------------------------------------------------------------------------------------


def configuration() -> str:
    from ecdit_train.config import schema
    from ecdit_train.config.compat import classes
    from ecdit_train.config.compose import compose, groups
    from ecdit_train.config.convert import flatten, leaf_types
    from ecdit_train.config.describe import comments

    default, meaning, kind = flatten(compose([], local=False)), comments(), classes()
    parts = [
        NOTE.format(source="conf/ and ecdit_train/config/"),
        "# Configuration\n\n",
        "Every key of a run, with the value of the default composition (no words on the command line). `ecdit config show WORD ...` "
        "prints the whole tree for some words; a wrong key or an impossible combination is refused with the nearest valid one "
        "([exit code 77](../runbook/config-refused.md)).\n\n",
        "**On resume** says what a resume may do with the key:\n\n",
        "- *free*: changes where and how a run computes, not what;\n",
        "- *schedule*: changes what happens from here on; only when named on the command line of `ecdit resume`;\n",
        "- *identity*: changes the network, the data order or a random draw: another run, refused with "
        "[exit code 79](../runbook/another-configuration.md).\n\n",
        "`train.microbatch` is free, except under `moe.scope=batch`, where it is the routing pool.\n",
    ]
    sections: dict[str, list[str]] = {}
    for key in leaf_types():
        sections.setdefault(key.rpartition(".")[0], []).append(key)
    classes_of = {"": schema.RunConfig, **_section_classes(schema.RunConfig)}
    last_of_group = {section.partition(".")[0]: section for section in sections}
    for section, keys in sections.items():
        parts.append(f"\n## {section or 'top level'}\n\n")
        if (
            section
            and (doc := classes_of[section].__doc__ or "").strip()
            and "(" not in doc[: len(classes_of[section].__name__) + 1]
        ):
            parts.append(one_line(doc) + "\n\n")
        group = section.partition(".")[0]
        rows = [
            [
                f"`{key}`",
                _value(default[key]),
                _type(leaf_types()[key]),
                kind[key],
                _meaning(meaning.get(key, ""), group),
            ]
            for key in keys
        ]
        parts.append(table(["key", "default", "type", "on resume", "meaning"], rows))
        if group in groups() and section == last_of_group[group]:
            parts.append("\n" + _choices(group))
    parts.append(
        "\n## experiment\n\nPresets: whole runs as differences from the default. `experiment=NAME` chooses one.\n\n"
    )
    parts.append(_choices("experiment", sentence=False))
    parts.append("\n## debug\n\nChecks on top of any experiment, as in `experiment=shapes_tiny debug=sanity`.\n\n")
    parts.append(_choices("debug", sentence=False))
    return "".join(parts)


def _section_classes(cls: type, prefix: str = "") -> dict[str, type]:
    import dataclasses

    from ecdit_train.config.convert import hints

    found: dict[str, type] = {}
    for name, hint in hints(cls).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            found[f"{prefix}{name}"] = hint
            found |= _section_classes(hint, f"{prefix}{name}.")
    return found


def _meaning(comment: str, group: str) -> str:
    """A key's comment without the line that heads its file, which `describe.comments` joins to the first key."""
    for headline in _headlines(group).values():
        comment = comment.removeprefix(headline).lstrip()
    return comment


def _choices(group: str, *, sentence: bool = True) -> str:
    rows = [[f"`{group}={choice}`", headline] for choice, headline in _headlines(group).items()]
    lead = f"Choices of the whole group `{group}`:\n\n" if sentence else ""
    return lead + table(["choice", "what it is"], rows)


def _headlines(group: str) -> dict[str, str]:
    """Choice -> the comment that heads its file."""
    from ecdit_train.config.compose import conf_folder, groups

    return {choice: _headline(conf_folder() / group / f"{choice}.yaml") for choice in groups().get(group, ())}


def _headline(file: Path) -> str:
    """The comment that heads a YAML file, without Hydra's package line."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        return line.removeprefix("# ") if line.startswith("#") else ""
    return ""


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return (
            f"{len(value)} entries"
            if value and any(" " in str(v) for v in value)
            else "[" + ", ".join(map(str, value)) + "]"
        )
    return str(value)


def _type(hint: Any) -> str:
    from ecdit_train.config.convert import type_name

    return type_name(hint)


# --- metrics.md ------------------------------------------------------------------------------------------------------


def metrics() -> str:
    from ecdit_train.observe.metrics import METRICS

    parts = [
        NOTE.format(source="METRICS in ecdit_train/observe/metrics.py"),
        "# Metrics\n\n",
        "Every name that a training run logs to `metrics.jsonl` and W&B. A record is made every `observe.log_every` steps and at the "
        "last step. **Reduction** is over the steps since the last record, and then over ranks; `last` takes the newest step. `{n}` is "
        "the number of a sparse block, counted from 1. Each line of `metrics.jsonl` also has `step` (updates done) and `time` (seconds "
        "since the epoch); a value that is not finite is written as `null`.\n",
    ]
    for group in dict.fromkeys(name.partition("/")[0] for name in METRICS):
        rows = [
            [f"`{name}`", m.unit, m.reduction, m.question]
            for name, m in METRICS.items()
            if name.startswith(f"{group}/")
        ]
        parts.append(f"\n## {group}\n\n" + table(["name", "unit", "reduction", "the question it answers"], rows))
    return "".join(parts)


# --- exit-codes.md ---------------------------------------------------------------------------------------------------

ERROR_MODULES = ("ecdit_train.errors", "data_pipeline.errors", "launch.submit")
RUNBOOK = {
    "MissingShard": "bad-shards",
    "TruncatedShard": "bad-shards",
    "CorruptShard": "bad-shards",
    "UndecodableImage": "bad-shards",
    "BadCaption": "bad-shards",
    "WrongView": "bad-shards",
    "BadMember": "bad-shards",
    "BadSplit": "bad-shards",
    "TooManyBad": "bad-shards",
    "BadArray": "bad-shards",
    "DataError": "bad-shards",
    "ConfigError": "config-refused",
    "CheckpointError": "corrupt-checkpoint",
    "RunFolderError": "another-configuration",
    "NonFiniteError": "non-finite-loss",
    "PeerLostError": "hang",
}
HOWTO = {"EncoderError": "use-real-encoders", "SubmitError": "submit-to-slurm", "PeerLostError": "debug-a-run"}


def error_classes() -> list[type[Exception]]:
    """Every class with an exit code of its own, by code."""
    found = {
        member
        for name in ERROR_MODULES
        for member in vars(importlib.import_module(name)).values()
        if isinstance(member, type) and issubclass(member, Exception) and "exit_code" in vars(member)
    }
    return sorted(found, key=lambda error: (error.exit_code, error.__name__))  # type: ignore[attr-defined]


def exit_codes() -> str:
    from ecdit_train import errors

    rows = [
        [str(errors.EXIT_OK), "", "Done.", ""],
        ["2", "", "The command line itself cannot be read (unknown verb or option).", "`ecdit VERB --help`"],
        [
            str(errors.EXIT_REQUEUE),
            "",
            "Stopped on request with everything saved: run it again.",
            "[submit to Slurm](../how-to/submit-to-slurm.md)",
        ],
    ]
    for error in error_classes():
        if error is errors.EcditError:
            rows.append(
                [
                    str(error.exit_code),
                    f"`{error.__name__}`",
                    "An error without a code of its own, or a defect of ecdit (then with a traceback).",
                    "[debug a run](../how-to/debug-a-run.md)",
                ]
            )
            continue
        name, text = error.__name__, one_line((error.__doc__ or "").split("\n\n")[0])
        link = f"[{RUNBOOK[name]}](../runbook/{RUNBOOK[name]}.md)" if name in RUNBOOK else ""
        link = f"[{HOWTO[name]}](../how-to/{HOWTO[name]}.md)" if name in HOWTO else link
        rows.append([str(error.exit_code), f"`{name}`", text, link])  # type: ignore[attr-defined]
    rows.sort(key=lambda row: int(row[0]))
    return "".join(
        [
            NOTE.format(source=", ".join(f"`{name}`" for name in ERROR_MODULES).replace("`", "")),
            "# Exit codes\n\n",
            "What an `ecdit` process returns, also as one of several ranks. Every code from 60 on comes with one line per problem on stderr: "
            "`ecdit: CLASS: what, where, the rule, the nearest valid value`.\n\n",
            table(["code", "class", "meaning", "what to do"], rows),
            "\n`ecdit --nproc N` returns the code of the first rank that failed, or 128 + the number of the signal that ended it. torchrun "
            "turns every failure into 1, so a rank also leaves its code in the file that `ECDIT_EXIT_FILE` names; the job script of "
            "`ecdit launch` reads it.\n",
        ]
    )


# --- plan-json.md ----------------------------------------------------------------------------------------------------


def plan_json() -> str:
    from ecdit_train.plan import document

    lines = (document.__doc__ or "").splitlines()
    rule = next(i for i, line in enumerate(lines) if re.fullmatch(r"\s*-+  +-+", line))
    second = lines[rule].rindex(" ") + 1
    rows: list[list[str]] = []
    for line in lines[rule + 1 :]:
        if not line.strip():
            continue
        key, value = line[:second].strip(), line[second:].strip()
        if key:
            rows.append([f"`{key}`", value])
        else:
            rows[-1][1] += " " + value
    return "".join(
        [
            NOTE.format(source="the docstring of ecdit_train/plan/document.py"),
            "# What `ecdit plan --json` prints\n\n",
            "One JSON object. Keys are stable; numbers are plain (bytes, seconds, FLOPs, parameters). Everything in it is arithmetic from the "
            "configuration and the rates that the [cluster section](configuration.md#cluster) states. It was never measured on a GPU: use it "
            "to compare layouts, not to promise a date.\n\n",
            table(["key", "value"], rows),
            "\n`suggested_layout.overrides` can be pasted behind `ecdit train` or `ecdit launch`. Rules of thumb are in "
            "[choose a layout](../how-to/choose-a-layout.md).\n",
        ]
    )


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands,
    "configuration.md": configuration,
    "metrics.md": metrics,
    "exit-codes.md": exit_codes,
    "plan-json.md": plan_json,
}


def stale() -> list[str]:
    """Generated pages whose text is not what the code says now."""
    return [
        name
        for name, make in PAGES.items()
        if not (REFERENCE / name).is_file() or (REFERENCE / name).read_text(encoding="utf-8") != make()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="write the generated pages of docs/reference")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    check = parser.parse_args(argv).check
    out_of_date = stale()
    for name in out_of_date:
        if not check:
            (REFERENCE / name).write_text(PAGES[name](), encoding="utf-8")
        print(f"docs/reference/{name} {'is out of date' if check else 'written'}")
    return 1 if check and out_of_date else 0


if __name__ == "__main__":
    sys.exit(main())
