"""Writes the pages of docs/reference that restate the code, so that they cannot drift from it.

    python docs/generate.py           write them
    python docs/generate.py --check   write nothing; exit 1 and name the pages that are out of date

`tests/unit/test_docs.py` makes the same comparison. Imports no torch.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        value = ""
        if action.nargs != 0:
            value = str(action.metavar or "|".join(action.choices or ()) or action.dest.upper())
            value = f"[{value}]" if action.nargs == "?" else value
        option = next((o for o in action.option_strings if o.startswith("--")), "")
        name = f"{option} {value}".strip()
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


@functools.cache
def configuration() -> str:
    from ecdit_train.config import compat, compose, convert, describe, installed, resolve
    from ecdit_train.config.schema import RunConfig
    from ecdit_train.config.slots import SLOTS

    parts = [
        NOTE.format(source="conf/ and ecdit_train/config/"),
        "# Configuration\n\n",
        "Every key of a run: first the sections, with the values of the default composition (no words on the command line), then the "
        "[slots](#slots), with every class that can fill one and its keys. `ecdit config show WORD ...` prints the whole tree for some "
        "words, `ecdit config explain KEY` one key, `ecdit slots` the slots, those of your own folder too; a wrong key or an impossible "
        "combination is refused with the nearest valid one ([exit code 77](../runbook/config-refused.md)).\n\n",
        "**On resume** says what a resume may do with the key:\n\n",
        "- *free*: changes where and how a run computes, not what;\n",
        "- *schedule*: changes what happens from here on; only when named on the command line of `ecdit resume`;\n",
        "- *identity*: changes the network, the data order or a random draw: another run, refused with "
        "[exit code 79](../runbook/another-configuration.md).\n\n",
        "`train.microbatch` is free, except under `moe.scope=batch`, where a microbatch is the routing group.\n",
    ]
    with resolve.declarations_only():
        default = compose.compose([], local=False)
        found = installed.installed()
        slots = {slot.key.removesuffix(".*"): slot for slot in SLOTS}
        kinds, meaning, types, values = (
            f(default) for f in (compat.classes, describe.meanings, convert.key_types, convert.flatten)
        )
        owners = {"": RunConfig} | {
            name: type(getattr(default, name)) for name in convert.section_names(default) if "." not in name
        }
        for section, owner in owners.items():
            parts.append(f"\n## {section or 'top level'}\n\n")
            if section and (text := describe_class(owner)):
                parts.append(text + "\n\n")
            rows = []
            for name in convert.hints(owner):
                key = f"{section}.{name}".lstrip(".")
                if key in slots:
                    taken = ", ".join(c.name for c in found[slots[key].key] if c.target in _targets(default, key))
                    about = f"{slots[key].meaning[:1].upper()}{slots[key].meaning[1:]}."
                    rows.append([f"`{key}`", taken, f"[slot](#{anchor(key)})", "", about])
                elif section or key in types:  # a section within lists its keys here
                    within = [k for k in types if k == key or k.startswith(f"{key}.")]
                    rows += [
                        [f"`{k}`", _value(values[k]), convert.type_name(types[k]), kinds[k], meaning[k]] for k in within
                    ]
            parts.append(table(["key", "default", "type", "on resume", "meaning"], rows))
            if section in compose.groups():
                parts.append("\n" + _choices(section))
        parts.append(
            "\n## Slots\n\n"
            "A slot is filled with an object of a class, which has keys of its own. `GROUP=NAME` takes a file of the slot's group, and the file "
            "names the class (`_target_`); a class and a file of your own do as well as these: "
            "[write a config](../how-to/write-a-config.md#a-class-of-your-own). "
            "The value is the one in the file.\n"
        )
        for key, slot in slots.items():
            parts.append(f"\n### {key}\n\n{slot.meaning[:1].upper()}{slot.meaning[1:]}: `{slot.group}=NAME`.\n\n")
            rows = []
            for choice in found[slot.key]:
                with_it = compat.classes(compose.compose([f"{slot.group}={choice.name}"], local=False))
                prefix = f"{key}.{choice.name}" if slot.key.endswith(".*") else key
                row = [f"`{choice.name}`", f"`{choice.target}`", "", with_it[f"{prefix}._target_"], choice.meaning]
                rows.append(row)
                rows += [
                    ["", f"`{prefix}.{k.name}` = {_value(k.value)}", k.type, with_it[f"{prefix}.{k.name}"], k.meaning]
                    for k in choice.keys
                ]
            parts.append(table(["name", "class, and its keys", "type", "on resume", "meaning"], rows))
    parts.append(
        "\n## experiment\n\nPresets: whole runs as differences from the default. `experiment=NAME` chooses one.\n\n"
    )
    parts.append(_choices("experiment", sentence=False))
    parts.append("\n## debug\n\nChecks on top of any experiment, as in `experiment=shapes_tiny debug=sanity`.\n\n")
    parts.append(_choices("debug", sentence=False))
    return "".join(parts)


def describe_class(cls: type) -> str:
    """The first paragraph of a class's docstring on one line; nothing where a dataclass has none of its own."""
    text = one_line((cls.__doc__ or "").split("\n\n")[0])
    return "" if text.startswith(f"{cls.__name__}(") else text


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _targets(config: Any, key: str) -> set[str]:
    """The classes that fill a slot."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    objects = value.values() if isinstance(value, Mapping) else [value]
    return {type(o).target() for o in objects}


def _choices(group: str, *, sentence: bool = True) -> str:
    from ecdit_train.config.compose import conf_folder, groups

    rows = [[f"`{group}={name}`", _headline(conf_folder() / group / f"{name}.yaml")] for name in groups()[group]]
    return (f"Choices of the whole group `{group}`:\n\n" if sentence else "") + table(["choice", "what it is"], rows)


def _headline(file: Path) -> str:
    """The comment that heads a YAML file, without Hydra's package line."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# "))
    return " ".join(lines)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        if any(" " in str(v) for v in value):
            return f"{len(value)} entries"
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)


# --- metrics.md ------------------------------------------------------------------------------------------------------


def metrics() -> str:
    from ecdit_train.observe.metric_table import METRICS

    parts = [
        NOTE.format(source="METRICS in ecdit_train/observe/metric_table.py") + "# Metrics\n\n",
        "Every name that a training run logs, every `observe.log_every` steps and at the last one. **Reduction** is over the "
        "steps since the last record, and then over ranks; `last` takes the newest step. `moe/` is of the record's own step, "
        "whole; ratios, spreads and maxima are taken of sums, so no number depends on the layout "
        "([how](../explanation/routing-numbers.md)). `{n}` is the number of a sparse block, counted from 1; `{b}` a tenth of "
        "the timesteps, 0 (noise) to 9 (data). Lines also have `step` and `time` (seconds since the epoch); what is not finite "
        "is `null`.\n",
    ]
    for group in dict.fromkeys(name.partition("/")[0] for name in METRICS):
        rows = [[f"`{n}`", m.unit, m.reduction, m.question] for n, m in METRICS.items() if n.startswith(f"{group}/")]
        parts.append(f"\n## {group}\n\n" + table(["name", "unit", "reduction", "the question it answers"], rows))
    return "".join(parts)


# --- exit-codes.md ---------------------------------------------------------------------------------------------------

ERROR_MODULES = ("ecdit_train.errors", "data_pipeline.errors", "launch.submit")
_SHARDS = "MissingShard TruncatedShard CorruptShard UndecodableImage BadCaption WrongView BadMember BadSplit TooManyBad BadArray StoreTrouble ChangedShard DataError"
RUNBOOK = dict.fromkeys(_SHARDS.split(), "bad-shards") | {
    "NoProgressError": "no-progress",
    "ConfigError": "config-refused",
    "CheckpointError": "corrupt-checkpoint",
    "RunFolderError": "another-configuration",
    "NonFiniteError": "non-finite-loss",
    "RunOwnedError": "owned-run",
    "HangError": "hang",
    "StorageError": "storage",
    "RendezvousError": "rendezvous",
    "CorruptionError": "replica-differs",
    "OutOfMemoryError": "out-of-memory",
}
HOWTO = {
    "EncoderError": "use-real-encoders",
    "SubmitError": "submit-to-slurm",
    "PeerLostError": "debug-a-run",
    "UnfitError": "check-a-machine",
}


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
    return "".join(
        [
            NOTE.format(source=", ".join(f"`{name}`" for name in ERROR_MODULES).replace("`", "")),
            "# Exit codes\n\n",
            "What an `ecdit` process returns, also as one of several ranks. Every code from 60 on comes with one line per problem on stderr: "
            "`ecdit: CLASS: what, where, the rule, the nearest valid value`.\n\n",
            table(["code", "class", "meaning", "what to do"], sorted(rows, key=lambda row: int(row[0]))),
            "\n`ecdit --nproc N` returns the code of the first rank that failed, or 128 + the number of the signal that ended it. torchrun "
            "turns every failure into 1, srun into that of a killed task, so the first process that fails also leaves its code in the file that `ECDIT_EXIT_FILE` "
            "names; the supervisor of a job reads it.\n",
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
