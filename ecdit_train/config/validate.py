"""Rules between sections, checked before anything starts. One ConfigError lists every broken rule.

What a single value may look like (type, choice) is `convert`'s; layouts over ranks are in `layout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd

import yaml  # type: ignore[import-untyped]

from ecdit_train.config.cluster_rules import check_cluster, check_secrets
from ecdit_train.config.convert import flatten, with_values
from ecdit_train.config.data_rules import check_buckets, check_data
from ecdit_train.config.layout import check_layout
from ecdit_train.config.life_rules import check_life
from ecdit_train.config.nearest import divisors, nearest_divisor, nearest_multiple
from ecdit_train.config.precision_rules import check_precision
from ecdit_train.config.rules import Checker, is_whole, short
from ecdit_train.config.schedule import as_yaml
from ecdit_train.config.schema import HEAD_DIM, RunConfig
from ecdit_train.config.slots import SlotConfig
from ecdit_train.errors import ConfigError, Problem


def validate(cfg: RunConfig, *, world: int | None = None) -> None:
    """Refuses an impossible configuration.

    A broken value can hide a rule that depends on it. So what has a nearest valid value is repaired and the rules are asked
    again, until nothing new comes up: all problems are listed at once, and the values that they name are valid together.

    Args:
        cfg: the composed configuration.
        world: number of ranks; None skips the rules that need it (on a login node, before a layout is known).

    Raises:
        ConfigError: with one Problem per broken rule: field, value, rule and nearest valid value.
    """
    problems = _problems(cfg, world=world)
    if not problems:
        return
    found = list(problems)
    repaired, written = cfg, flatten(cfg)
    for _ in range(len(found) + 8):
        hints = {p.field: p.nearest for p in problems if p.nearest is not None}
        try:
            repaired = with_values(repaired, _parsed(hints, written))
        except ConfigError:
            break  # a hint in words
        problems = [p for p in _problems(repaired, world=world) if p.nearest is not None or p.field not in hints]
        if not problems or not hints:
            break
        for p in problems:
            same = [i for i, q in enumerate(found) if q.field == p.field]
            for i in same:  # the value named first would not have done
                found[i] = replace(found[i], nearest=p.nearest)
            if not same:
                found.append(replace(p, value=written.get(p.field, p.value)))
    raise ConfigError(found)


def _parsed(hints: Mapping[str, object], known: Mapping[str, object]) -> dict[str, object]:
    """Hints as values; `key=value` about another key, and text that stands for a bool."""
    values: dict[str, object] = {}
    for field, nearest in hints.items():
        key, equals, text = nearest.partition("=") if isinstance(nearest, str) else ("", "", "")
        if equals and key in known:
            values[key] = yaml.safe_load(text)
        elif field in known:
            listed = isinstance(nearest, str) and nearest.startswith("[")
            values[field] = (
                yaml.safe_load(str(nearest)) if listed else {"true": True, "false": False}.get(str(nearest), nearest)
            )
    return values


def _problems(cfg: RunConfig, *, world: int | None) -> list[Problem]:
    check = Checker(cfg)
    _ranges(check)
    _model(cfg, check)
    _image(cfg, check)
    check_buckets(cfg, check)
    for key, slot in slots_of(cfg).items():
        slot.check(cfg, check, key=key)
    if cfg.moe.router is not None:
        _experts(cfg, check)
        _training_group(cfg, check)
        _sampling_group(cfg, check)
    _batch(cfg, check)
    _schedule(cfg, check)
    check_precision(cfg, check)
    check_layout(cfg, check, world=world)
    check_cluster(cfg, check)
    check_secrets(check)
    check_life(cfg, check)
    return check.problems


def slots_of(cfg: RunConfig) -> dict[str, SlotConfig]:
    """Dotted key -> what fills the slot; empty ones are left out."""
    found = {
        "moe.router": cfg.moe.router,
        "moe.experts": cfg.moe.experts,
        "moe.dispatcher": cfg.moe.dispatcher,
        "encoders.text": cfg.encoders.text,
        "encoders.image": cfg.encoders.image,
        "sample.sampler": cfg.sample.sampler,
        "optim.optimizer": cfg.optim.optimizer,
        **{f"observe.sinks.{name}": sink for name, sink in cfg.observe.sinks.items()},
    }
    return {key: slot for key, slot in found.items() if slot is not None}


# --- ranges of single values -----------------------------------------------------------------------------------


def _ranges(check: Checker) -> None:
    for field in ("run", "experiment", "data.shards"):
        check.require(bool(check.values[field].strip()), field, rule="must not be empty")
    sizes = ["layers", "width", "heads", "kv_heads", "ffn_ratio", "patch", "text_width"]
    check.at_least(1, [f"model.{name}" for name in sizes])
    check.at_least(0, ["model.text_refiner_layers", "train.seed", "sample.seed", "data.prefetch", "optim.warmup_steps"])
    check.at_least(0, ["moe.shared_experts", "optim.decay_steps"])
    if check.values["moe.expert_ratio"] is not None:
        check.positive(["moe.expert_ratio"])
    check.at_least(1, ["moe.num_experts", "moe.group_size", "sample.steps", "sample.group_size"])
    check.at_least(0, ["observe.sample_every", "sample.guidance", "optim.clip_norm"])
    check.at_least(1, ["data.resolution", "data.threads", "train.steps", "train.global_batch", "train.microbatch"])
    check.at_least(1, ["observe.log_every", "data.in_flight", "data.read_budget"])
    check.at_least(0, ["data.read_retries"])
    check.positive(["data.read_deadline"])
    if check.values["data.hedge_after"] is not None:
        check.at_least(0, ["data.hedge_after"])
    check.positive(["diffusion.timestep_std", "optim.lr"])
    check.share(["diffusion.caption_drop", "data.max_bad"])
    check_data(check)
    check.share(["diffusion.mask_ratio", "optim.ema_decay", "optim.decay_floor"], below_one=True)
    text, image = ("width", "max_tokens"), ("channels", "factor")
    of_encoders = [*(f"encoders.text.{name}" for name in text), *(f"encoders.image.{name}" for name in image)]
    check.at_least(1, [key for key in of_encoders if key in check.values])  # a class may hold them as constants


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
    if moe.router is not None and moe.scope == "group" and moe.group_size >= 1:
        size, micro = moe.group_size, cfg.train.microbatch
        counts_that_fill = [n for n in counts if size % n == 0 and micro * n % size == 0]
        if counts_that_fill:
            return min(counts_that_fill, key=lambda n: (abs(n - kept), n))
    return min(max(round(kept), 1), patches)


_TOKENS = ("data.resolution", "encoders.image.factor", "model.patch", "diffusion.mask_ratio")
"""Fields behind tokens_per_image."""


# --- experts and the tokens they choose from -------------------------------------------------------------------


def _experts(cfg: RunConfig, check: Checker) -> None:
    if cfg.moe.layers == "even":
        rule = "must be at least 2 with experts: layers 2, 4, ... carry them"
        check.require(cfg.model.layers >= 2, "model.layers", rule=rule, nearest=2)
    if cfg.moe.layers == "after_3":
        rule = "must be at least 4 with moe.layers = after_3: layers 4, 5, ... carry experts"
        check.require(cfg.model.layers >= 4, "model.layers", rule=rule, nearest=4)
    if check.sane("moe.expert_ratio", "model.width", "model.ffn_ratio"):
        hidden, width = cfg.expert_ratio * cfg.model.width, cfg.model.width
        rule = (
            f"must give experts of a whole width: {short(cfg.expert_ratio)} * model.width = {width} is {short(hidden)}"
        )
        nearest = max(round(hidden), 1) / width
        check.require(is_whole(hidden) and hidden >= 1 - 1e-6, "moe.expert_ratio", rule=rule, nearest=nearest)
    if cfg.moe.form == "lean" and cfg.moe.experts is not None and not cfg.moe.experts.lean:
        rule = f"{type(cfg.moe.experts).__name__} has no lean form (it builds no `model.experts.two_layers.TwoLayers`)"
        check.require(False, "moe.form", rule=rule, nearest="plain")
    if cfg.moe.shared_experts and cfg.moe.experts is not None and not cfg.moe.experts.shared_matrices:
        rule = f"must be 0: {type(cfg.moe.experts).__name__} has no form that works on every token"
        check.require(False, "moe.shared_experts", rule=rule, nearest=0)
    for name in ("experts", "dispatcher"):
        rule = f"must be filled when moe.router is; choose one with moe/{name}=NAME"
        check.require(getattr(cfg.moe, name) is not None, f"moe.{name}", rule=rule)


def _training_group(cfg: RunConfig, check: Checker) -> None:
    """Groups hold whole images and a fixed capacity is whole."""
    moe = cfg.moe
    if not check.sane(*_TOKENS, "moe.group_size", "moe.num_experts", *_router_keys(check), "train.microbatch"):
        return
    tokens = cfg.tokens_per_image
    if moe.scope == "group" and not check.require(
        moe.group_size % tokens == 0,
        "moe.group_size",
        rule=f"must hold whole images of {tokens} kept patches",
        nearest=nearest_multiple(moe.group_size, tokens),
    ):
        return
    # What fits this unit fits the training group and the sampling group.
    unit = gcd(cfg.group_tokens, cfg.sample.group_size if cfg.sample.scope == "group" else cfg.patches_per_image)
    for first, stage in cfg.stages():
        if stage.capacity is not None and not is_whole(stage.capacity):
            _not_whole(stage, check, of=cfg, first=first, unit=unit)


def _not_whole(stage: RunConfig, check: Checker, *, of: RunConfig, first: int, unit: int) -> None:
    """Names what would give whole capacities: the factor of a later stage; of the first one, experts if a number of them does."""
    E, per_token = of.moe.num_experts, _rows_per_token(stage)
    formula = (
        f"capacity{f' from step {first} on' if first else ''} = group * experts per token / experts = "
        f"{of.group_tokens} * {short(per_token)} / {E} = {short(stage.capacity or 0)} must be whole"
    )
    nearest_factor = max(round(unit * per_token / E), 1) * E / unit
    later, factor = "moe.router.schedule", "moe.router.capacity_factor"
    if first and later in check.values:
        mended = [(step, nearest_factor if step == first else value) for step, value in check.values[later]]
        check.require(False, later, rule=formula, nearest=as_yaml(mended))
        return
    fitting = [n for n in range(1, 2 * E + 1) if _fits(of, unit, num_experts=n)]
    if fitting or factor not in check.values:
        nearest = min(fitting, key=lambda n: (abs(n - E), n), default=None)
        check.require(False, "moe.num_experts", rule=formula, nearest=nearest)
    else:
        check.require(False, factor, rule=formula, nearest=nearest_factor)


def _router_keys(check: Checker) -> list[str]:
    """Keys of the router's own class."""
    return [key for key in check.values if key.startswith("moe.router.")]


def _rows_per_token(cfg: RunConfig) -> float:
    assert cfg.moe.router is not None
    return cfg.moe.router.experts_per_token()


def _fits(cfg: RunConfig, group_tokens: int, *, num_experts: int, drawing: bool = False) -> bool:
    """Whether an expert takes a whole number of rows in every stage, at least one and no more than there are tokens."""
    return all(_fits_stage(c, group_tokens, num_experts=num_experts, drawing=drawing) for _, c in cfg.stages())


def _fits_stage(cfg: RunConfig, group_tokens: int, *, num_experts: int, drawing: bool) -> bool:
    assert cfg.moe.router is not None
    capacity = cfg.moe.router.sampling_capacity if drawing else cfg.moe.router.capacity
    rows = capacity(group_tokens=group_tokens, num_experts=num_experts)
    return rows is None or (is_whole(rows) and 1 <= round(rows) <= group_tokens)


def _sampling_group(cfg: RunConfig, check: Checker) -> None:
    """The same while sampling, where nothing is masked."""
    moe, sample = cfg.moe, cfg.sample
    if not check.sane(*_TOKENS[:3], "moe.num_experts", *_router_keys(check), "sample.group_size"):
        return
    patches = cfg.patches_per_image

    def formula(group: int) -> str:
        kind = {"group_tokens": group, "num_experts": moe.num_experts}
        first, stage = next(
            (n, c) for n, c in cfg.stages() if not _fits_stage(c, group, num_experts=moe.num_experts, drawing=True)
        )
        assert stage.moe.router is not None
        rows = stage.moe.router.sampling_capacity(**kind)
        return (
            f"sampling capacity{f' from step {first} on' if first else ''} = group * experts per token / experts = "
            f"{group} * {short(_rows_per_token(stage))} / {moe.num_experts} = {short(rows or 0)} must be whole"
        )

    def fits(group: int) -> bool:
        return _fits(cfg, group, num_experts=moe.num_experts, drawing=True)

    if sample.scope != "group":  # any number of images: one image's share must be whole already
        if not fits(patches):
            alike = fits(sample.group_size) and sample.group_size % patches == 0
            check.require(False, "sample.scope", rule=formula(patches), nearest="group" if alike else None)
        return
    fitting = [patches * n for n in range(1, moe.num_experts + 1) if fits(patches * n)]
    step = fitting[0] if fitting else patches  # multiples of this hold whole images and give a whole capacity
    nearest_size = nearest_multiple(sample.group_size, step)
    rule = f"must hold whole images of {patches} patches"
    whole = check.require(sample.group_size % patches == 0, "sample.group_size", rule=rule, nearest=nearest_size)
    if whole and not fits(sample.group_size):
        check.require(False, "sample.group_size", rule=formula(sample.group_size), nearest=nearest_size)


# --- batch and schedule ----------------------------------------------------------------------------------------


def _batch(cfg: RunConfig, check: Checker) -> None:
    """A microbatch fills whole groups and divides the global batch."""
    train = cfg.train
    if not check.sane("train.global_batch", "train.microbatch", "moe.group_size", *_TOKENS):
        return
    images = cfg.images_per_group
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
    if cfg.optim.schedule == "wsd" and check.sane("train.steps", "optim.warmup_steps"):
        room = cfg.train.steps - cfg.optim.warmup_steps
        check.require(
            1 <= cfg.optim.decay_steps <= room,
            "optim.decay_steps",
            rule=f"must be at least 1 and at most train.steps - optim.warmup_steps = {room} with optim.schedule=wsd",
            nearest=min(max(cfg.optim.decay_steps, -(-cfg.train.steps // 10)), room),
        )
    check.require(
        cfg.observe.sample_every == 0 or len(cfg.observe.prompts) > 0,
        "observe.prompts",
        rule=f"must not be empty while observe.sample_every = {cfg.observe.sample_every}",
        nearest="observe.sample_every=0",
    )
