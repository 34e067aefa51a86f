"""torch.compile, block by block, around what must stay visible: FSDP's hooks, the exchanges and the routing decision.

A dense block is one graph. In a sparse block the experts' products are one graph, and what comes before and after the
layer are two: four graphs for a model of any depth. Routing, dispatch and combine run as they are written, since
selective checkpointing must see the ops whose results it keeps, FSDP's hooks on routers and experts must not sit inside
a graph, and a graph should not end while a message is in flight.

What `parallel.keep` names runs as it is written, too. That costs little: attention, its projections and the products of a
feed-forward are library kernels in a graph as well, and there is nothing between them that could be fused with them (GELU is one
kernel either way). Norms, modulation and residuals stay compiled.

Products of 8-bit operands (`train.precision=fp8`) run between graphs, too, since they take notes of what they meet;
what passes over their operands (the largest magnitude, the rounding) is one loop each.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from ecdit_train.config.schema import Kept
from ecdit_train.model.block import Block
from ecdit_train.model.dit import DiT
from ecdit_train.model.experts.two_layers import TwoLayers
from ecdit_train.model.fp8 import Fp8Product
from ecdit_train.model.moe import MoE, plain

from .activation import checkpointed_blocks, modules_that_keep


def apply_compile(model: DiT, *, keep: Collection[Kept] = (), share: float = 1.0) -> None:
    """Compile in place. Only functions are replaced: names, types and hooks of the modules stay. Not
    `Module.compile()`, which would take FSDP's hooks into the graph."""
    # Blocks of one class share it: dense and sparse, checkpointed and not, training, validation and drawing.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    seen = set(checkpointed_blocks(model, share=share)) if keep else set()
    for block in model.blocks:
        assert isinstance(block, Block)
        moe = block.feed_forward
        if isinstance(moe, MoE):
            experts = moe.experts
            if block not in seen or "experts" not in keep:
                if moe.form is plain:
                    experts.compute = torch.compile(experts.compute)  # type: ignore[method-assign]
                elif isinstance(experts, TwoLayers):
                    compile_activations(experts)
            moe.forward = torch.compiler.disable(moe.forward)  # type: ignore[method-assign]
        if block in seen:
            for module, _ in modules_that_keep(block, keep):
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    for layer in model.modules():
        if isinstance(layer, Fp8Product):
            compile_casts(layer)
        elif isinstance(getattr(layer, "fp8", None), Fp8Product):
            layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]


def compile_casts(product: Fp8Product) -> None:
    """In place. Shapes are left open: there are a dozen."""
    product.amax_of = torch.compile(product.amax_of, dynamic=True)
    product.block_scale = torch.compile(product.block_scale, dynamic=True)
    if product.backend != "transformer_engine":  # its own cast is one pass
        product.cast = torch.compile(product.cast, dynamic=True)


def compile_activations(experts: TwoLayers) -> None:
    """For the lean form, in place: its products stand alone, what is between them becomes one kernel each way."""
    experts.activate_forward = torch.compile(experts.activate_forward)  # type: ignore[method-assign]
    experts.activate_backward = torch.compile(experts.activate_backward)  # type: ignore[method-assign]
