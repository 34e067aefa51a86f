"""Parameters by part, counted on the real network on the meta device, and the printed counts of the paper's Table 1."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ecdit_train.config.schema import RunConfig
from ecdit_train.parallel.tensor_parallel import split_of

from . import slots

PARTS = (
    "embedding",
    "text",
    "self_attention",
    "cross_attention",
    "dense_feed_forward",
    "experts",
    "shared_experts",
    "router",
    "modulation",
    "final",
)
"""Every parameter belongs to exactly one. `embedding`: patches, timestep, pooled text. `text`: projection, null text
and refiner. `modulation`: shared, per block and final. `cross_attention` includes its norm."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters. Totals include the frozen encoders, as the paper's Table 1 does."""

    by_part: dict[str, int]
    """The trained network only; keys are PARTS."""
    root: int
    """Trained parameters outside the blocks (they form one sharding unit)."""
    dense_per_block: int
    """Parameters of a dense block."""
    sparse_per_block: int
    """Parameters of a sparse block without its experts and router; 0 if there is no sparse block."""
    router_per_block: int
    experts_per_block: int
    """Parameters of all experts of one sparse block."""
    dense_blocks: int
    sparse_blocks: int
    encoders: int
    """Frozen text encoder and image codec."""
    active_experts: float
    """Experts' parameters that work on a mean token: f_c / E of them."""
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of every parameter of the trained network, in its order."""
    state_bytes: float
    """Of the optimizer's state, all of it."""
    state_rates: dict[tuple[str, bool], float]
    """(sharding unit, whether tensor or expert parallelism splits it) -> mean bytes of optimizer state per element."""
    updates: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What the optimizer said of a layout (`traffic.update`): a search asks about each many times."""

    @property
    def network(self) -> int:
        """The trained network (DiT only)."""
        return sum(self.by_part.values())

    @property
    def total(self) -> int:
        return self.network + self.encoders

    @property
    def activated(self) -> int:
        """Total minus the experts beyond f_c: every sparse layer counts capacity_factor
        feed-forwards (paper, Table 1)."""
        return round(self.total - self.by_part["experts"] + self.active_experts)


def count(cfg: RunConfig) -> Parameters:
    """Build the network on the meta device and count."""
    model = slots.network(cfg)
    by_part = dict.fromkeys(PARTS, 0)
    root = 0
    blocks = [[0, 0, 0] for _ in model.blocks]  # per block: experts, router, everything else
    shapes = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    for name, p in model.named_parameters():
        part = part_of(name)
        by_part[part] += p.numel()
        if name.startswith("blocks."):
            blocks[int(name.split(".")[1])][{"experts": 0, "router": 1}.get(part, 2)] += p.numel()
        else:
            root += p.numel()
    dense = [rest for experts, _, rest in blocks if not experts]
    sparse = [tuple(block) for block in blocks if block[0]]
    assert max(len(set(dense)), len(set(sparse))) <= 1, "blocks of one kind differ in size"
    experts_each, router_each, sparse_each = sparse[0] if sparse else (0, 0, 0)
    return Parameters(
        by_part=by_part,
        root=root,
        dense_per_block=dense[0] if dense else 0,
        sparse_per_block=sparse_each,
        router_per_block=router_each,
        experts_per_block=experts_each,
        dense_blocks=len(dense),
        sparse_blocks=len(sparse),
        encoders=slots.encoder_parameters(cfg),
        active_experts=by_part["experts"] * slots.experts_per_token(cfg) / max(slots.num_experts(cfg), 1),
        shapes=shapes,
        **_optimizer_state(cfg, shapes),
    )


def _optimizer_state(cfg: RunConfig, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """`state_bytes` and `state_rates`. Blocks of one kind are alike, so their mean is that of each."""
    sparse = {name.split(".")[1] for name, _ in shapes if ".experts." in name}
    elements: dict[tuple[str, bool], float] = defaultdict(float)
    held: dict[tuple[str, bool], float] = defaultdict(float)
    for name, shape in shapes:
        unit, part = "root", part_of(name)
        if name.startswith("blocks."):
            block = "sparse block" if name.split(".")[1] in sparse else "dense block"
            unit = part if part in ("experts", "router") else block
        key = (unit, is_split(name))
        elements[key] += math.prod(shape)
        held[key] += math.prod(shape) * slots.optimizer_state_bytes(cfg, name, shape)
    return {"state_bytes": sum(held.values()), "state_rates": {key: held[key] / n for key, n in elements.items()}}


def is_split(name: str) -> bool:
    """Whether tensor parallelism or expert parallelism gives each rank a part of this parameter only."""
    return part_of(name) == "experts" or split_of(name.rpartition(".")[0]) is not None


def part_of(name: str) -> str:
    """The part of PARTS that a parameter belongs to, by its name in the network."""
    if not name.startswith("blocks."):
        first = name.split(".")[0]
        return {
            "text": "text",
            "final": "final",
            "shared_modulation": "modulation",
            "final_modulation": "modulation",
        }.get(first, "embedding")
    for key, part in (
        ("self_attention", "self_attention"),
        ("cross_attention", "cross_attention"),
        ("norm_text", "cross_attention"),
        ("modulation", "modulation"),
        (".experts.", "experts"),
        (".shared.", "shared_experts"),
        (".router.", "router"),
        ("feed_forward", "dense_feed_forward"),
    ):
        if key in name:
            return part
    raise AssertionError(f"parameter {name} belongs to no part")


# --- the paper's Table 1 ------------------------------------------------------------------------------------------

SHAPES: dict[tuple[int, int, int, int], str] = {
    (28, 1152, 18, 6): "XL",
    (38, 1536, 24, 6): "XXL",
    (42, 2304, 36, 6): "3XL",
    (46, 3072, 48, 12): "M",
    (38, 3072, 48, 12): "M",
}
"""(layers, width, heads, kv_heads) -> row. The dense M has 46 layers, M-64E has 38."""

PRINTED: dict[tuple[str, int], tuple[float, float]] = {
    ("XL", 0): (1.47, 1.47),
    ("XL", 8): (2.51, 1.62),
    ("XL", 16): (3.70, 1.62),
    ("XL", 32): (6.08, 1.62),
    ("XXL", 0): (2.35, 2.35),
    ("XXL", 8): (4.87, 2.71),
    ("XXL", 16): (7.73, 2.71),
    ("XXL", 32): (13.47, 2.71),
    ("3XL", 0): (4.50, 4.50),
    ("3XL", 8): (10.74, 5.18),
    ("3XL", 16): (17.87, 5.18),
    ("3XL", 32): (32.15, 5.18),
    ("M", 0): (8.03, 8.03),
    ("M", 64): (97.21, 8.27),
}
"""(row, experts) -> (total, activated) in billions, as printed; experts = 0 is the dense column."""

NOTE_3XL = (
    "the printed 5.18B activated for 3XL does not follow from the paper's own rule (dense + one more feed-forward "
    "in each of 21 sparse layers is 5.39B); every other row does"
)


@dataclass(frozen=True, kw_only=True)
class Table1:
    """A row of Table 1 next to what the network has; sizes in parameters, deviations relative."""

    row: str
    printed_total: float
    total_deviation: float
    printed_activated: float
    activated_deviation: float
    note: str | None


def table1(cfg: RunConfig, parameters: Parameters) -> Table1 | None:
    """The row of Table 1 that this network is, or None. Token-choice baselines have no row, though their
    sizes are the same."""
    m, experts = cfg.model, slots.table1_experts(cfg)
    name = SHAPES.get((m.layers, m.width, m.heads, m.kv_heads))
    printed = PRINTED.get((name, experts)) if name and experts is not None else None
    if printed is None or (name == "M" and (m.layers == 46) != (experts == 0)):
        return None
    total, activated = printed[0] * 1e9, printed[1] * 1e9
    return Table1(
        row=f"{name}-{experts}E" if experts else f"{name} dense",
        printed_total=total,
        total_deviation=parameters.total / total - 1,
        printed_activated=activated,
        activated_deviation=parameters.activated / activated - 1,
        note=NOTE_3XL if name == "3XL" and experts else None,
    )
