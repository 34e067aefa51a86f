"""What a run is: a tree of frozen dataclasses, one per Hydra group. Imports no torch.

Values come from `conf/`; nothing here has a default, so a key that no YAML file sets is an error, not a silent
choice. Each component receives its own section and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HEAD_DIM = 64
"""Channels per attention head in every configuration of the paper's Table 1."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a row of the paper's Table 1, plus what the paper leaves open (docs/explanation/model.md)."""

    name: str
    layers: int
    width: int
    """Hidden dimension d."""
    heads: int
    kv_heads: int
    """Key/value heads of self-attention (grouped-query attention)."""
    ffn_ratio: int
    """Feed-forward hidden width over d; experts have the same width as the dense feed-forward."""
    patch: int
    text_width: int
    """Width of the text inside the model: keys and values of cross-attention are d x text_width."""
    text_refiner_layers: int
    """Transformer layers that refine the frozen text features before cross-attention."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routing of the sparse feed-forward layers (layers 2, 4, ... counted from 1)."""

    router: Literal["dense", "expert_choice", "token_choice"]
    experts: int
    capacity_factor: float
    """f_c: mean number of experts per token; capacity C = pool * f_c / E."""
    scope: Literal["group", "image", "batch"]
    """Tokens that compete for an expert: `group_size` consecutive tokens, one image, or one microbatch."""
    group_size: int
    """Tokens per group when scope is `group`; whole images."""
    top_k: int
    """Experts per token of token choice."""
    balance_weight: float
    """Weight of token choice's auxiliary load-balance loss."""
    combine: Literal["index_add", "deterministic"]
    """`index_add` uses atomics on CUDA; `deterministic` sums in a fixed order."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Rectified flow, x_t = t x + (1 - t) eps: t = 0 is noise, t = 1 is data."""

    prediction: Literal["velocity", "data"]
    timestep_mean: float
    """mu of u ~ N(mu, sigma), t = sigmoid(u)."""
    timestep_std: float
    mask_ratio: float
    """Share of patches dropped in training; 0 in the unmasked stage."""
    caption_drop: float
    """Probability that a caption is replaced by the null text, for classifier-free guidance."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How pictures are drawn from a trained model."""

    sampler: Literal["euler", "heun"]
    steps: int
    guidance: float
    scope: Literal["group", "image", "batch"]
    """Routing pool while sampling; `image` makes a picture independent of its neighbours."""
    group_size: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Frozen text encoder: a local T5 folder, the built-in word hash, or embeddings stored in the shards."""

    kind: Literal["t5", "hash", "shards"]
    path: str | None
    width: int
    max_tokens: int
    parameters: int
    """Frozen parameters, for the plan's totals (the paper counts 670M)."""


@dataclass(frozen=True, kw_only=True)
class ImageCodecConfig:
    """Frozen image codec: a local AutoencoderKL folder, pixels as they are, or latents stored in the shards."""

    kind: Literal["kl", "identity", "shards"]
    path: str | None
    channels: int
    factor: int
    """Pixels per latent, each way."""
    scale: float
    """latent = (encoded - shift) * scale."""
    shift: float
    parameters: int
    """Frozen parameters, for the plan's totals (the paper counts 34M)."""


@dataclass(frozen=True, kw_only=True)
class EncodersConfig:
    text: TextEncoderConfig
    image: ImageCodecConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Shards and how they are read."""

    shards: str
    """Folder with tars, indexes and manifest.json."""
    resolution: int
    """Side of the square training image, pixels."""
    threads: int
    prefetch: int
    """Global steps decoded ahead."""
    on_bad: Literal["fail", "substitute"]
    max_bad: float
    """Largest tolerated share of substituted samples."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and numerics of a run."""

    seed: int
    steps: int
    global_batch: int
    """Images per optimizer step over all ranks."""
    microbatch: int
    """Images per forward pass and data-parallel rank; whole routing groups."""
    init_from: str | None
    """Run folder whose newest averaged weights this run starts from, if it has no checkpoint of its own (the unmasked stage)."""
    precision: Literal["fp32", "bf16"]
    """Compute precision; master weights, gradients' reduction, optimizer state and EMA are fp32."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    kind: Literal["rmsprop", "adamw"]
    lr: float
    warmup_steps: int
    schedule: Literal["constant", "cosine", "linear"]
    """After the warm-up: constant (paper), or decaying to zero at `train.steps`."""
    momentum: float
    """RMSProp's momentum."""
    decay: float
    """RMSProp's decay of the squared gradient (alpha)."""
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    """Largest global gradient norm; 0 switches clipping off (the norm is still measured)."""
    ema_decay: float
    """0 switches the exponential moving average off."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """dp_replicate * dp_shard * tp == edp * ep == world."""

    dp_replicate: int
    dp_shard: int
    """-1: the ranks that are left."""
    tp: int
    ep: int
    sequence_parallel: bool
    activation_checkpointing: Literal["none", "selective", "full"]
    """`selective` recomputes matrix products but keeps what the expert exchange received."""
    compile: bool
    overlap_chunks: int
    """Parts into which a layer's groups are cut: one part's exchange hides behind another's experts; 1 is off."""
    reshard_after_forward: bool


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int
    keep: int
    """Newest committed checkpoints kept."""


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    log_every: int
    sample_every: int
    """Steps between sample grids and routing maps; 0 switches them off."""
    prompts: tuple[str, ...]
    """Fixed prompts of the sample grids."""
    wandb: Literal["offline", "online", "disabled"]
    wandb_project: str


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """A machine room: what `ecdit plan` computes with and `ecdit launch` submits to."""

    name: str
    nodes: int
    gpus_per_node: int
    gpu: str
    gpu_memory: float
    """Bytes per GPU."""
    peak_flops: float
    """Dense bf16 FLOP/s per GPU."""
    gemm_efficiency: float
    """Share of the peak that a large matrix product reaches."""
    memory_bandwidth: float
    """Bytes/s of device memory."""
    intra_bandwidth: float
    """Bytes/s one way per GPU inside a node (NVLink)."""
    inter_bandwidth: float
    """Bytes/s one way per GPU between nodes (InfiniBand)."""
    partition: str | None
    account: str | None
    qos: str | None
    time_limit: str
    """Slurm time, HH:MM:SS or D-HH:MM:SS."""
    signal_lead: int
    """Seconds before the limit at which Slurm warns the ranks."""
    cpus_per_gpu: int
    container: str | None
    """Container image for srun --container-image, or none."""
    modules: tuple[str, ...]
    """`module load` lines of the job script."""
    env: tuple[str, ...]
    """NAME=value lines exported in the job script; never a secret."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, whole. `run` is its folder."""

    run: str
    experiment: str
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
    def pool_tokens(self) -> int:
        """Tokens that compete for an expert in training (the routing pool)."""
        return {
            "group": self.moe.group_size,
            "image": self.tokens_per_image,
            "batch": self.train.microbatch * self.tokens_per_image,
        }[self.moe.scope]

    @property
    def capacity(self) -> float:
        """C = pool * f_c / E tokens per expert and pool; validated to be whole."""
        return self.pool_tokens * self.moe.capacity_factor / self.moe.experts
