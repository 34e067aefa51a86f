"""Numbers of routing against slow plain definitions, for every kind of router, whatever the cut into
microbatches; and their file."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_configs import moe_config

from ecdit_train.config.slots import RouterSizes
from ecdit_train.errors import RunFolderError
from ecdit_train.model.assignment import Assignment, Rows
from ecdit_train.model.moe import Dispatcher
from ecdit_train.model.router import AffinityRouter, RouterInput
from ecdit_train.model.routers.diffmoe import DiffMoE
from ecdit_train.model.routers.nucleus import Nucleus
from ecdit_train.observe.metrics import MetricWindow, Sums
from ecdit_train.observe.routing_drift import drift_record, drift_sums, selections
from ecdit_train.observe.routing_numbers import FILES, RoutingNumbers, numbers_of, written_at
from ecdit_train.observe.routing_scalars import routing_record, routing_sums, weight_sums
from ecdit_train.observe.timesteps import loss_by_timestep, loss_sums

IMAGES, TOKENS, WIDTH, EXPERTS, GROUP = 8, 16, 12, 4, 32
"""Two images in a group."""
KINDS = (
    "expert_choice",
    "token_choice",
    "threshold",
    "capped",
    "expert_race",
    "ec_image",
    "be",
    "le",
    "nucleus",
    "diffmoe",
)
MAKES_ITS_OWN = {
    "nucleus": Nucleus(capacity_factor=1.0, sees="modulated", scores="softmax", route_scale=1.0, schedule=()),
    "diffmoe": DiffMoE(capacity_factor=1.0, sees="modulated", predictor_weight=1.0, momentum=0.9),
}


def layer(kind: str, seed: int) -> tuple[AffinityRouter, Dispatcher]:
    name, cap = ("threshold", 0.5) if kind == "capped" else (kind, None)
    config = moe_config("expert_choice" if kind in MAKES_ITS_OWN else name, num_experts=EXPERTS, cap=cap)
    sizes = RouterSizes(width=WIDTH, num_experts=EXPERTS, patch_values=3)
    router = MAKES_ITS_OWN.get(kind, config.router).build(sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in router.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    router.reset_buffers()
    return router, config.dispatcher.build()


def settled(kind: str, x_BSD: torch.Tensor, *, seed: int) -> Assignment:
    router, dispatcher = layer(kind, seed)
    x_GSD = x_BSD.reshape(-1, GROUP, WIDTH)
    return dispatcher.settle(router(RouterInput.of(x_GSD, image_tokens=TOKENS)))


def who(assignment: Assignment) -> list[tuple[int, int, float]]:
    """(token, expert, gate) of every row, one by one."""
    if isinstance(assignment, Rows):
        return list(
            zip(assignment.index_R.tolist(), assignment.expert_R.tolist(), assignment.gate_R.tolist(), strict=True)
        )
    E, G, C = assignment.index_EGC.shape
    filled = assignment.filled_EGC
    return [
        (int(assignment.index_EGC[e, g, c]), e, float(assignment.gate_EGC[e, g, c]))
        for e in range(E) for g in range(G) for c in range(C) if filled is None or filled[e, g, c]
    ]  # fmt: skip


def totals(parts: list[dict[str, torch.Tensor]]) -> Sums:
    window, kept = MetricWindow(device="cpu", images_per_step=1, tokens_per_step=1), {}
    for part in parts:
        window.add_sums(part)
    window.flush(reading=lambda sums: kept.update(sums) or {})
    return kept


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, TOKENS, WIDTH, generator=generator), torch.rand(IMAGES, generator=generator)


def plain(assignment: Assignment, t_B: torch.Tensor) -> dict[str, float]:
    """What the numbers of a layer mean, row by row."""
    rows, p = who(assignment), assignment.probability_GSE.flatten(0, 1).double().numpy()
    N = len(p)
    experts_of = {n: {e for token, e, _ in rows if token == n} for n in range(N)}
    counts = np.array([len(experts_of[n]) for n in range(N)])
    load = np.array([sum(e == expert for _, expert, _ in rows) for e in range(EXPERTS)])
    gates = np.array([sum(abs(gate) for _, expert, gate in rows if e == expert) for e in range(EXPERTS)])
    pairs = sorted(
        (sum({a, b} <= experts_of[n] for n in range(N)) for a, b in combinations(range(EXPERTS), 2)), reverse=True
    )
    margins = []
    for e in range(EXPERTS):
        for group in np.arange(N).reshape(-1, GROUP):
            took = [p[n, e] for n in group if e in experts_of[n]]
            left = [p[n, e] for n in group if e not in experts_of[n]]
            if took and left:
                margins.append((min(took) - max(left)) / (min(took) + max(left)))
    t_N = t_B.double().numpy().repeat(TOKENS)
    mean_t = [np.mean([t_N[n] for n in range(N) if e in experts_of[n]]) for e in range(EXPERTS) if load[e]]
    return {
        "dropped_frac": np.mean(counts == 0),
        "experts_per_token_std": counts.std(),
        "experts_per_token_max": counts.max(),
        "entropy": np.mean([-sum(q * math.log(q) for q in row if q > 0) for row in p]) / math.log(EXPERTS),
        "gate_mean": np.mean([gate for _, _, gate in rows]),
        "max_violation": load.max() / load.mean() - 1,
        "combination_usage": _needed(pairs) / len(pairs) if sum(pairs) else 0.0,
        "dead_experts": np.sum(gates < 0.1 * gates.mean()),
        "expert_timestep_std": np.std(mean_t),
        "edge_margin": np.mean(margins),
    }  # fmt: skip


def _needed(pairs: list[int]) -> int:
    covered = 0
    for needed, together in enumerate(pairs, 1):
        covered += together
        if covered >= 0.95 * sum(pairs) - 1e-9:
            return needed
    raise AssertionError


@pytest.mark.parametrize("kind", KINDS)
def test_against_plain_definitions(kind: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_BSD, t_B = batch
    called = [settled(kind, x_BSD, seed=seed) for seed in (1, 2)]
    record = routing_record(totals([routing_sums(called, layers=(2, 4), t_B=t_B)]), layers=(2, 4))
    means: Counter[str] = Counter()
    for number, assignment in zip((2, 4), called, strict=True):
        for name, value in plain(assignment, t_B).items():
            assert record[f"moe/L{number}/{name}"] == pytest.approx(value, rel=1e-6, abs=1e-9), name
            means[name] += value
    assert record["moe/dead_experts"] == means["dead_experts"]
    assert record["moe/entropy"] == pytest.approx(means["entropy"] / 2, rel=1e-6)
    took = [{token for token, _, _ in who(assignment)} for assignment in called]
    assert record["moe/dropped_everywhere_frac"] == 1 - len(took[0] | took[1]) / (IMAGES * TOKENS)
    for b in range(10):
        inside = [i for i in range(IMAGES) if int(t_B[i] * 10) == b]
        spent = sum(token // TOKENS in inside for assignment in called for token, _, _ in who(assignment))
        if inside:
            assert record[f"moe/experts_per_token_t{b}"] == pytest.approx(spent / 2 / len(inside) / TOKENS)
        else:
            assert f"moe/experts_per_token_t{b}" not in record
    assert ("moe/load_cv" in record) == (kind not in ("expert_choice", "ec_image", "nucleus", "diffmoe"))


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"expert_race", "be"}))  # these compete over the whole batch
def test_the_cut_into_microbatches_does_not_matter(kind: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_BSD, t_B = batch
    records = []
    for size in (IMAGES, 4, 2):
        parts = []
        for first in range(0, IMAGES, size):
            own = slice(first, first + size)
            called = [settled(kind, x_BSD[own], seed=seed) for seed in (1, 2)]
            error_B = x_BSD[own].square().mean((1, 2))
            parts.append(routing_sums(called, layers=(2, 4), t_B=t_B[own]) | loss_sums(error_B, t_B=t_B[own]))
        sums = totals(parts)
        records.append({**routing_record(sums, layers=(2, 4)), **loss_by_timestep(sums)})
    assert records[0].keys() == records[1].keys() == records[2].keys()
    for other in records[1:]:
        assert other == pytest.approx(records[0], rel=1e-6, abs=1e-9)


def test_a_ratio_of_varying_wholes_is_taken_after_the_sum() -> None:
    """Under a cap the first microbatch loses 1 of 1 wanted rows, the second none of 9: a tenth, not the half."""
    one = settled("capped", torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3)), seed=1)
    parts = [routing_sums([one], layers=(2,), t_B=torch.rand(2)) for _ in range(2)]
    for part, lost, wanted in zip(parts, (1.0, 0.0), (1.0, 9.0), strict=True):
        part["moe/2/share/capped_frac"] = torch.tensor([lost, wanted])
    assert routing_record(totals(parts), layers=(2,))["moe/capped_frac"] == pytest.approx(0.1)


def on_meta(assignment: Assignment) -> Assignment:
    tensors = {name: value.to("meta") for name, value in vars(assignment).items() if isinstance(value, torch.Tensor)}
    metrics = {name: value.to("meta") for name, value in assignment.metrics.items()}
    shares = {name: (part.to("meta"), whole.to("meta")) for name, (part, whole) in assignment.shares.items()}
    return replace(assignment, **tensors, metrics=metrics, shares=shares)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_back_while_it_gathers(kind: str, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """On a device that has no values: whatever would wait for one fails."""
    x_BSD, t_B = batch
    t_B, error_B = t_B.to("meta"), x_BSD[:, 0, 0].to("meta")
    window = MetricWindow(device="meta", images_per_step=1, tokens_per_step=1)
    for _ in range(2):
        called = [on_meta(settled(kind, x_BSD, seed=seed)) for seed in (1, 2)]
        window.add_sums(loss_sums(error_B, t_B=t_B))
        window.add_sums(routing_sums(called, layers=(2, 4), t_B=t_B))
        window.add_sums(weight_sums([layer(kind, 1)[0].to("meta")], layers=(2,)))
        window.add("train/loss", error_B.mean())
        window.step_done()
    with pytest.raises(NotImplementedError):  # as the flush does, which is the one that waits
        window.flush()


def test_an_expert_whose_gates_are_nothing_is_dead_though_its_load_is_equal() -> None:
    router, dispatcher = layer("expert_choice", 1)
    with torch.no_grad():
        router.weight[:, 1] = 0.0
        router.weight[0, 1] = -40.0
    x_GSD = torch.randn(2, GROUP, WIDTH, generator=torch.Generator().manual_seed(0)).abs()
    called = dispatcher.settle(router(RouterInput.of(x_GSD, image_tokens=TOKENS)))
    record = routing_record(totals([routing_sums([called], layers=(2,), t_B=torch.rand(4))]), layers=(2,))
    assert record["moe/dead_experts"] == record["moe/L2/dead_experts"] == 1.0
    assert record["moe/max_violation"] == 0.0


def test_similarity_of_experts_is_the_cosine_of_their_columns() -> None:
    router, _ = layer("expert_choice", 5)
    with torch.no_grad():
        router.weight[:, 3] = 2 * router.weight[:, 0]
    called = settled("expert_choice", torch.randn(2, TOKENS, WIDTH), seed=1)
    part = routing_sums([called], layers=(2,), t_B=torch.rand(2))
    copies = [weight_sums([router], layers=(2,)) for _ in range(3)]  # of three ranks that replicate it
    record = routing_record(totals([part, *copies]), layers=(2,))
    w = router.weight.detach().double().numpy()
    cosines = [
        w[:, a] @ w[:, b] / np.linalg.norm(w[:, a]) / np.linalg.norm(w[:, b]) for a, b in combinations(range(4), 2)
    ]
    assert record["moe/expert_similarity"] == pytest.approx(np.mean(cosines), rel=1e-9)
    assert record["moe/expert_similarity_max"] == pytest.approx(1.0)


def test_drift_counts_choices_that_moved(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_BSD, _ = batch
    before, now = ([selections([settled("expert_choice", x_BSD, seed=seed)])] for seed in (1, 2))
    sums = {name: value.double().numpy() for name, value in drift_sums(before, now, layers=(2,)).items()}
    a, b = ({(n, e) for n, e, _ in who(settled("expert_choice", x_BSD, seed=seed))} for seed in (1, 2))
    share = len(a ^ b) / (len(a) + len(b))
    assert 0 < share < 1
    assert drift_record(sums, layers=(2,)) == {"L2/selection_drift": share, "selection_drift": share}
    still = {name: value.double().numpy() for name, value in drift_sums(now, now, layers=(2,)).items()}
    assert drift_record(still, layers=(2,))["selection_drift"] == 0.0
    assert drift_record({}, layers=(2,)) == {}


def test_loss_by_timestep_is_the_mean_over_its_images() -> None:
    t_B, error_B = torch.tensor([0.0, 0.05, 0.31, 0.999, 1.0]), torch.tensor([1.0, 3.0, 5.0, 2.0, 4.0])
    record = loss_by_timestep(totals([loss_sums(error_B, t_B=t_B)]))
    assert {k: v for k, v in record.items() if "loss" in k} == {
        "diffusion/loss_t0": 2.0, "diffusion/loss_t3": 5.0, "diffusion/loss_t9": 3.0}  # fmt: skip
    assert [record[f"diffusion/images_t{b}"] for b in range(10)] == [2, 0, 0, 1, 0, 0, 0, 0, 0, 2]


def numbers(batch: tuple[torch.Tensor, torch.Tensor], kind: str = "threshold") -> RoutingNumbers:
    x_BSD, t_B = batch
    called = [settled(kind, x_BSD, seed=seed) for seed in (1, 2)]
    made = RoutingNumbers.of(totals([routing_sums(called, layers=(2, 4), t_B=t_B)]), step=7, layers=(2, 4))
    assert made is not None
    return made


def test_the_file_says_what_was_counted(tmp_path: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    made = numbers(batch)
    back = RoutingNumbers.load(made.save(tmp_path))
    assert (back.step, back.experts, set(back.layers)) == (7, EXPERTS, {2, 4})
    for number, layer_ in made.layers.items():
        np.testing.assert_array_equal(back.layers[number].spread, layer_.spread)
        for name in ("entropy", "edge_margin", "load", "gate", "timestep"):
            np.testing.assert_allclose(getattr(back.layers[number], name), getattr(layer_, name), rtol=6e-3)
        assert layer_.spread.sum() == IMAGES * TOKENS
        assert layer_.load.mean() == pytest.approx(1.0)
        empty = layer_.spread.sum(1) == 0
        assert np.isnan(layer_.entropy).tolist() == np.isnan(layer_.most).tolist() == empty.tolist()
        assert np.nansum(layer_.unselected * layer_.spread.sum(1)) == layer_.spread[:, 0].sum()
        spent = (layer_.spread @ np.arange(EXPERTS + 1)).sum()
        assert np.nansum(layer_.experts_per_token * layer_.spread.sum(1)) == pytest.approx(spent)
    assert numbers_of(tmp_path) == [(7, tmp_path / "routing/numbers_00000007.json")]
    (tmp_path / "cut.json").write_text(made.save(tmp_path).read_text()[:200])
    with pytest.raises(RunFolderError, match=r"cut\.json: not a file of routing numbers"):
        RoutingNumbers.load(tmp_path / "cut.json")


def test_a_long_run_writes_about_a_hundred_and_a_short_one_at_each_record() -> None:
    for steps, log_every in ((500_000, 10), (100_000, 50), (12, 1), (150, 20), (999, 10)):
        logged = [step for step in range(1, steps + 1) if step % log_every == 0 or step == steps]
        files = [step for step in logged if written_at(step, log_every=log_every, steps=steps)]
        assert len(files) <= FILES + 1
        assert len(files) >= min(len(logged), FILES // 2)
        assert files[-1] == steps


def test_a_wide_run_stays_small(tmp_path: Path) -> None:
    """64 experts in 20 layers at 256 x 128 tokens: the file and the record's own keys."""
    E, layers = 64, tuple(range(2, 42, 2))
    rng = torch.Generator().manual_seed(0)
    parts: dict[str, torch.Tensor] = {}
    t_B = torch.rand(8, generator=rng)
    router = moe_config("expert_choice", num_experts=E, capacity_factor=2.0).router.build(
        RouterSizes(width=16, num_experts=E, patch_values=1)
    )
    with torch.no_grad():
        router.weight.copy_(torch.randn(16, E, generator=rng))
    for _ in range(4):
        called = [router(RouterInput.of(torch.randn(1, 1024, 16, generator=rng), image_tokens=128)) for _ in layers]
        for name, value in routing_sums(called, layers=layers, t_B=t_B).items():
            parts[name] = parts[name] + value if name in parts else value
    sums = totals([parts, weight_sums([router] * len(layers), layers=layers)])
    made = RoutingNumbers.of(sums, step=1, layers=layers)
    assert made is not None
    assert made.save(tmp_path).stat().st_size < 27_000
    record = routing_record(sums, layers=layers)
    size = sum(len(f'"{k}": {v}, ') for k, v in record.items())
    assert size < 13_000
