"""Rules between sections, checked before anything starts. One ConfigError lists every broken rule.

What a single value may look like (type, choice) is `convert`'s; layouts over ranks are in `layout`.
"""

from __future__ import annotations

from math import gcd

from ecdit_train.config.cluster_rules import check_cluster
from ecdit_train.config.layout import check_layout
from ecdit_train.config.nearest import divisors, nearest_divisor, nearest_multiple
from ecdit_train.config.rules import Checker, is_whole, short
from ecdit_train.config.schema import HEAD_DIM, RunConfig
from ecdit_train.errors import ConfigError


def validate(cfg: RunConfig, *, world: int | None = None) -> None:
    """Refuses an impossible configuration.

    Args:
        cfg: the composed configuration.
        world: number of ranks; None skips the rules that need it (on a login node, before a layout is known).

    Raises:
        ConfigError: with one Problem per broken rule: field, value, rule and nearest valid value.
    """
    check = Checker(cfg)
    _ranges(check)
    _model(cfg, check)
    _encoders(cfg, check)
    _image(cfg, check)
    if cfg.moe.router != "dense":
        _experts(cfg, check)
        _training_pool(cfg, check)
        _sampling_pool(cfg, check)
    _batch(cfg, check)
    _schedule(cfg, check)
    check_layout(cfg, check, world=world)
    check_cluster(cfg, check)
    if check.problems:
        raise ConfigError(check.problems)


def images_per_group(cfg: RunConfig) -> int:
    """Images that a microbatch must be a multiple of: a whole routing group's, or 1."""
    if cfg.moe.router == "dense" or cfg.moe.scope != "group" or cfg.moe.group_size % cfg.tokens_per_image:
        return 1
    return cfg.moe.group_size // cfg.tokens_per_image


# --- ranges of single values -----------------------------------------------------------------------------------


def _ranges(check: Checker) -> None:
    for field in ("run", "experiment", "data.shards"):
        check.require(bool(check.values[field].strip()), field, rule="must not be empty")
    sizes = ["layers", "width", "heads", "kv_heads", "ffn_ratio", "patch", "text_width"]
    check.at_least(1, [f"model.{name}" for name in sizes])
    check.at_least(0, ["model.text_refiner_layers", "train.seed", "sample.seed", "data.prefetch", "optim.warmup_steps"])
    check.at_least(1, ["moe.experts", "moe.group_size", "moe.top_k", "sample.steps", "sample.group_size"])
    check.at_least(1, ["encoders.text.width", "encoders.text.max_tokens"])
    check.at_least(1, ["encoders.image.channels", "encoders.image.factor"])
    check.at_least(0, ["encoders.text.parameters", "encoders.image.parameters", "observe.sample_every"])
    check.at_least(1, ["data.resolution", "data.threads", "train.steps", "train.global_batch", "train.microbatch"])
    check.at_least(1, ["checkpoint.every_steps", "checkpoint.keep", "observe.log_every"])
    check.at_least(0, ["moe.balance_weight", "sample.guidance", "optim.weight_decay", "optim.clip_norm"])
    check.positive(["moe.capacity_factor", "diffusion.timestep_std", "encoders.image.scale", "optim.lr", "optim.eps"])
    check.share(["diffusion.caption_drop", "data.max_bad"])
    decays = ["momentum", "decay", "beta1", "beta2", "ema_decay"]
    check.share(["diffusion.mask_ratio", *(f"optim.{name}" for name in decays)], below_one=True)


# --- the network and what it sees ------------------------------------------------------------------------------


def _model(cfg: RunConfig, check: Checker) -> None:
    model = cfg.model
    if check.sane("model.heads"):
        width = model.heads * HEAD_DIM
        rule = f"must be model.heads * {HEAD_DIM} = {model.heads} * {HEAD_DIM} = {width}"
        check.require(model.width == width, "model.width", rule=rule, nearest=width)
    if check.sane("model.heads", "model.kv_heads"):
        check.require(
            model.heads % model.kv_heads == 0,
            "model.kv_heads",
            rule=f"must divide model.heads = {model.heads}",
            nearest=nearest_divisor(model.kv_heads, model.heads),
        )
    if check.sane("model.text_width"):
        check.require(
            model.text_width % HEAD_DIM == 0,
            "model.text_width",
            rule=f"must be a multiple of {HEAD_DIM}",
            nearest=nearest_multiple(model.text_width, HEAD_DIM),
        )


def _encoders(cfg: RunConfig, check: Checker) -> None:
    text, image = cfg.encoders.text, cfg.encoders.image
    rule = "must be a local folder with config.json and safetensors weights when kind is {}"
    check.require(
        text.kind != "t5" or bool(text.path), "encoders.text.path", rule=rule.format("t5"), nearest="encoders/t5"
    )
    check.require(
        image.kind != "kl" or bool(image.path), "encoders.image.path", rule=rule.format("kl"), nearest="encoders/vae"
    )
    if image.kind == "identity":
        check.require(
            image.channels == 3, "encoders.image.channels", rule="must be 3: kind identity gives RGB pixels", nearest=3
        )
        check.require(
            image.factor == 1, "encoders.image.factor", rule="must be 1: kind identity does not downsample", nearest=1
        )


def _image(cfg: RunConfig, check: Checker) -> None:
    """Whole patches in an image and whole patches left by the mask."""
    if not check.sane("data.resolution", "encoders.image.factor", "model.patch"):
        return
    factor, patch = cfg.encoders.image.factor, cfg.model.patch
    check.require(
        cfg.data.resolution % (factor * patch) == 0,
        "data.resolution",
        rule=f"must be a multiple of encoders.image.factor * model.patch = {factor} * {patch} = {factor * patch}",
        nearest=nearest_multiple(cfg.data.resolution, factor * patch),
    )
    if not check.sane("data.resolution", "diffusion.mask_ratio"):
        return
    patches = cfg.patches_per_image
    kept = patches * (1.0 - cfg.diffusion.mask_ratio)
    check.require(
        is_whole(kept) and kept >= 1 - 1e-6,
        "diffusion.mask_ratio",
        rule=f"must keep a whole number of the {patches} patches, keeps {short(kept)}",
        nearest=1.0 - _nearest_kept(cfg, kept, patches=patches) / patches,
    )


def _nearest_kept(cfg: RunConfig, kept: float, *, patches: int) -> int:
    """Whole number of kept patches nearest to `kept` which also fills the routing groups, if any does."""
    moe, counts = cfg.moe, range(1, patches + 1)
    if moe.router != "dense" and moe.scope == "group" and moe.group_size >= 1:
        size, micro = moe.group_size, cfg.train.microbatch
        counts_that_fill = [n for n in counts if size % n == 0 and micro * n % size == 0]
        if counts_that_fill:
            return min(counts_that_fill, key=lambda n: (abs(n - kept), n))
    return min(max(round(kept), 1), patches)


_TOKENS = ("data.resolution", "encoders.image.factor", "model.patch", "diffusion.mask_ratio")
"""Fields behind tokens_per_image."""


# --- experts and the tokens they choose from -------------------------------------------------------------------


def _experts(cfg: RunConfig, check: Checker) -> None:
    moe = cfg.moe
    check.require(
        cfg.model.layers >= 2,
        "model.layers",
        rule=f"must be at least 2 with moe.router {moe.router}: layers 2, 4, ... carry the experts",
        nearest=2,
    )
    if not check.sane("moe.experts"):
        return
    if moe.router == "token_choice" and check.sane("moe.top_k"):
        rule = f"must not exceed moe.experts = {moe.experts}"
        check.require(moe.top_k <= moe.experts, "moe.top_k", rule=rule, nearest=moe.experts)
    if moe.router == "expert_choice" and check.sane("moe.capacity_factor"):
        rule = f"must not exceed moe.experts = {moe.experts}: an expert cannot take a token twice"
        check.require(moe.capacity_factor <= moe.experts, "moe.capacity_factor", rule=rule, nearest=float(moe.experts))


def _training_pool(cfg: RunConfig, check: Checker) -> None:
    """Groups hold whole images and the capacity is whole."""
    moe = cfg.moe
    if not check.sane(*_TOKENS, "moe.group_size", "moe.experts", "moe.capacity_factor", "train.microbatch"):
        return
    tokens = cfg.tokens_per_image
    if moe.scope == "group" and not check.require(
        moe.group_size % tokens == 0,
        "moe.group_size",
        rule=f"must hold whole images of {tokens} kept patches",
        nearest=nearest_multiple(moe.group_size, tokens),
    ):
        return
    pool = cfg.pool_tokens
    formula = (
        f"capacity = pool * capacity_factor / experts = {pool} * {short(moe.capacity_factor)} / {moe.experts}"
        f" = {short(cfg.capacity)} must be whole"
    )
    # what fits this unit fits the training pool and the sampling pool
    unit = gcd(pool, cfg.sample.group_size if cfg.sample.scope == "group" else cfg.patches_per_image)
    slots = unit * moe.capacity_factor
    if is_whole(slots):
        fitting = [d for d in divisors(round(slots)) if d >= moe.capacity_factor]
        nearest = min(fitting, key=lambda d: (abs(d - moe.experts), d), default=None)
        check.require(is_whole(cfg.capacity), "moe.experts", rule=formula, nearest=nearest)
    else:
        near = max(round(slots / moe.experts), 1) * moe.experts / unit
        check.require(is_whole(cfg.capacity), "moe.capacity_factor", rule=formula, nearest=near)


def _sampling_pool(cfg: RunConfig, check: Checker) -> None:
    """The same while sampling, where nothing is masked."""
    moe, sample = cfg.moe, cfg.sample
    if not check.sane(*_TOKENS[:3], "moe.experts", "moe.capacity_factor", "sample.group_size"):
        return
    patches = cfg.patches_per_image

    def capacity(pool: int) -> float:
        return pool * moe.capacity_factor / moe.experts

    def formula(pool: int) -> str:
        return (
            f"sampling capacity = pool * capacity_factor / experts = {pool} * {short(moe.capacity_factor)} / "
            f"{moe.experts} = {short(capacity(pool))} must be whole"
        )

    if sample.scope != "group":  # any number of images: one image's share must be whole already
        nearest = "group" if is_whole(capacity(sample.group_size)) and sample.group_size % patches == 0 else None
        check.require(is_whole(capacity(patches)), "sample.scope", rule=formula(patches), nearest=nearest)
        return
    fitting = [patches * n for n in range(1, moe.experts + 1) if is_whole(capacity(patches * n))]
    step = fitting[0] if fitting else patches  # multiples of this hold whole images and give a whole capacity
    nearest_size = nearest_multiple(sample.group_size, step)
    rule = f"must hold whole images of {patches} patches"
    if check.require(sample.group_size % patches == 0, "sample.group_size", rule=rule, nearest=nearest_size):
        whole = is_whole(capacity(sample.group_size))
        check.require(whole, "sample.group_size", rule=formula(sample.group_size), nearest=nearest_size)


# --- batch and schedule ----------------------------------------------------------------------------------------


def _batch(cfg: RunConfig, check: Checker) -> None:
    """A microbatch fills whole groups and divides the global batch."""
    train = cfg.train
    if not check.sane("train.global_batch", "train.microbatch", "moe.group_size", *_TOKENS):
        return
    images = images_per_group(cfg)
    fitting = [d for d in divisors(train.global_batch) if d % images == 0]
    if not fitting:
        rule = f"must be a multiple of the {images} images of a routing group (moe.group_size {cfg.moe.group_size})"
        check.require(False, "train.global_batch", rule=rule, nearest=nearest_multiple(train.global_batch, images))
        return
    nearest = min(fitting, key=lambda d: (abs(d - train.microbatch), d))
    if check.require(
        train.microbatch % images == 0,
        "train.microbatch",
        rule=f"must be a multiple of the {images} images of a routing group "
        f"({cfg.moe.group_size} tokens / {cfg.tokens_per_image} per image)",
        nearest=nearest,
    ):
        rule = f"must divide train.global_batch = {train.global_batch}"
        check.require(train.global_batch % train.microbatch == 0, "train.microbatch", rule=rule, nearest=nearest)


def _schedule(cfg: RunConfig, check: Checker) -> None:
    if check.sane("train.steps", "optim.warmup_steps"):
        check.require(
            cfg.optim.warmup_steps < cfg.train.steps,
            "optim.warmup_steps",
            rule=f"must be below train.steps = {cfg.train.steps}",
            nearest=cfg.train.steps - 1,
        )
    check.require(
        cfg.observe.sample_every == 0 or len(cfg.observe.prompts) > 0,
        "observe.prompts",
        rule=f"must not be empty while observe.sample_every = {cfg.observe.sample_every}",
        nearest="observe.sample_every=0",
    )
