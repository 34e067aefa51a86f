"""torch.compile, block by block: one graph is compiled for all blocks of a kind, and FSDP's hooks stay between graphs."""

from __future__ import annotations

from ecdit_train.model.dit import DiT


def apply_compile(model: DiT) -> None:
    """Compile the blocks in place; names and types of the modules stay."""
    for block in model.blocks:
        block.compile()
