"""Rules of a layout over ranks: dp_replicate * dp_shard * tp == edp * ep == world."""

from __future__ import annotations

from math import gcd

from ecdit_train.config.nearest import divisors, nearest_divisor, nearest_multiple
from ecdit_train.config.rules import Checker, is_whole
from ecdit_train.config.schema import RunConfig

NO_SEQUENCE_PARALLEL = "not available: an expert ranks its whole group, so each tp rank needs all tokens"


def check_layout(cfg: RunConfig, check: Checker, *, world: int | None) -> None:
    """Appends what is wrong with `cfg.parallel`; rules that need the number of ranks only when `world` is given."""
    parallel = cfg.parallel
    check.at_least(1, [f"parallel.{name}" for name in ("dp_replicate", "tp", "ep", "overlap_chunks")])
    rule = "must be at least 1, or -1 for the ranks that are left"
    check.require(parallel.dp_shard == -1 or parallel.dp_shard >= 1, "parallel.dp_shard", rule=rule, nearest=-1)
    _tensor(cfg, check)
    _sequence(cfg, check)
    _recomputation(cfg, check)
    _expert(cfg, check)
    _exchange(cfg, check)
    if world is not None and check.sane("parallel.dp_replicate", "parallel.dp_shard", "parallel.tp", "parallel.ep"):
        _world(cfg, check, world=world)


def _slots(cfg: RunConfig, check: Checker) -> int:
    """Largest divisor of an expert's slots in a group, over all stages; 0 without experts, or when rows vary (all divide 0)."""
    if not _capacity_is_sane(cfg, check):
        return 0
    return gcd(*(0 if stage.capacity is None else round(stage.capacity) for _, stage in cfg.stages()))


def _shared_hidden(cfg: RunConfig, check: Checker) -> int:
    """Hidden width of the shared experts; 0 without."""
    if cfg.moe.router is None or not check.sane("moe.shared_experts", "moe.expert_ratio"):
        return 0
    return cfg.moe.shared_experts * round(cfg.expert_ratio * cfg.model.width)


def _fitting_tp(cfg: RunConfig, check: Checker) -> list[int]:
    """Every tp that splits the heads, the feed-forward and the slots evenly.

    Key/value heads are split while there are enough, and repeated evenly over the ranks when there are not.
    """
    model = cfg.model
    return [
        d
        for d in divisors(model.heads)
        if model.width * model.ffn_ratio % d == 0
        and _shared_hidden(cfg, check) % d == 0
        and _slots(cfg, check) % d == 0
        and (d % model.kv_heads == 0 or model.kv_heads % d == 0)
    ]


_TP_FIELDS = ("parallel.tp", "model.heads", "model.kv_heads", "model.width", "model.ffn_ratio")


def _tensor(cfg: RunConfig, check: Checker) -> None:
    """tp splits heads, feed-forward columns and every expert's slots."""
    model, tp = cfg.model, cfg.parallel.tp
    if not check.sane(*_TP_FIELDS) or tp == 1:
        return
    hidden, slots = model.width * model.ffn_ratio, _slots(cfg, check)
    nearest = min(_fitting_tp(cfg, check), key=lambda d: (abs(d - tp), d))
    rule = f"must divide model.heads = {model.heads}"
    check.require(model.heads % tp == 0, "parallel.tp", rule=rule, nearest=nearest)
    more = tp > model.kv_heads
    rule = f"must {'be a multiple of' if more else 'divide'} model.kv_heads = {model.kv_heads}"
    even = tp % model.kv_heads == 0 if more else model.kv_heads % tp == 0
    check.require(even, "parallel.tp", rule=rule, nearest=nearest)
    rule = f"must divide the feed-forward width = {model.width} * {model.ffn_ratio} = {hidden}"
    check.require(hidden % tp == 0, "parallel.tp", rule=rule, nearest=nearest)
    if shared := _shared_hidden(cfg, check):
        rule = f"must divide the hidden width of the shared experts = {shared}"
        check.require(shared % tp == 0, "parallel.tp", rule=rule, nearest=nearest)
    rule = f"must divide the capacity = {slots}: each tp rank carries its share of an expert's slots"
    check.require(slots % tp == 0, "parallel.tp", rule=rule, nearest=nearest)


def _capacity_is_sane(cfg: RunConfig, check: Checker) -> bool:
    """Whether the capacity could be computed and is whole (if not, that is reported already)."""
    fields = (
        *("moe.num_experts", "moe.group_size", "train.microbatch", "data.resolution"),
        *("encoders.image.factor", "model.patch", "diffusion.mask_ratio"),
        *(key for key in check.values if key.startswith("moe.router.")),
    )
    return (
        check.sane(*fields)
        and cfg.group_tokens > 0
        and all(stage.capacity is None or is_whole(stage.capacity) for _, stage in cfg.stages())
    )


def _sequence(cfg: RunConfig, check: Checker) -> None:
    """Refused at any tp (docs/decisions/0007)."""
    wanted = cfg.parallel.sequence_parallel
    check.require(not wanted, "parallel.sequence_parallel", rule=NO_SEQUENCE_PARALLEL, nearest="false")


def _recomputation(cfg: RunConfig, check: Checker) -> None:
    """What is asked of checkpointing must have an effect."""
    parallel, mode = cfg.parallel, cfg.parallel.activation_checkpointing
    rule = f"must be [] with activation_checkpointing = {mode}: `selective` keeps what is named here"
    check.require(mode == "selective" or not parallel.keep, "parallel.keep", rule=rule, nearest="[]")
    once = list(dict.fromkeys(parallel.keep))
    rule = "must name each kind once"
    check.require(len(once) == len(parallel.keep), "parallel.keep", rule=rule, nearest=f"[{','.join(once)}]")
    share = parallel.checkpoint_blocks
    rule = "must be above 0 and at most 1; no block is activation_checkpointing=none"
    check.require(0 < share <= 1, "parallel.checkpoint_blocks", rule=rule, nearest=1.0)
    if mode == "none" and check.sane("parallel.checkpoint_blocks"):
        rule = "must be 1 with activation_checkpointing = none"
        check.require(share == 1, "parallel.checkpoint_blocks", rule=rule, nearest=1.0)


def _exchange(cfg: RunConfig, check: Checker) -> None:
    """A hierarchical exchange needs whole nodes, more than one of them."""
    ep, node = cfg.parallel.ep, cfg.cluster.gpus_per_node
    if cfg.parallel.exchange == "flat" or not check.sane("parallel.ep", "cluster.gpus_per_node"):
        return
    rule = f"needs ep = {ep} to be several whole nodes of cluster.gpus_per_node = {node}"
    several = node > 1 and ep > node and ep % node == 0
    if check.require(several, "parallel.exchange", rule=rule, nearest="flat"):
        varies = _capacity_is_sane(cfg, check) and cfg.capacity is None
        fixed = not varies or cfg.moe.dispatcher is None or cfg.moe.dispatcher.cap is not None
        rule = "must be flat while the number of rows varies (moe.dispatcher.cap = null)"
        check.require(fixed, "parallel.exchange", rule=rule, nearest="flat")


def _expert(cfg: RunConfig, check: Checker) -> None:
    """ep spreads whole experts; chunks hold whole groups."""
    parallel, moe = cfg.parallel, cfg.moe
    if moe.router is None:
        check.require(parallel.ep == 1, "parallel.ep", rule="must be 1 in a dense network: no experts", nearest=1)
        return
    if check.sane("parallel.ep", "moe.num_experts"):
        check.require(
            moe.num_experts % parallel.ep == 0,
            "parallel.ep",
            rule=f"must divide moe.num_experts = {moe.num_experts}",
            nearest=nearest_divisor(parallel.ep, moe.num_experts),
        )
    if not check.sane("parallel.overlap_chunks"):
        return
    varies = _capacity_is_sane(cfg, check) and cfg.capacity is None
    if varies and moe.dispatcher is not None and moe.dispatcher.cap is None:
        rule = "must be 1 while the number of rows varies (moe.dispatcher.cap = null)"
        check.require(parallel.overlap_chunks == 1, "parallel.overlap_chunks", rule=rule, nearest=1)
    elif _capacity_is_sane(cfg, check):
        groups = cfg.train.microbatch * cfg.tokens_per_image // cfg.group_tokens
        check.require(
            parallel.overlap_chunks <= groups and groups % parallel.overlap_chunks == 0,
            "parallel.overlap_chunks",
            rule=f"must divide the {groups} routing groups of a microbatch",
            nearest=nearest_divisor(parallel.overlap_chunks, max(groups, 1)),
        )


def _world(cfg: RunConfig, check: Checker, *, world: int) -> None:
    """Both views cover the ranks exactly, and every data-parallel rank gets whole microbatches."""
    replicate, shard, tp, ep = (getattr(cfg.parallel, n) for n in ("dp_replicate", "dp_shard", "tp", "ep"))
    rest = world // (replicate * tp) if world % (replicate * tp) == 0 else None
    if shard == -1:
        rule = f"dp_replicate * tp = {replicate} * {tp} = {replicate * tp} must divide the world of {world} ranks"
        if world % replicate == 0:
            room = world // replicate
            usable = _fitting_tp(cfg, check) if check.sane(*_TP_FIELDS) else divisors(room)
            nearest = min((d for d in usable if room % d == 0), key=lambda d: (abs(d - tp), d))
            check.require(rest is not None, "parallel.tp", rule=rule, nearest=nearest)
        else:
            nearest = nearest_divisor(replicate, max(world // tp, 1))
            check.require(rest is not None, "parallel.dp_replicate", rule=rule, nearest=nearest)
    else:
        product = replicate * shard * tp
        check.require(
            product == world,
            "parallel.dp_shard",
            rule=f"dp_replicate * dp_shard * tp = {replicate} * {shard} * {tp} = {product} "
            f"must equal the world of {world} ranks",
            nearest=rest,
        )
    check.require(
        world % ep == 0,
        "parallel.ep",
        rule=f"must divide the world of {world} ranks (edp * ep = world)",
        nearest=max(d for d in divisors(world) if d <= ep and (cfg.moe.router is None or cfg.moe.num_experts % d == 0)),
    )
    if cfg.parallel.replicate_experts and check.sane("parallel.ep", "parallel.dp_replicate") and world % ep == 0:
        rule = f"needs dp_replicate = {replicate} to divide edp = world / ep = {world} / {ep} = {world // ep}"
        check.require(world // ep % replicate == 0, "parallel.replicate_experts", rule=rule, nearest="false")
    if check.sane("parallel.tp", "parallel.dp_replicate", "train.global_batch", "train.microbatch") and world % tp == 0:
        _microbatches(cfg, check, dp=world // tp)


def _microbatches(cfg: RunConfig, check: Checker, *, dp: int) -> None:
    """global_batch % (dp * microbatch) == 0; a smaller microbatch is the first remedy, another batch the second. And as many
    images at a time as the router wants to select among."""
    batch, micro = cfg.train.global_batch, cfg.train.microbatch
    together = cfg.moe.router.images_together() if cfg.moe.router is not None else None
    if together is not None:
        rule = f"dp * microbatch = {dp} * {micro} = {dp * micro} must be the {together} images that the router selects among"
        share = together // dp if together % dp == 0 else None
        if not check.require(dp * micro == together, "train.microbatch", rule=rule, nearest=share):
            return
    rule = f"dp * microbatch = {dp} * {micro} = {dp * micro} must divide train.global_batch = {batch}"
    images = cfg.images_per_group if check.sane("moe.group_size") else 1
    fitting = [d for d in divisors(batch // dp) if d % images == 0] if batch % dp == 0 and batch >= dp else []
    if fitting:
        nearest = min(fitting, key=lambda d: (abs(d - micro), d))
        check.require(batch % (dp * micro) == 0, "train.microbatch", rule=rule, nearest=nearest)
    else:
        nearest_batch = nearest_multiple(batch, dp * micro)
        check.require(batch % (dp * micro) == 0, "train.global_batch", rule=rule, nearest=nearest_batch)
