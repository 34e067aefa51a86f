"""bf16: how far it may be from fp32, what stays fp32, and what travels."""

from __future__ import annotations

from typing import Any

import torch
from dist_cases import Case, batch, case, check_cases, forward, make_model, sharded
from dist_harness import run_distributed

from ecdit_train.model.init import initialise
from ecdit_train.parallel import expert_parallel
from ecdit_train.parallel.apply import fill, full_tensors, parallelize
from ecdit_train.parallel.expert_parallel import sparse_layers
from ecdit_train.parallel.mesh import make_mesh

LOSS_BOUND, NORM_BOUND, GRAD_BOUND, WEIGHT_BOUND = 5e-3, 5e-3, 0.2, 1e-2
"""Against fp32 on one process, 1 step (a rounded router input moves a few tokens to other experts, so single gradients
differ by much more than a bf16 rounding; a wrong scale or a missing sum would show in loss, norm or weights)."""


def bf16(**rest: Any) -> Case:
    return case(precision="bf16", dtype="float32", steps=1, **rest)


def test_bf16_is_near_fp32() -> None:
    for world in (1, 4):
        layouts = (
            [bf16()]
            if world == 1
            else [bf16(), bf16(tp=2, ep=2), bf16(ep=4, ac="selective", chunks=2), bf16(tp=4, ep=2)]
        )
        for name, errors in run_distributed(world, check_cases, layouts)[0]:
            print(f"{world} ranks  {name:80s} {errors}")
            assert errors.loss < LOSS_BOUND, name
            assert errors.norm < NORM_BOUND, name
            assert errors.weight < WEIGHT_BOUND, name
            assert errors.grad < GRAD_BOUND, name
            assert errors.copies_agree, name


def watch_types(runtime: Any) -> dict[str, Any]:
    """Types that a bf16 forward meets, and the number of exchanges of forward and backward
    under each checkpointing mode."""
    seen: dict[str, Any] = {"wire": set(), "router": set(), "block": set(), "exchanges": {}}
    vendor = expert_parallel._vendor()
    for mode in ("none", "selective", "full"):
        c = bf16(tp=2, ep=4, ac=mode)
        mesh = make_mesh(c.parallel, device_type="cpu", world=runtime.world)
        model, _ = sharded(c, mesh)
        count = [0]

        class Watched:
            @staticmethod
            def apply(group: Any, x: torch.Tensor, count: list[int] = count) -> torch.Tensor:
                count[0] += 1
                seen["wire"].add(str(x.dtype))
                return vendor.apply(group, x)

        for moe in sparse_layers(model).values():
            moe.router.register_forward_hook(
                lambda m, args, out: seen["router"].update({str(m.weight.dtype), str(out.probability_GSE.dtype)})
            )
        model.blocks[0].register_forward_hook(lambda m, args, out: seen["block"].add(str(out[0].dtype)))
        original, expert_parallel._vendor = expert_parallel._vendor, lambda watched=Watched: watched
        try:
            mine = {k: v.chunk(mesh.dp_size)[mesh.dp_rank] for k, v in batch(0).items()}
            forward(model, mine, group_tokens=c.group_tokens)[0].backward()
        finally:
            expert_parallel._vendor = original
        seen["exchanges"][mode] = count[0]
        seen["grad"] = {str(p.grad.dtype) for p in model.parameters()}
        seen["param"] = {str(p.dtype) for p in model.parameters()}
    return seen


def test_what_travels_and_what_stays_fp32() -> None:
    for seen in run_distributed(4, watch_types):
        assert seen["wire"] == {"torch.bfloat16"}
        assert seen["router"] == {"torch.float32"}
        assert seen["block"] == {"torch.bfloat16"}
        assert seen["grad"] == seen["param"] == {"torch.float32"}
        # 2 sparse layers, out and back, forward and backward; full checkpointing pays both exchanges of forward
        # again, less what torch's early stop spares it.
        assert seen["exchanges"]["none"] == seen["exchanges"]["selective"] == 8
        assert seen["exchanges"]["full"] > 8


def filled(runtime: Any, cases: list[Case]) -> list[bool]:
    answers = []
    for c in cases:
        mesh = make_mesh(c.parallel, device_type="cpu", world=runtime.world)
        with torch.device("meta"):
            model, plain = make_model(c), make_model(c)
        placements = parallelize(model, mesh=mesh, parallel=c.parallel, precision=c.precision)
        model.to_empty(device="cpu")
        fill(model, placements, seed=5)
        plain.to_empty(device="cpu")
        initialise(plain, seed=5)
        full = full_tensors(dict(model.named_parameters()), placements, mesh)
        answers.append(all(torch.equal(full[n], p) for n, p in plain.named_parameters()))
    return answers


def test_first_weights_are_the_same_on_every_layout() -> None:
    cases = [case(), case(tp=2, ep=4), case(tp=4), case(rep=2, ep=2), case(ep=4, precision="bf16")]
    assert all(all(answers) for answers in run_distributed(4, filled, cases))
