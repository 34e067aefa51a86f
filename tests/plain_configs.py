"""Sections of a configuration for tests that need no run: one process, and a network of two small blocks. Imports no torch."""

from __future__ import annotations

from typing import Any

from ecdit_train.config.schema import ModelConfig, ParallelConfig

PARALLEL = ParallelConfig(
    dp_replicate=1,
    dp_shard=-1,
    tp=1,
    ep=1,
    sequence_parallel=False,
    activation_checkpointing="none",
    keep=(),
    checkpoint_blocks=1.0,
    compile=False,
    overlap_chunks=1,
    reduce_gradients="step",
    reshard_after_forward="all",
    replicate_experts=False,
    exchange="flat",
)


def model_config(**changes: Any) -> ModelConfig:
    sizes = {"layers": 2, "width": 128, "heads": 2, "kv_heads": 1, "ffn_ratio": 2, "patch": 2}
    text = {"text_width": 64, "text_refiner_layers": 1, "cross_attention": True}
    return ModelConfig(**({"name": "test", **sizes, **text, "modulation": "shared"} | changes))
