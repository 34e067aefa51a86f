"""Slots: the places of a run that anyone can fill, from the package or from a folder of one's own. Imports no torch.

A slot is filled by naming a class: the YAML of its Hydra group says `_target_: package.module.Class`, and the class is a
frozen dataclass with the implementation's keys, which lives in one file with what it configures. The rest of the system asks
that object, never its name: it checks itself (`check`), says what it costs (for `ecdit plan`) and builds what runs.
docs/decisions/0012 says why `_target_`, and what it means for a run folder from elsewhere.

The classes below are what a slot's configuration must offer. A method that raises NotImplementedError must be written; the
others have a default.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from ecdit_train.config.nearest import closest
from ecdit_train.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ecdit_train.config.rules import Checker
    from ecdit_train.config.schema import RunConfig

TARGET = "_target_"
"""Hydra's key for the class of an object."""


class SlotConfig:
    """Base of every slot's configuration."""

    declared_as: ClassVar[str | None] = None
    """Where the class lives, when only its declaration was read (`declarations_only`)."""

    @classmethod
    def target(cls) -> str:
        """`package.module.Class`, as a YAML file names it."""
        return cls.declared_as or f"{cls.__module__}.{cls.__qualname__}"

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        """Appends what is wrong with this object in its run; `key` is the dotted key of the slot, as in `moe.router`."""

    def paths(self) -> tuple[str, ...]:
        """Files and folders that it reads: a job's container must see them."""
        return ()


class RouterConfig(SlotConfig):
    """Decides which tokens an expert works on (`model.router.Router`).

    Costs are per token of a sparse layer, forward only.
    """

    whole_batch: ClassVar[bool] = False
    """Whether it selects over all tokens of a microbatch on all ranks, whatever the groups: a resume may
    not change `train.microbatch` then."""

    def experts_per_token(self) -> float:
        """Mean number of experts that work on a token: what the layer's arithmetic and traffic are proportional to."""
        raise NotImplementedError

    def capacity(self, *, group_tokens: int, num_experts: int) -> float | None:
        """Rows that an expert takes of a routing group when that number never changes; None when it varies. A value that is not
        whole is refused by the configuration's rules."""
        raise NotImplementedError

    def flops_per_token(self, *, width: int, num_experts: int) -> float:
        """Forward FLOPs: the product with a (width, num_experts) matrix."""
        return 2.0 * width * num_experts

    def kept_bytes_per_token(self, *, width: int, num_experts: int, compute_bytes: int) -> float:
        """Bytes that autograd keeps: the fp32 copy of the input (where it is not fp32 already), affinities and their softmax."""
        return (4.0 * width if compute_bytes < 4 else 0.0) + 8.0 * num_experts

    def build(self, *, width: int, num_experts: int) -> nn.Module:
        """A `model.router.Router`. Called under the meta device: make parameters and buffers, never values."""
        raise NotImplementedError


class ExpertsConfig(SlotConfig):
    """The arithmetic of the experts' feed-forward (`model.moe.Experts`). A row is one token at one expert."""

    def flops_per_row(self, *, width: int, hidden: int) -> float:
        """Forward FLOPs: two matrix products."""
        return 4.0 * width * hidden

    def kept_values_per_row(self, *, width: int, hidden: int) -> float:
        """Values of the compute type that autograd keeps: before and after the activation, and the result."""
        return 2.0 * hidden + width

    def build(self, *, width: int, hidden: int, num_experts: int) -> nn.Module:
        """A `model.moe.Experts`. Called under the meta device."""
        raise NotImplementedError


class DispatcherConfig(SlotConfig):
    """How rows are gathered for the experts and their results summed (`model.moe.Dispatcher`)."""

    same_result: ClassVar[bool] = False
    """Whether it computes what any other such class computes, up to rounding, so that a resume may change from one to the other."""

    cap: float | None = None
    """For routers whose number of rows varies. None: counts are exchanged, then just these rows. A number: a static table of `cap`
    times the mean rows per expert and group; rows beyond it are dropped, lowest gates first, and counted."""

    def build(self) -> Any:
        """A `model.moe.Dispatcher` for one device; `parallel.expert_parallel` carries its rows over ranks."""
        raise NotImplementedError


class TextEncoderConfig(SlotConfig):
    """Frozen text encoder: captions to features."""

    if TYPE_CHECKING:  # fields or constants of the class that fills the slot

        @property
        def width(self) -> int:
            """Channels of a feature."""

        @property
        def max_tokens(self) -> int:
            """Tokens per caption; longer captions are cut."""

    stored: ClassVar[bool] = False
    """Whether the shards hold the features, so that nothing runs in training."""

    def num_parameters(self) -> int:
        """Frozen parameters, for the plan."""
        return 0

    def flops_per_image(self) -> float:
        """Forward FLOPs in training."""
        return 0.0

    def build(self, *, device: torch.device | str, dtype: torch.dtype) -> Any:
        """A `diffusion.encoders.TextEncoder`, or None where there is none to run."""
        raise NotImplementedError


class ImageCodecConfig(SlotConfig):
    """Frozen image codec: pixels to latents and back."""

    if TYPE_CHECKING:  # fields or constants of the class that fills the slot

        @property
        def channels(self) -> int:
            """Channels of the latent."""

        @property
        def factor(self) -> int:
            """Pixels per latent, each way."""

        @property
        def scale(self) -> float:
            """latent = (encoded - shift) * scale."""

        @property
        def shift(self) -> float: ...

    stored: ClassVar[bool] = False
    """Whether the shards hold the latents."""

    def num_parameters(self) -> int:
        """Frozen parameters that run in training, for the plan."""
        return 0

    def flops_per_image(self, *, resolution: int) -> float:
        """Forward FLOPs of encoding one image."""
        return 0.0

    def build(self, *, device: torch.device | str, dtype: torch.dtype) -> Any:
        """A `diffusion.encoders.ImageCodec`, or None where there is none to run."""
        raise NotImplementedError


class SamplerConfig(SlotConfig):
    """Integrates dx = v(x, t) dt from t = 0 (noise) to t = 1 (data)."""

    def times(self, steps: int) -> tuple[float, ...]:
        """The `steps + 1` ascending times between which a step is taken, from 0 to 1; equal steps unless overridden."""
        return tuple(n / steps for n in range(steps + 1))

    def integrate(self, velocity: Any, x: Any, *, times: tuple[float, ...]) -> Any:
        """`velocity(x, t)` is the guided velocity at (B, C, H, W) and time t; returns x at t = 1. v is not asked for at t = 1,
        where a data prediction has none."""
        raise NotImplementedError


class OptimizerConfig(SlotConfig):
    """The update rule; rate, warm-up, clipping and averaging are the `optim` section's."""

    def state_bytes(self) -> float:
        """Bytes of state per parameter."""
        return 8.0

    def build(self, params: Mapping[str, nn.Parameter], *, lr: float) -> Any:
        """A `torch.optim.Optimizer` whose state exists already: `state[p]` holds `step` (a tensor) and tensors shaped and sharded
        like p, so that memory shows up at the start and a checkpoint can be loaded into it. `lr` is set anew before every step."""
        raise NotImplementedError


class SinkConfig(SlotConfig):
    """Somewhere that records and pictures are copied to, beside metrics.jsonl."""

    def open(self, run: Any) -> Any:
        """An `observe.sinks.Sink` for an `observe.sinks.SinkContext`. Called on rank 0 only."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One kind of slot."""

    key: str
    """Dotted key in the configuration; several objects by name where it ends in `.*`."""
    base: type[SlotConfig]
    meaning: str

    @property
    def group(self) -> str:
        """The Hydra group that fills it."""
        return self.key.removesuffix(".*").replace(".", "/")


SLOTS: tuple[Slot, ...] = (
    Slot(key="moe.router", base=RouterConfig, meaning="which tokens an expert works on"),
    Slot(key="moe.experts", base=ExpertsConfig, meaning="the arithmetic of the experts' feed-forward"),
    Slot(key="moe.dispatcher", base=DispatcherConfig, meaning="how rows reach experts and results are summed"),
    Slot(key="encoders.text", base=TextEncoderConfig, meaning="captions to features"),
    Slot(key="encoders.image", base=ImageCodecConfig, meaning="pixels to latents and back"),
    Slot(key="sample.sampler", base=SamplerConfig, meaning="from noise to a picture"),
    Slot(key="optim.optimizer", base=OptimizerConfig, meaning="the update rule"),
    Slot(key="observe.sinks.*", base=SinkConfig, meaning="where records and pictures are copied to"),
)


# --- from a name to a class --------------------------------------------------------------------------------------------

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


_RUNS_LATER = ("build", "open", "integrate")
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
