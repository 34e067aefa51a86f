"""torch.compile, block by block, around what must stay visible: FSDP's hooks, the exchanges and the routing decision.

A dense block is one graph. In a sparse block the experts' products are one graph, and what comes before and after the
layer are two: four graphs for a model of any depth. Routing, dispatch and combine run as they are written, since
selective checkpointing must see the ops whose results it keeps, FSDP's hooks on routers and experts must not sit inside
a graph, and a graph should not end while a message is in flight.
"""

from __future__ import annotations

import torch

from ecdit_train.model.dit import DiT
from ecdit_train.model.experts.two_layers import TwoLayers
from ecdit_train.model.moe import MoE, plain


def apply_compile(model: DiT) -> None:
    """Compile in place. Only functions are replaced: names, types and hooks of the modules stay. Not
    `Module.compile()`, which would take FSDP's hooks into the graph."""
    for block in model.blocks:
        moe = block.feed_forward
        if isinstance(moe, MoE):
            experts = moe.experts
            if moe.form is plain:
                experts.compute = torch.compile(experts.compute)  # type: ignore[method-assign]
            elif isinstance(experts, TwoLayers):  # its products stand alone: what is between them is fused
                experts.activate_forward = torch.compile(experts.activate_forward)  # type: ignore[method-assign]
                experts.activate_backward = torch.compile(experts.activate_backward)  # type: ignore[method-assign]
            moe.forward = torch.compiler.disable(moe.forward)  # type: ignore[method-assign]
        block.forward = torch.compile(block.forward)
