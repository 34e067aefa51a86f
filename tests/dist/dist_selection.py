"""Workers of test_dist_selection.py."""

from __future__ import annotations

import random
from typing import Any

import torch
from dist_cases import PARALLEL, batch, case, chosen_in_group, sharded
from torch.utils._python_dispatch import TorchDispatchMode

from ecdit_train.config.schema import MoEConfig
from ecdit_train.config.slots import RouterConfig, RouterSizes
from ecdit_train.model.embed import Text
from ecdit_train.model.router import RouterInput
from ecdit_train.model.selecting import GroupRanks, largest
from ecdit_train.parallel.data_parallel import gather_over_dp
from ecdit_train.parallel.mesh import make_mesh


def selected_alike(runtime: Any, cases: int) -> int:
    """How many random selections over these ranks equal the sort of all candidates in one place."""
    mesh = make_mesh(PARALLEL, device_type="cpu", world=runtime.world)
    ranks, draw, right = GroupRanks(mesh.dp_group), random.Random(runtime.world), 0
    pool = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-45, -1e-45, 1.5, -1.5, 3e38])
    for n in range(cases):
        generator, P = torch.Generator().manual_seed(n), draw.choice([1, 3, 50])
        sizes = [draw.randint(0, 20) for _ in range(runtime.world - 1)] + [draw.randint(1, 20)]
        dtype = draw.choice([torch.float32, torch.float64])
        every = torch.randn(P, sum(sizes), generator=generator).mul(2).round()
        if n % 3 == 0:
            every = pool[torch.randint(len(pool), every.shape, generator=generator)]
        parts, winners = every.to(dtype).split(sizes, dim=1), draw.randint(1, sum(sizes))
        found = largest(parts[runtime.rank].contiguous(), winners, ranks=ranks)
        here = largest(every.to(dtype), winners)
        same = torch.equal(found.won_PN, here.won_PN.split(sizes, dim=1)[runtime.rank])
        right += same and torch.equal(found.last_P.nan_to_num(7.7), here.last_P.nan_to_num(7.7))
    return right


class _Sent(TorchDispatchMode):
    """Kind and bytes of the full buffer of every functional collective."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.seen = world, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = {"_c10d_functional::all_reduce": "all_reduce", "_c10d_functional::all_gather_into_tensor": "all_gather"}
        if func._schema.name in kind:
            times = self.world if "gather" in func._schema.name else 1
            self.seen.append((kind[func._schema.name], args[0].numel() * args[0].element_size() * times))
        return func(*args, **(kwargs or {}))


def measured_messages(
    runtime: Any, config: RouterConfig, sizes: RouterSizes, image_tokens: int
) -> list[tuple[str, int]]:
    mesh = make_mesh(PARALLEL, device_type="cpu", world=runtime.world)
    router = config.build(sizes)
    generator = torch.Generator().manual_seed(runtime.rank)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    router.on_ranks(dp_group=mesh.dp_group)
    tokens = RouterInput.of(
        torch.randn(2, 2 * image_tokens, sizes.width, generator=generator), image_tokens=image_tokens
    )
    with _Sent(runtime.world) as sent:
        router(tokens)
    return sent.seen


def chosen_at_inference(runtime: Any, moe: MoEConfig) -> list[list[list[int]]]:
    """By layer and token: the number of times that each expert took it, in eval mode, gathered over the ranks."""
    c = case(moe=moe, dtype="float32")
    mesh = make_mesh(c.parallel, device_type="cpu", world=runtime.world)
    model, _ = sharded(c, mesh)
    model.eval()
    mine = {k: v.chunk(mesh.dp_size)[mesh.dp_rank] for k, v in batch(0).items()}
    text = Text(features_BLX=mine["features"], mask_BL=mine["mask"], drop_B=mine["drop"])
    with torch.no_grad():
        out = model(mine["latents"], t_B=mine["t"], text=text, keep_BK=mine["keep"], group_tokens=c.group_tokens)
    return [gather_over_dp(layer, mesh).flatten(0, 1).tolist() for layer in chosen_in_group(out)]
