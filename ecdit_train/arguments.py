"""Words of the verbs that draw, grade and make data: Hydra's grammar, read into one frozen dataclass for each verb.

What is not a word of the verb's own is a word about the configuration (`sample.guidance=3`), and left to `config.compose`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ecdit_train.config.convert import convert, type_name
from ecdit_train.config.nearest import closest_key
from ecdit_train.config.overrides import Ledger, Word, parse, plain, quoted, split
from ecdit_train.config.resolve import declarations_only
from ecdit_train.errors import ConfigError, Problem, RunFolderError

if TYPE_CHECKING:
    from ecdit_train.config.schema import RunConfig

    Task = str  # `types` puts the six names in its place, so that `--help` need not import them

T = TypeVar("T")

DRAWN_WITH = ("sample", "encoders")
"""Sections of a run's configuration that drawing may change."""

Check = Callable[[Mapping[str, Any]], Iterable[Problem]]
"""Rules between the words of a verb."""


def word(form: str, *, least: int | None = None, file: bool = False, **default: Any) -> Any:
    """A field that a word sets. `form` is what `--help` shows behind `=`; `least` its smallest value; `file`: `@FILE` too."""
    return field(metadata={"form": form, "least": least, "file": file}, **default)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What `ecdit sample` draws."""

    run: str = word("FOLDER")
    prompts: tuple[str, ...] = word("[A,B,...] or prompts=@FILE (one a line)", file=True)
    out: str | None = word("FILE", default=None)
    repeat: int = word("N", least=1, default=1)
    weights: Literal["ema", "raw"] = word("ema|raw", default="ema")
    step: int | None = word("N", least=0, default=None)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What `ecdit evaluate` grades."""

    run: str = word("FOLDER")
    tasks: tuple[Task, ...] = word("[A,B,...]", default=())
    """Empty: all six."""
    split: Literal["all", "train", "heldout"] = word("all|train|heldout", default="all")
    repeat: int = word("N", least=1, default=1)
    weights: Literal["ema", "raw"] = word("ema|raw", default="ema")
    step: int | None = word("N", least=0, default=None)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What `ecdit allocation` looks at."""

    run: str = word("FOLDER")
    seeds: int = word("N", least=1, default=3)
    images: int = word("N", least=1, default=64)
    """Of each seed, at least."""
    pictures: str | None = word("FOLDER", default=None)
    """True pictures NAME.png with NAME.mask.png and NAME.txt; None: coloured shapes."""
    drawn: bool | None = word("true|false", default=None)
    """None: where objects of drawn pictures can be told from their background (coloured shapes)."""
    out: str | None = word("FILE.json", default=None)
    weights: Literal["ema", "raw"] = word("ema|raw", default="ema")
    step: int | None = word("N", least=0, default=None)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What `ecdit merge` averages: the `last` steps, or those named."""

    run: str = word("FOLDER")
    out: str = word("FOLDER")
    last: int | None = word("N", least=2, default=None)
    steps: tuple[int, ...] = word("[A,B,...]", default=())
    weights: Literal["uniform", "linear"] = word("uniform|linear", default="uniform")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """What `ecdit ckpt verify` reads."""

    step: int | None = word("N", least=0, default=None)
    """None: all."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What `ecdit ckpt export` writes."""

    run: str = word("FOLDER")
    out: str = word("FOLDER")
    step: int | None = word("N", least=0, default=None)
    weights: Literal["ema", "raw"] = word("ema|raw", default="ema")
    form: Literal["weights", "pipeline"] = word("weights|pipeline", default="weights")
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = word(
        "stored|float32|bfloat16|float16", default="stored"
    )


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    """What `ecdit ckpt upcycle` makes of a dense run."""

    run: str = word("FOLDER")
    out: str = word("FOLDER")
    step: int | None = word("N", least=0, default=None)
    weights: Literal["ema", "raw"] = word("ema|raw", default="ema")
    router: Literal["normal", "zeros"] = word("normal|zeros", default="normal")
    noise: float = word("SHARE", default=0.0)
    scale: float = word("FACTOR", default=1.0)


@dataclass(frozen=True, kw_only=True)
class RoutingStudy:
    """What `ecdit study routing` trains and measures."""

    out: str = word("FOLDER", default="runs/study")
    size: Literal["small", "gpu"] = word("small|gpu", default="small")
    arms: tuple[str, ...] = word("[A,B,...]", default=())
    """Empty: all routers. A name that is none of them is a choice of the group `moe`."""
    seeds: tuple[int, ...] = word("[1,2,...]", default=())
    """Empty: the size's."""
    nproc: int | None = word("N", least=1, default=None)
    """Ranks of each run; None: the size's."""


def forms(kind: type) -> str:
    """`run=FOLDER, ...; optional: out=FILE, ...`: the words of a verb, for its help."""
    every = {f.name: f"{f.name}={f.metadata['form']}" for f in dataclasses.fields(kind)}
    needed = [every[name] for name in _required(kind)]
    rest = [text for name, text in every.items() if text not in needed]
    return "; ".join([*([", ".join(needed)] if needed else []), "optional: " + ", ".join(rest)])


def types(kind: type) -> dict[str, Any]:
    """Name -> type of a verb's words."""
    from data_pipeline.shapes.prompts import TASKS

    return get_type_hints(kind, localns={"Task": Literal[TASKS]})


def _required(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A verb's words, read as far as they can be."""

    values: Mapping[str, Any]
    rest: tuple[str, ...]
    """Words that are not the verb's own."""
    problems: tuple[Problem, ...]

    def build(self, kind: type[T], *more: Problem) -> T:
        """The verb's dataclass. Raises one ConfigError with every problem, these and more."""
        if self.problems or more:
            raise ConfigError([*self.problems, *more])
        return kind(**self.values)


def read(kind: type, words: Sequence[str], *, alone: bool = False) -> Request:
    """The words of a verb. Whether they are enough and right is in `problems`.

    Args:
        kind: one of the dataclasses above.
        words: of the command line.
        alone: whether the verb has no configuration, so that a word which is not its own is wrong.
    """
    known, ledger, values, rest = types(kind), Ledger(words=list(words)), {}, []
    marks = {f.name: f.metadata for f in dataclasses.fields(kind)}
    named = set()
    for w in split(words):
        if w.key in known:
            named.add(w.key)
            values[w.key] = _read_own(w, known[w.key], marks[w.key], ledger)
        elif alone:
            near = closest_key(w.key, list(known), cutoff=0.5)
            ledger.wrong(w, rule="is not a key of this verb", value=w.value_text, nearest=near)
        else:
            rest.append(w.text)
    missing = [
        Problem(field=name, value=None, rule=f"is required: {name}={marks[name]['form']}")
        for name in _required(kind)
        if name not in named
    ]
    return Request(values=values, rest=tuple(rest), problems=(*ledger.problems(), *missing))


def about_a_run(
    kind: type[T], words: Sequence[str], *, sections: Sequence[str], config_dir: str | None, also: Check | None = None
) -> tuple[T, RunConfig]:
    """A verb's own words, and the configuration of the run that they name with the others applied.

    Args:
        kind: one of the dataclasses above, with a word `run`.
        words: of the command line.
        sections: what the others may change of the run's configuration.
        config_dir: where the user's modules are.
        also: what else may be wrong, asked of the verb's own words as far as they could be read.

    Raises:
        ConfigError: every mistake of both at once.
        RunFolderError: no run there.
    """
    from ecdit_train.config import compose, stored

    request = read(kind, words)
    more = list(also(request.values)) if also is not None else []
    run = request.values.get("run")
    if run is None:
        request.build(kind, *more)  # says so, and what else is wrong
    own = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    try:
        with declarations_only():
            old = dataclasses.replace(stored.load(str(run), config_dir=config_dir), run=str(run))
            config = compose.override(old, request.rest, sections=sections, own=own).config
    except ConfigError as error:
        if not error.problems:
            raise
        request.build(kind, *more, *error.problems)
    except RunFolderError:
        request.build(kind, *more)
        raise
    return request.build(kind, *more), config


def _read_own(w: Word, hint: Any, marks: Mapping[str, Any], ledger: Ledger) -> Any:
    parsed, text = w.parsed, w.value_text
    if parsed is None or parsed.is_sweep_override():
        items = [item.strip() for item in text.strip("[]{}").split(",")]
        options = [quoted(text), "[" + ",".join(map(quoted, items)) + "]", f"{{{text}}}"]
        if parsed is not None:
            options = [f"[{text}]", f"{{{text}}}", items[0]]
        fits = (option for option in options if _fits(f"{w.key}={option}", hint, marks))
        near = next((f"{w.key}={option}" for option in fits), None) if "=" in w.text else None
        rule = "takes one value, or a list [a,b]; a comma inside a text stands between quotes"
        if parsed is None:
            rule = "cannot be read; put quotes around special characters" if "=" in w.text else "is not key=value"
        ledger.wrong(w, rule=rule, value=text or None, nearest=near)
        return None
    if w.sign:
        bare = f"{w.key}={text}" if text else None
        ledger.wrong(w, rule="is a word of the verb: it takes no `+` or `~`", value=text or None, nearest=bare)
        return None
    problems: list[Problem] = []
    value = _convert(hint, plain(parsed), field=w.key, marks=marks, problems=problems)
    for problem in problems:
        better = problem.nearest
        if better is None and text[:1] not in ("'", '"') and _fits(f"{w.key}={quoted(text)}", hint, marks):
            better = quoted(text)
        ledger.found.append((w.index, dataclasses.replace(problem, nearest=better)))
    return value


def _fits(text: str, hint: Any, marks: Mapping[str, Any]) -> bool:
    parsed, problems = parse(text), list[Problem]()
    if parsed is None or parsed.is_sweep_override():
        return False
    _convert(hint, plain(parsed), field=parsed.key_or_group, marks=marks, problems=problems)
    return not problems


def _convert(hint: Any, value: Any, *, field: str, marks: Mapping[str, Any], problems: list[Problem]) -> Any:
    """As `config.convert.convert`, and: one value for a list of one, mappings, lists of a fixed length, `@FILE`."""
    origin, args = get_origin(hint), get_args(hint)
    mapping = next((a for a in args if get_origin(a) is dict), None)
    if mapping is not None and value is not None:
        return _convert_mapping(mapping, value, field=field, problems=problems)
    if origin is not tuple:
        got = convert(hint, value, field=field, problems=problems)
        if isinstance(got, int) and marks["least"] is not None and got < marks["least"]:
            rule = f"must be at least {marks['least']}"
            problems.append(Problem(field=field, value=got, rule=rule, nearest=marks["least"]))
        return got
    if marks["file"] and isinstance(value, str) and value.startswith("@"):
        try:
            value = Path(value[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(field=field, value=value, rule=f"cannot be read: {error}"))
            return None
    if marks["file"]:
        value = [v for v in (value if isinstance(value, list) else [value]) if not isinstance(v, str) or v.strip()]
        if not value:
            problems.append(
                Problem(field=field, value=value, rule="needs at least one, as in 'a photo of a red circle'")
            )
            return None
    if args[-1] is not Ellipsis and (not isinstance(value, list) or len(value) != len(args)):
        rule = f"must be a list of {len(args)} numbers: {field}={marks['form']}"
        problems.append(Problem(field=field, value=value, rule=rule))
        return None
    several: Any = tuple.__class_getitem__((args[0], ...))
    return convert(several, value if isinstance(value, list) else [value], field=field, problems=problems)


def _convert_mapping(hint: Any, value: Any, *, field: str, problems: list[Problem]) -> Any:
    key_hint, value_hint = get_args(hint)
    if not isinstance(value, Mapping):
        rule = f"must be {{name: number, ...}}, each name {type_name(key_hint)}"
        problems.append(Problem(field=field, value=value, rule=rule))
        return None
    return {
        convert(key_hint, key, field=f"{field}.{key}", problems=problems): convert(
            value_hint, inner, field=f"{field}.{key}", problems=problems
        )
        for key, inner in value.items()
    }
