"""Slots: the places of a run that anyone can fill, from the package or from a folder of one's own. Imports no torch.

A slot is filled by naming a class: the YAML of its Hydra group says `_target_: package.module.Class`, and the class is a
frozen dataclass with the implementation's keys, which lives in one file with what it configures. The rest of the system asks
that object, never its name: it checks itself (`check`), says what it costs (for `ecdit plan`) and builds what runs.
docs/decisions/0012 says why `_target_`, and what it means for a run folder from elsewhere.

The classes below are what a slot's configuration must offer. A method that raises NotImplementedError must be written; the
others have a default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ecdit_train.config.rules import Checker
    from ecdit_train.config.schema import RunConfig
    from ecdit_train.parallel.owners import Sharding

TARGET = "_target_"
"""Hydra's key for the class of an object."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """How a parameter lies on the ranks, as the plan knows it."""

    name: str
    shape: tuple[int, ...]
    """Of the global tensor."""
    copies: int
    """Ranks that hold each element."""
    holders: tuple[range, ...]
    """Ranks that hold a part, of each of its matrices: its own, or those stacked on dim 0."""


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


Sees = Literal["modulated", "hidden", "timestep"]
"""What a router computes affinities from, see `model.router.AffinityRouter`."""


@dataclass(frozen=True, kw_only=True)
class RouterSizes:
    """What a router is built for."""

    width: int
    """D, channels of a token."""
    num_experts: int
    """E."""
    patch_values: int
    """P, values of a patch: what the network predicts for a token."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One collective that a router issues among the data-parallel ranks."""

    kind: Literal["all_reduce", "all_gather"]
    bytes: float
    """Of the full buffer: the tensor of an all-reduce, the output of an all-gather."""


class RouterConfig(SlotConfig):
    """Decides which tokens an expert works on (`model.router.Router`).

    Costs are per token of a sparse layer, forward only.
    """

    @property
    def whole_batch(self) -> bool:
        """Whether it selects over all tokens of a microbatch on all ranks, whatever the groups: a resume may
        not change `train.microbatch` then."""
        return False

    def images_together(self) -> int | None:
        """Images of a forward pass over all data-parallel ranks, where the result depends on that number and the run
        fixes it: a rule of the layout then."""
        return None

    def experts_per_token(self) -> float:
        """Mean number of experts that work on a token: what the layer's arithmetic and traffic are proportional to."""
        raise NotImplementedError

    def capacity(self, *, group_tokens: int, num_experts: int) -> float | None:
        """Rows that an expert takes of a routing group when that number never changes; None when it varies. A value that is not
        whole is refused by the configuration's rules."""
        raise NotImplementedError

    def sampling_capacity(self, *, group_tokens: int, num_experts: int) -> float | None:
        """The same while pictures are drawn, where a router may count another way."""
        return self.capacity(group_tokens=group_tokens, num_experts=num_experts)

    def stages(self) -> tuple[tuple[int, Self], ...]:
        """(first step, what holds from there on), ascending from step 0: shapes change only between two stages. The plan, the
        rules of the layout and the checks are asked for each."""
        return ((0, self),)

    def at(self, step: int) -> Self:
        """The stage that holds once `step` updates were made."""
        return [stage for first, stage in self.stages() if first <= step][-1]

    def for_drawing(self) -> Self:
        """The same router without parameters that only training reads; what `ecdit ckpt export` writes."""
        return self

    def flops_per_token(self, sizes: RouterSizes) -> float:
        """Forward FLOPs: the product with a (width, num_experts) matrix."""
        return 2.0 * sizes.width * sizes.num_experts

    def kept_bytes_per_token(self, sizes: RouterSizes, *, compute_bytes: int) -> float:
        """Bytes that autograd keeps besides the tokens: affinities and their softmax."""
        return 8.0 * sizes.num_experts

    def messages(self, sizes: RouterSizes, *, image_tokens: int, ranks: int) -> tuple[Message, ...]:
        """What a layer's router sends among the `ranks` data-parallel ranks in one forward pass of training."""
        return ()

    def build(self, sizes: RouterSizes) -> nn.Module:
        """A `model.router.Router`. Called under the meta device: make parameters and buffers, never values."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AffinityConfig(RouterConfig):
    """What routers have in common that pick by affinity (`model.router.AffinityRouter`), f_c experts per token on average."""

    capacity_factor: float
    """f_c: mean experts per token."""

    sees: Sees
    """What affinities are computed from: modulated (what the experts see), hidden (x', the residual stream) or timestep (the
    unmodulated token and its timestep)."""

    def experts_per_token(self) -> float:
        return self.capacity_factor

    def check_factor(self, run: RunConfig, check: Checker, *, key: str) -> bool:
        """Whether capacity_factor is one that some token can have."""
        E = run.moe.num_experts
        if not check.positive([f"{key}.capacity_factor"]) or not check.sane("moe.num_experts"):
            return False
        rule = f"must not exceed moe.num_experts = {E}: an expert cannot take a token twice"
        return check.require(self.capacity_factor <= E, f"{key}.capacity_factor", rule=rule, nearest=float(E))


class ExpertsConfig(SlotConfig):
    """The arithmetic of the experts' feed-forward (`model.moe.Experts`). A row is one token at one expert."""

    def flops_per_row(self, *, width: int, hidden: int) -> float:
        """Forward FLOPs: two matrix products."""
        return 4.0 * width * hidden

    def kept_values_per_row(self, *, width: int, hidden: int) -> float:
        """Values of the compute type that autograd keeps: before and after the activation, and the result."""
        return 2.0 * hidden + width

    lean: ClassVar[bool] = False
    """Whether `moe.form=lean` can carry them out: what is built is a `model.experts.two_layers.TwoLayers`."""

    def lean_values_per_row(self, *, width: int, hidden: int) -> float:
        """Values of the compute type that `moe.form=lean` keeps: those before the activation."""
        raise NotImplementedError

    def build(self, *, width: int, hidden: int, num_experts: int) -> nn.Module:
        """A `model.moe.Experts`. Called under the meta device."""
        raise NotImplementedError

    shared_matrices: ClassVar[int] = 0
    """(width, hidden) matrices of what `build_shared` makes; 0 where there is none."""

    def build_shared(self, *, width: int, hidden: int) -> nn.Module:
        """The same arithmetic for every token (`moe.shared_experts`), of nn.Linear layers without biases: `down` gives the result,
        the others (`up`, `gate`) read the tokens. Called under the meta device."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DispatcherConfig(SlotConfig):
    """How rows are gathered for the experts and their results summed (`model.moe.Dispatcher`)."""

    same_result: ClassVar[bool] = False
    """Whether it computes what any other such class computes, up to rounding, so that a resume may change from one to the other."""

    cap: float | None
    """For routers whose number of rows varies. null: counts are exchanged, then just these rows. A number: a static table of cap
    times the mean rows per expert and group; rows beyond it are dropped, lowest gates first, and counted."""

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        if self.cap is not None:
            check.positive([f"{key}.cap"])

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

    def feature_bytes(self, *, encoder_bytes: int) -> int:
        """Of a number of the features as training holds them, for the plan; `encoder_bytes`: of the type that encoders run in."""
        return 4

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
    """The update rule; rate, warm-up, clipping and averaging are the `optim` section's.

    A parameter's name and global shape decide what becomes of it, so that every layout computes the same.
    """

    identity: ClassVar[tuple[str, ...]] = ()
    """Keys that decide which state there is: a resume may not change them."""

    def state_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        """Bytes of state per element of a parameter."""
        return 8.0

    def step_flops(self, held: Sequence[Held], *, world: int) -> float:
        """FLOPs of matrix products in an update, on the busiest rank; element-wise work does not count."""
        return 0.0

    def step_traffic(self, held: Sequence[Held], *, world: int) -> tuple[int, float]:
        """All-to-alls among all ranks in an update: how many, and the bytes of rank 0's buffers in all of them."""
        return 0, 0.0

    def build(self, params: Mapping[str, nn.Parameter], *, lr: float, sharding: Sharding) -> Any:
        """A `torch.optim.Optimizer` whose state exists already: `state[p]` holds `step` (a tensor) and tensors shaped and sharded
        like p, so that memory shows up at the start and a checkpoint can be loaded into it. `lr` is set anew before every step.
        `sharding` says where the parameters lie among the ranks; an element-wise rule needs none of it."""
        raise NotImplementedError


class DecoderConfig(SlotConfig):
    """Decodes and resizes pictures."""

    def build(self) -> Any:
        """A `data_pipeline.decoders.ImageDecoder`; called once on each rank."""
        raise NotImplementedError


class StagesConfig(SlotConfig):
    """What becomes of each sample between its shard and the decoder."""

    def build(self) -> list[Any]:
        """webdataset stages (`wds.decode`, `wds.map`, ...), or functions from an iterator of samples to one, see
        `data_pipeline.stages.Stages`; called once on each rank. An empty list leaves all as it is."""
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
    Slot(key="data.decoder", base=DecoderConfig, meaning="files of pictures to pixels"),
    Slot(key="data.stages", base=StagesConfig, meaning="a user's webdataset stages, run on each sample"),
    Slot(key="sample.sampler", base=SamplerConfig, meaning="from noise to a picture"),
    Slot(key="optim.optimizer", base=OptimizerConfig, meaning="the update rule"),
    Slot(key="observe.sinks.*", base=SinkConfig, meaning="where records and pictures are copied to"),
)
