"""From the name of a slot's class in YAML to the class: what may be named, and how little of its file must be read.

A login node composes and checks runs without torch, whose import takes seconds and which it may not have: there only the
declarations of a slot's file are read (`declarations_only`).
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType

from ecdit_train.config.nearest import closest
from ecdit_train.config.slots import TARGET, SlotConfig
from ecdit_train.errors import ConfigError, Problem

_declarations_only: ContextVar[bool] = ContextVar("declarations_only", default=False)


@contextlib.contextmanager
def declarations_only() -> Iterator[None]:
    """Inside, slots are resolved without importing torch: composing and checking a run needs its dataclasses, not its networks."""
    token = _declarations_only.set(True)
    try:
        yield
    finally:
        _declarations_only.reset(token)


def resolve(target: object, base: type[SlotConfig], *, field: str) -> type[SlotConfig]:
    """The class that `target` names.

    Raises:
        ConfigError: no such module or class, or a class that does not fill this slot; with the nearest name.
    """

    def refuse(rule: str, nearest: object | None = None) -> ConfigError:
        return ConfigError(Problem(field=f"{field}.{TARGET}", value=target, rule=rule, nearest=nearest))

    if not isinstance(target, str) or "." not in target or not all(part.isidentifier() for part in target.split(".")):
        raise refuse("must name a class, as in package.module.Class")
    module_name, _, class_name = target.rpartition(".")
    try:
        module = _declarations(module_name) if _declarations_only.get() else importlib.import_module(module_name)
    except Exception as error:  # whatever a file of the user's raises when it is run
        missing = (
            isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == module_name.split(".")[0]
        )
        if not missing:
            raise refuse(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
        rule = (
            f"there is no module {module_name} (a folder of your own is given with --config-dir DIR, or on PYTHONPATH)"
        )
        raise refuse(rule) from error
    found = getattr(module, class_name, None)
    fitting = [name for name, value in vars(module).items() if _fills(value, base) and not name.startswith("_")]
    if found is None:
        near = closest(class_name, fitting)
        raise refuse(f"{module_name} has no {class_name}", f"{module_name}.{near}" if near else None)
    if not _fills(found, base):
        near = closest(class_name, fitting, cutoff=0.0)
        rule = f"is not a frozen dataclass that extends ecdit_train.config.slots.{base.__name__}"
        raise refuse(rule, f"{module_name}.{near}" if near else None)
    return found


def _fills(value: object, base: type[SlotConfig]) -> bool:
    if not isinstance(value, type) or not issubclass(value, base) or value is base or not is_dataclass(value):
        return False
    return bool(value.__dataclass_params__.frozen)  # type: ignore[attr-defined]


def _declarations(name: str) -> ModuleType:
    """The part of a slot's file that composing and checking need: its dataclasses, functions and plain constants, with
    imports of the standard library, `ecdit_train.config` and `ecdit_train.errors`. Read where torch may be absent or
    not worth its seconds.

    Falls back to importing the file whole when that part does not stand by itself.
    """
    if name in sys.modules:
        return sys.modules[name]
    alias = f"{__name__}.declared.{name}"
    if alias in sys.modules:
        return sys.modules[alias]
    path = _source(name)
    if path is None:
        return importlib.import_module(name)
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    tree.body = [node for node in tree.body if _is_declaration(node)]
    module = ModuleType(alias)
    module.__file__ = str(path)
    sys.modules[alias] = module
    try:
        exec(compile(tree, str(path), "exec"), module.__dict__)
    except Exception:
        complete = False
    else:
        complete = _needs(tree) <= vars(module).keys() | vars(builtins).keys()
    if not complete:
        del sys.modules[alias]
        return importlib.import_module(name)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, SlotConfig) and value.__module__ == alias:
            value.declared_as = f"{name}.{value.__qualname__}"
    return module


def _source(name: str) -> Path | None:
    """The file of a module, found without importing its parents."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *rest).with_suffix(".py")
        if path.is_file():
            return path
    return None


_RUNS_LATER = ("build", "build_shared", "open", "integrate", "step_flops", "step_traffic")
"""Methods that composing and checking never call: they may use what was left out."""


def _needs(tree: ast.Module) -> set[str]:
    """Names that the declarations read from their module: what is left out must not be missed when a rule or a
    cost is asked for."""
    needed: set[str] = set()

    def visit(node: ast.AST, own: frozenset[str]) -> None:
        if isinstance(node, ast.FunctionDef):
            if node.name in _RUNS_LATER:
                return
            arguments = (node.args.posonlyargs, node.args.args, node.args.kwonlyargs)
            own |= {a.arg for group in arguments for a in group}
            own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
            for child in (*node.body, *node.args.defaults, *(d for d in node.args.kw_defaults if d)):
                visit(child, own)  # not the annotations of arguments: nobody evaluates them
            return
        if isinstance(node, ast.Lambda):
            own |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
        if isinstance(node, ast.ClassDef):
            own |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in own:
            needed.add(node.id)
        if isinstance(node, ast.comprehension | ast.GeneratorExp | ast.ListComp | ast.SetComp | ast.DictComp):
            own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        for child in ast.iter_child_nodes(node):
            visit(child, own)

    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            visit(node, frozenset())
    while called := [functions.pop(name) for name in needed & functions.keys()]:
        for node in called:  # a function that no dataclass calls may use what it likes
            visit(node, frozenset())
    return needed


def _is_declaration(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import):
        return all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        ours = origin.startswith("ecdit_train.config") or origin == "ecdit_train.errors"
        return node.level == 0 and (ours or origin.split(".")[0] in sys.stdlib_module_names)
    if isinstance(node, ast.ClassDef):
        return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    if isinstance(node, ast.Assign | ast.AnnAssign):
        loaded = (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
        return set(loaded) <= vars(builtins).keys()
    return isinstance(node, ast.FunctionDef) and not node.decorator_list


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the docstring below it, for a dataclass and its bases; read from the source, on one line each."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        module = sys.modules.get(owner.__module__)
        path = getattr(module, "__file__", None)
        if path and owner is not object and not owner.__module__.startswith(("typing", "builtins")):
            docs |= _docs_in(path).get(owner.__qualname__, {})
    return docs


def _docs_in(path: str) -> dict[str, dict[str, str]]:
    tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    found: dict[str, dict[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                before.target.id: " ".join(after.value.value.split())
                for before, after in zip(node.body, node.body[1:], strict=False)
                if isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            }
    return found
