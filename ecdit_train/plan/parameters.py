"""Parameters by part, counted on the real network built on the meta device (no memory, a second for 97 billion)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecdit_train.config.schema import RunConfig
from ecdit_train.model.dit import DiT

PARTS = (
    "embedding",
    "text",
    "self_attention",
    "cross_attention",
    "dense_feed_forward",
    "experts",
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
    text_encoder: int
    image_codec: int
    active_experts: float
    """Experts' parameters that work on a mean token: f_c / E of them."""

    @property
    def network(self) -> int:
        """The trained network (DiT only)."""
        return sum(self.by_part.values())

    @property
    def encoders(self) -> int:
        """Frozen text encoder and image codec."""
        return self.text_encoder + self.image_codec

    @property
    def total(self) -> int:
        return self.network + self.encoders

    @property
    def activated(self) -> int:
        """Total minus the experts beyond f_c: every sparse layer counts capacity_factor feed-forwards (paper, Table
        1)."""
        return round(self.total - self.by_part["experts"] + self.active_experts)


def count(cfg: RunConfig) -> Parameters:
    """Build the network on the meta device and count."""
    with torch.device("meta"):
        model = DiT(cfg.model, cfg.moe, channels=cfg.encoders.image.channels, text_features=cfg.encoders.text.width)
    by_part = dict.fromkeys(PARTS, 0)
    root = 0
    blocks = [[0, 0, 0] for _ in model.blocks]  # per block: experts, router, everything else
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
    share = cfg.moe.capacity_factor / cfg.moe.experts
    return Parameters(
        by_part=by_part,
        root=root,
        dense_per_block=dense[0] if dense else 0,
        sparse_per_block=sparse_each,
        router_per_block=router_each,
        experts_per_block=experts_each,
        dense_blocks=len(dense),
        sparse_blocks=len(sparse),
        text_encoder=cfg.encoders.text.parameters,
        image_codec=cfg.encoders.image.parameters,
        active_experts=by_part["experts"] * share,
    )


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
        (".router.", "router"),
        ("feed_forward", "dense_feed_forward"),
    ):
        if key in name:
            return part
    raise AssertionError(f"parameter {name} belongs to no part")
