"""Who got how much compute, as numbers that do not depend on how a step was spread over ranks and microbatches.

`routing_sums` counts, on the device and without waiting for it; sums of all microbatches and ranks are added up by the metric
window; `routing_record` and `RoutingNumbers` read ratios, spreads and maxima off the totals.

Legend: G routing groups, S tokens of a group, N = G * S tokens, E experts, R rows (one token at one expert), T parts of the
timesteps, L sparse layers, P = E (E - 1) / 2 pairs of experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ecdit_train.model.assignment import Assignment, Table, chosen, expert_of_rows, experts_per_token, taken
from ecdit_train.model.router import AffinityRouter, Router
from ecdit_train.parallel.placement import local

from .metrics import Sums
from .timesteps import BINS, one_hot, timestep_bin

COVERED = 0.95
"""Share of co-activations that the counted pairs of experts cover."""
DEAD = 0.1
"""An expert is dead where the sum of its gates is below this share of the layer's mean: whatever it computes, next to nothing of it
enters. Said of gates, as loads are equal by construction under expert choice."""


def routing_sums(assignments: Sequence[Assignment], *, layers: Sequence[int], t_B: Tensor) -> dict[str, Tensor]:
    """What one microbatch adds, tensors by `moe/LAYER/NAME`. `layers`: the numbers of the sparse blocks, counted from 1; `t_B`:
    the timestep of each image, whose tokens follow each other."""
    if not assignments:
        return {}
    sums: dict[str, Tensor] = {}
    tokens = assignments[0].probability_GSE.flatten(0, 1).shape[0]
    t_N = t_B.repeat_interleave(tokens // len(t_B), output_size=tokens)
    of_TN = one_hot(timestep_bin(t_N))
    nowhere_N = torch.ones(tokens, dtype=torch.bool, device=t_B.device)
    for number, assignment in zip(layers, assignments, strict=True):
        counts_N = experts_per_token(assignment).flatten()
        nowhere_N &= counts_N == 0
        for name, value in _layer_sums(assignment, counts_N=counts_N, t_N=t_N, of_TN=of_TN).items():
            sums[f"moe/{number}/{name}"] = value
    sums["moe/0/nowhere"] = nowhere_N.sum().reshape(1)
    sums["moe/0/microbatches"] = torch.ones_like(sums["moe/0/nowhere"])
    return sums


def routing_maxima(assignments: Sequence[Assignment], *, layers: Sequence[int]) -> list[tuple[str, Tensor]]:
    """What routers report of themselves under names that end in `_max`, by layer and over layers: it is no sum."""
    found = []
    for number, assignment in zip(layers, assignments, strict=True):
        for name, value in assignment.metrics.items():
            if name.endswith("_max"):
                found += [(f"moe/L{number}/{name}", value), (f"moe/{name}", value)]
    return found


def _layer_sums(assignment: Assignment, *, counts_N: Tensor, t_N: Tensor, of_TN: Tensor) -> dict[str, Tensor]:
    probability_GSE = assignment.probability_GSE
    G, S, E = probability_GSE.shape
    chosen_NE = chosen(assignment)
    _, gate_R, one_R = taken(assignment)
    bin_N = timestep_bin(t_N)
    spread = torch.zeros(BINS * (E + 1), dtype=torch.float64, device=t_N.device)
    # Never more than E; a place beyond its own bin's would be another bin's.
    spread = spread.index_add(0, bin_N * (E + 1) + counts_N.clamp(max=E), torch.ones_like(t_N, dtype=torch.float64))
    entropy_N = torch.special.entr(probability_GSE.float()).sum(-1).flatten()
    gate_R = (gate_R.detach() * one_R).to(torch.float64)
    gate_E = torch.zeros(E, dtype=torch.float64, device=t_N.device).index_add(
        0, expert_of_rows(assignment), gate_R.abs()
    )
    pairs = torch.triu_indices(E, E, offset=1, device=t_N.device)
    together_EE = (chosen_NE.t() @ chosen_NE).to(torch.float64)
    return {
        "spread": spread.view(BINS, E + 1),
        "entropy": of_TN @ entropy_N.to(torch.float64),
        "rows": one_R.sum().reshape(1),
        "gate": gate_R.sum().reshape(1),
        "expert_gate": gate_E,
        "expert_rows": of_TN @ chosen_NE.to(torch.float64),
        "expert_t": t_N.to(torch.float64) @ chosen_NE.to(torch.float64),
        "together": together_EE[pairs[0], pairs[1]],
        **_edge(probability_GSE.float(), chosen_NE.view(G, S, E), bin_N=bin_N),
        **({} if _loads_are_equal(assignment) else {"uneven": torch.ones(1, device=t_N.device)}),
        **{f"own/{n}": value.detach().reshape(1) for n, value in assignment.metrics.items() if not n.endswith("_max")},
        **{
            f"share/{name}": torch.stack([part.to(torch.float64), whole.to(torch.float64)])
            for name, (part, whole) in assignment.shares.items()
        },
    }


def _loads_are_equal(assignment: Assignment) -> bool:
    return isinstance(assignment, Table) and assignment.filled_EGC is None


def _edge(a_GSE: Tensor, chosen_GSE: Tensor, *, bin_N: Tensor) -> dict[str, Tensor]:
    """How far the last token that an expert took of a group is from the first that it refused: the difference of their affinities
    over the sum, -1 to 1, added up by the timestep of the last one; and how many such edges there are."""
    was = chosen_GSE > 0
    last_GE, place_GE = a_GSE.masked_fill(~was, math.inf).min(1)
    first_GE = a_GSE.masked_fill(was, -math.inf).max(1).values
    real_GE = was.any(1) & ~was.all(1)  # an expert that took all or none has no edge
    margin_GE = torch.where(real_GE, (last_GE - first_GE) / (last_GE + first_GE).clamp(min=1e-30), 0.0)
    G, S, _ = a_GSE.shape
    bin_GE = bin_N.view(G, S).gather(1, place_GE)
    of_T = one_hot(bin_GE.flatten())
    return {
        "margin": of_T @ margin_GE.flatten().to(torch.float64),
        "edges": of_T @ real_GE.flatten().to(torch.float64),
    }


def weight_sums(routers: Sequence[Router], *, layers: Sequence[int]) -> dict[str, Tensor]:
    """Products of the routers' columns with each other, (E, E) by layer: this rank's rows of the weights, so that the sum over
    data-parallel ranks is the whole (times the number of copies, which an angle does not see)."""
    sums: dict[str, Tensor] = {}
    for number, router in zip(layers, routers, strict=True):
        if isinstance(router, AffinityRouter):
            weights = [w for w in (router.weight, router.timestep_weight) if w is not None]
            parts = [local(w.detach()).to(torch.float64) for w in weights]
            sums[f"moe/{number}/columns"] = torch.stack([part.t() @ part for part in parts]).sum(0)
    return sums


def routing_record(sums: Sums, *, layers: Sequence[int]) -> dict[str, float]:
    """`moe/L{n}/NAME` of every sparse layer and `moe/NAME` over layers (see METRICS) of the sums of a whole step."""
    record: dict[str, float] = {}
    of_layers: dict[str, list[float]] = {}
    microbatches = sums.get("moe/0/microbatches")
    if microbatches is None:
        return record
    for number in layers:
        for name, value in _layer_numbers(of_layer(sums, number), microbatches=float(microbatches[0])).items():
            record[f"moe/L{number}/{name}"] = value
            of_layers.setdefault(name, []).append(value)
    for name, values in of_layers.items():
        over = max if name.endswith("_max") else sum if name in COUNTS else _mean
        record[f"moe/{name}"] = over(values)
    spread_TK = np.sum([of_layer(sums, number)["spread"] for number in layers], axis=0)
    tokens_T, experts_T = spread_TK.sum(1), spread_TK @ np.arange(spread_TK.shape[1])
    record |= {f"moe/experts_per_token_t{b}": float(experts_T[b] / tokens_T[b]) for b in range(BINS) if tokens_T[b]}
    record["moe/dropped_everywhere_frac"] = float(sums["moe/0/nowhere"][0] / tokens_T.sum() * len(layers))
    return record


COUNTS = ("dead_experts",)
"""Numbers that are summed over layers."""


def of_layer(sums: Sums, number: int) -> dict[str, np.ndarray]:
    """What was gathered of one layer."""
    start = f"moe/{number}/"
    return {name.removeprefix(start): value for name, value in sums.items() if name.startswith(start)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _layer_numbers(of: Mapping[str, np.ndarray], *, microbatches: float) -> dict[str, float]:
    count_K = of["spread"].sum(0)
    K = np.arange(len(count_K))
    tokens, E = count_K.sum(), len(count_K) - 1
    mean = count_K @ K / tokens
    load_E = of["expert_rows"].sum(0)
    numbers = {
        "dropped_frac": count_K[0] / tokens,
        "experts_per_token_std": math.sqrt(max(count_K @ (K - mean) ** 2 / tokens, 0.0)),
        "experts_per_token_max": K[count_K > 0].max(),
        "entropy": of["entropy"].sum() / tokens / math.log(max(2, E)),
        "gate_mean": of["gate"][0] / max(of["rows"][0], 1),
        "max_violation": overload(load_E),
        "combination_usage": pairs_needed(of["together"]),
        "dead_experts": (of["expert_gate"] < DEAD * of["expert_gate"].mean()).sum(),
        "expert_timestep_std": mean_timestep(of)[load_E > 0].std() if load_E.any() else 0.0,
        **{name.removeprefix("own/"): value[0] / microbatches for name, value in of.items() if name.startswith("own/")},
        **{
            name.removeprefix("share/"): value[0] / max(value[1], 1)
            for name, value in of.items()
            if name.startswith("share/")
        },
    }
    if "uneven" in of:
        numbers["load_cv"] = load_E.std() / max(load_E.mean(), 1e-9)
    if of["edges"].any():
        numbers["edge_margin"] = of["margin"].sum() / of["edges"].sum()
    if "columns" in of and E > 1:
        alike = cosines(of["columns"])
        numbers |= {"expert_similarity": alike.mean(), "expert_similarity_max": alike.max()}
    return {name: float(value) for name, value in numbers.items()}


def mean_timestep(of: Mapping[str, np.ndarray]) -> np.ndarray:
    """(E,): of the tokens that an expert took; 0 where it took none."""
    return of["expert_t"] / np.maximum(of["expert_rows"].sum(0), 1)


def overload(load_E: np.ndarray) -> float:
    """MaxVio: the busiest expert's load over the mean load, less 1; 0 where loads are equal (Race-DiT, arXiv 2503.16057)."""
    return float(load_E.max() / max(load_E.mean(), 1e-9) - 1)


def pairs_needed(together_P: np.ndarray) -> float:
    """Combination usage: the share of the pairs of experts that are needed to cover 95 % of all co-activations, most frequent
    first (Race-DiT, arXiv 2503.16057): 0.95 where all pairs occur alike, near 0 where a few experts always work together. 0
    where no token has two."""
    total = together_P.sum() if len(together_P) else 0.0
    if not total:
        return 0.0
    covered = np.sort(together_P)[::-1].cumsum() / total
    return float(((covered < COVERED).sum() + 1) / len(together_P))


def cosines(product_EE: np.ndarray) -> np.ndarray:
    """(P,) cosines of the angles between vectors whose products with each other are given; 0 where one is zero."""
    length_E = np.sqrt(np.diag(product_EE))
    scale_EE = np.maximum(length_E[:, None] * length_E, 1e-30)
    return (product_EE / scale_EE)[np.triu_indices(len(product_EE), 1)]
