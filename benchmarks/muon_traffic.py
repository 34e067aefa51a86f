"""Gather or owners: what one Muon step sends and multiplies on each rank, by the plan's arithmetic (docs/decisions/0013).

    python -m benchmarks.muon_traffic

gather: every rank collects each matrix that it holds a part of and orthogonalises all of them itself; nothing comes back.
owners: the shipped way (`ecdit_train.parallel.owners`). Bytes are those of one rank's buffers, there and back.
"""

from __future__ import annotations

from ecdit_train.config.compose import compose
from ecdit_train.parallel.owners import matrices_of
from ecdit_train.plan import layout, parameters, traffic
from ecdit_train.train.optimizers.muon import Muon

LAYOUTS = {
    "XL-8E, 8 ranks, dp 8, ep 8": (8, "experiment=ec_dit_xl_8e"),
    "XL-8E, 16 ranks, dp 8 x tp 2, ep 8": (16, "experiment=ec_dit_xl_8e", "parallel.tp=2"),
    "XL-8E, 16 ranks, two copies of dp 8, ep 8": (16, "experiment=ec_dit_xl_8e", "parallel.dp_replicate=2"),
    "3XL-16E, 64 ranks, dp 64, ep 1": (64, "experiment=ec_dit_3xl_16e", "parallel=fsdp"),
    "M-64E, 64 ranks, dp 64, ep 64": (64, "experiment=ec_dit_m_64e"),
}


def row(name: str, world: int, *words: str) -> str:
    cfg = compose([*words, "optim=muon"], local=False)
    muon = cfg.optim.optimizer
    assert isinstance(muon, Muon)
    counted, at = parameters.count(cfg), layout.resolve(cfg, world=world)
    own = traffic.update(cfg, counted, at)
    gathered = flops = 0.0
    for held in layout.held_by_ranks(cfg, counted, at):
        if muon.is_muons(held.name, held.shape):
            for box, holders in zip(matrices_of(held.shape), held.holders, strict=True):
                if 0 in holders:
                    gathered += 2.0 * box.volume if len(holders) > 1 else 0
                    flops += muon.flops(*box.size[-2:])
    rate = cfg.cluster.peak_flops * cfg.cluster.gemm_efficiency
    cells = [name, *(f"{n / 1e9:.2f} GB" for n in (gathered, own.message))]
    cells += [f"{n / 1e12:.1f}" for n in (flops, own.flops)] + [f"{n / rate * 1e3:.0f} ms" for n in (flops, own.flops)]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    head = ("layout", "gather sends", "owners send", "gather, TFLOP", "owners, TFLOP", "gather", "owners")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, (world, *words) in LAYOUTS.items():
        print(row(name, world, *words))
