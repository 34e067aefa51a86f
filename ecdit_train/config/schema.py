"""What a run is: a tree of frozen dataclasses, one per Hydra group. Imports no torch.

Values come from `conf/`; nothing here has a default, so a key that no YAML file sets is an error, not a silent choice. What can
be filled with a class of one's own is a slot (`slots.py`): its keys are the fields of the class that fills it. The docstring
below a field is its description everywhere: `ecdit config keys`, docs/reference/configuration.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ecdit_train.config.cluster import ClusterConfig
from ecdit_train.config.data_schema import DataConfig
from ecdit_train.config.life import AlertsConfig, CheckpointConfig, HealthConfig, ValidationConfig, WatchConfig
from ecdit_train.config.slots import (
    DispatcherConfig,
    ExpertsConfig,
    ImageCodecConfig,
    OptimizerConfig,
    RouterConfig,
    SamplerConfig,
    SinkConfig,
    TextEncoderConfig,
)

HEAD_DIM = 64
"""Channels per attention head in every configuration of the paper's Table 1."""


SparseLayers = Literal["even", "all", "after_3"]

Recipe = Literal["current", "delayed", "mxfp8"]

Kept = Literal["attention", "projections", "feed_forward", "experts"]


def sparse_layers(layers: int, *, which: SparseLayers) -> tuple[int, ...]:
    """Numbers of the blocks that carry experts where there are any, counted from 1: every second (paper section 3.1), all, or all
    but the first three (Nucleus-Image)."""
    first, stride = {"even": (2, 2), "all": (1, 1), "after_3": (4, 1)}[which]
    return tuple(range(first, layers + 1, stride))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a row of the paper's Table 1, plus what the paper leaves open (docs/explanation/model.md)."""

    name: str
    """Label in logs and plans; nothing is decided by it."""
    layers: int
    """Transformer blocks; `moe.layers` says which of them carry experts."""
    width: int
    """Hidden dimension d; always 64 * heads."""
    heads: int
    """Query heads of 64 channels."""
    kv_heads: int
    """Key/value heads of self-attention (grouped-query attention); divides heads."""
    ffn_ratio: int
    """Hidden width of the dense feed-forward over d."""
    patch: int
    """Latent pixels per patch, each way."""
    text_width: int
    """Width of the text inside the network: keys and values of cross-attention are d x text_width. A multiple of 64."""
    text_refiner_layers: int
    """Transformer layers that refine the frozen text features before cross-attention."""
    cross_attention: bool
    """Whether blocks look at the text by cross-attention (the paper). Without it, text acts through its mean alone, as a class
    label does in DiT."""
    modulation: Literal["shared", "block"]
    """AdaLN projection: `shared`: one of 6 d^2 for all blocks and 3 d^2 in each (the paper's sizes); `block`: 6 d^2 in
    each, as in DiT."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The sparse feed-forward layers; all three slots are null in a dense network."""

    router: RouterConfig | None
    """Which tokens an expert works on; null is a dense network."""
    experts: ExpertsConfig | None
    """The arithmetic of the experts' feed-forward."""
    dispatcher: DispatcherConfig | None
    """How rows are gathered for experts and results summed."""
    num_experts: int
    """Experts in every sparse layer (E)."""
    scope: Literal["group", "image", "batch"]
    """Tokens that compete for an expert: `group_size` consecutive tokens, one image, or one microbatch."""
    group_size: int
    """Tokens per group when scope is group; whole images (paper: 1024 = 8 half-masked images)."""
    layers: SparseLayers
    """Blocks that carry experts: 2, 4, ... (the paper), all, or all after the third (Nucleus-Image)."""
    expert_ratio: float | None
    """Hidden width of an expert over d; null: `model.ffn_ratio`, an expert as wide as the dense feed-forward."""
    form: Literal["plain", "lean"]
    """How a layer is carried out, with the same result: `plain` leaves it to autograd; `lean` keeps the experts'
    first products alone for the backward pass and makes the rest again (no matrix product among it): less than
    half of the memory."""
    shared_experts: int
    """Experts that work on every token beside the chosen ones, as one feed-forward of so many times an expert's hidden width."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Rectified flow, x_t = t x + (1 - t) eps: t = 0 is noise, t = 1 is data."""

    prediction: Literal["velocity", "data"]
    """What the network predicts: velocity (x - eps) or data (x)."""
    timestep_mean: float
    """Mean mu of u in t = sigmoid(u), u ~ N(mu, sigma). The paper names no value."""
    timestep_std: float
    """Standard deviation sigma of u."""
    mask_ratio: float
    """Share of patches dropped in training; 0 keeps all (the unmasked stage)."""
    caption_drop: float
    """Probability that a caption becomes the null text, for classifier-free guidance. The paper names no value."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How pictures are drawn from a trained model."""

    sampler: SamplerConfig
    """Integrator of dx/dt = v from t = 0 to t = 1."""
    steps: int
    """Steps of the integrator."""
    guidance: float
    """Classifier-free guidance scale; 1 switches guidance off."""
    scope: Literal["group", "image", "batch"]
    """Tokens that compete while sampling: image makes a picture independent of its neighbours; group is the paper's."""
    group_size: int
    """Tokens per group when scope is group (paper: 512 = 2 whole images)."""
    seed: int
    """Seed of the starting noise: same prompt and seed, same picture."""


@dataclass(frozen=True, kw_only=True)
class EncodersConfig:
    """The frozen networks around the trained one."""

    text: TextEncoderConfig
    """Captions to features."""
    image: ImageCodecConfig
    """Pixels to latents and back."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and numerics of a run."""

    seed: int
    """Seed of everything random in training: order, noise, timesteps, masks, initial weights."""
    steps: int
    """Optimizer steps in all."""
    global_batch: int
    """Images per optimizer step over all ranks."""
    microbatch: int
    """Images per forward pass and data-parallel rank; whole routing groups."""
    init_from: str | None
    """Run folder whose newest averaged weights this run starts from, if it has no checkpoint of its own (the unmasked stage)."""
    precision: Literal["fp32", "bf16", "fp8"]
    """Compute precision; master weights, gradients' reduction, optimizer state and EMA are fp32. fp8: products of attention,
    feed-forward and experts in 8 bits, everything else in bf16, routers in fp32."""
    fp8_recipe: Recipe
    """With `precision: fp8`, how 8-bit numbers are scaled: by the largest of the tensor now (`current`), of the last steps
    (`delayed`), or 32 numbers at a time (`mxfp8`)."""
    fp8_backend: Literal["scaled_mm", "transformer_engine", "emulated"]
    """With `precision: fp8`, who multiplies: torch's scaled product or Transformer Engine's casts and grouped products, both on a
    GPU's 8-bit tensor cores; or the same arithmetic in plain torch, at no gain in speed."""

    @property
    def compute(self) -> Literal["fp32", "bf16"]:
        """The type of activations and of gathered weights."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @property
    def recipe(self) -> Recipe | None:
        """How 8-bit products are scaled; None where there are none."""
        return self.fp8_recipe if self.precision == "fp8" else None


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The update rule and what surrounds it."""

    optimizer: OptimizerConfig
    """The update rule."""
    lr: float
    """Peak learning rate, reached after the warm-up."""
    warmup_steps: int
    """Steps over which the rate rises linearly from 0."""
    schedule: Literal["constant", "cosine", "linear", "wsd"]
    """After the warm-up: constant (paper), decaying to zero at `train.steps`, or constant with a decay
    over the last `decay_steps`."""
    clip_norm: float
    """Largest global gradient norm; 0 switches clipping off (the norm is still measured)."""
    ema_decay: float
    """Decay of the weights' moving average used for sampling; 0 switches it off."""
    decay_steps: int = 0
    """With `schedule: wsd`, the last steps, in which the rate falls; those before them are the same however long the run is."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """With `schedule: wsd`: the rate falls as 1 - x or as 1 - sqrt(x), x going from 0 to 1."""
    decay_floor: float = 0.0
    """With `schedule: wsd`: share of the rate that is left at the end."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """dp_replicate * dp_shard * tp == edp * ep == world."""

    dp_replicate: int
    """Copies of the sharded model (hybrid sharding)."""
    dp_shard: int
    """Ranks that share one copy of the dense weights; -1: the ranks that are left."""
    tp: int
    """Ranks that split every matrix (tensor parallelism)."""
    ep: int
    """Ranks that share the experts (expert parallelism)."""
    sequence_parallel: bool
    """Not available: an expert ranks its whole group (docs/decisions/0007)."""
    activation_checkpointing: Literal["none", "selective", "full"]
    """What backward computes again: nothing; `selective`: all but routing, what was exchanged and what `keep` names;
    `full`: all but routing."""
    keep: tuple[Kept, ...]
    """What `selective` keeps besides: results of attention, of its projections, of the dense feed-forward's
    products, of the experts'."""
    checkpoint_blocks: float
    """Share of the blocks that are checkpointed, above 0: spread evenly over the depth, over dense and sparse blocks alike."""
    compile: bool
    """torch.compile, block by block."""
    overlap_chunks: int
    """Parts into which a layer's groups are cut: one part's exchange hides behind another's experts; 1 is off."""
    reduce_gradients: Literal["step", "microbatch"]
    """When gradients are summed over ranks: with the last microbatch of a step, or in each, where only shards accumulate."""
    reshard_after_forward: Literal["all", "dense", "experts", "none"]
    """Whose gathered weights are freed after the forward pass and gathered again in backward."""
    replicate_experts: bool
    """Hybrid sharding of experts too: each of the `dp_replicate` copies has all of them; else they are sharded across copies."""
    exchange: Literal["flat", "hierarchical"]
    """All-to-all of the experts' rows: among all ep ranks, or inside a node first (`cluster.gpus_per_node`) and then across nodes,
    one message for each pair of nodes and local rank."""


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """What people see of a run while it goes on."""

    log_every: int
    """Steps between log lines (console, metrics.jsonl, sinks)."""
    sample_every: int
    """Steps between sample grids and routing maps; 0 switches them off."""
    prompts: tuple[str, ...]
    """Prompts of the sample grids; same noise every time, so grids compare over steps."""
    sinks: Mapping[str, SinkConfig]
    """Where records and pictures are copied to, by name; metrics.jsonl is written anyway."""
    alerts: AlertsConfig
    """When the run calls for attention."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, whole. `run` is its folder."""

    run: str
    """Run folder: resolved.yaml, checkpoints, logs. Fixed, so that a requeued job finds its checkpoints again."""
    experiment: str
    """Name of the run; every experiment file sets its own."""
    config_dir: str | None
    """Folder of the user's own YAML files and Python modules (`--config-dir`), absolute; null: the package's alone."""
    model: ModelConfig
    moe: MoEConfig
    diffusion: DiffusionConfig
    sample: SampleConfig
    encoders: EncodersConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    watch: WatchConfig
    health: HealthConfig
    validation: ValidationConfig
    observe: ObserveConfig
    cluster: ClusterConfig

    # --- sizes that follow from several sections ---------------------------------------------------------------

    @property
    def latent_side(self) -> int:
        """Side of the square latent."""
        return self.data.resolution // self.encoders.image.factor

    @property
    def patches_per_image(self) -> int:
        """Patches of a whole image: (latent side / patch)^2."""
        return (self.latent_side // self.model.patch) ** 2

    @property
    def tokens_per_image(self) -> int:
        """Patches the network sees in training, after masking."""
        return round(self.patches_per_image * (1.0 - self.diffusion.mask_ratio))

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Numbers of the blocks that carry experts; none in a dense network."""
        return () if self.moe.router is None else sparse_layers(self.model.layers, which=self.moe.layers)

    @property
    def expert_ratio(self) -> float:
        """Hidden width of an expert over d."""
        return self.model.ffn_ratio if self.moe.expert_ratio is None else self.moe.expert_ratio

    @property
    def group_tokens(self) -> int:
        """Tokens that compete for an expert in training (the routing group)."""
        return {
            "group": self.moe.group_size,
            "image": self.tokens_per_image,
            "batch": self.train.microbatch * self.tokens_per_image,
        }[self.moe.scope]

    @property
    def images_per_group(self) -> int:
        """Images that a microbatch must be a multiple of: those of a whole routing group, or 1."""
        tokens = self.tokens_per_image
        if self.moe.router is None or self.moe.scope != "group" or not tokens or self.moe.group_size % tokens:
            return 1
        return max(self.moe.group_size // tokens, 1)

    @property
    def capacity(self) -> float | None:
        """Rows that an expert takes of a routing group; None without experts, or when the number varies."""
        if self.moe.router is None:
            return None
        return self.moe.router.capacity(group_tokens=self.group_tokens, num_experts=self.moe.num_experts)

    def stages(self) -> tuple[tuple[int, RunConfig], ...]:
        """(first step, the run with the router that holds from there on), ascending from step 0 (`RouterConfig.stages`)."""
        if self.moe.router is None:
            return ((0, self),)
        stages = self.moe.router.stages()
        if len(stages) == 1:
            return ((0, self),)
        return tuple((first, replace(self, moe=replace(self.moe, router=router))) for first, router in stages)
