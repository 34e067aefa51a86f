"""Muon in one process against torch.optim.Muon, and who updates what; the layouts are in tests/dist/test_dist_muon.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ecdit_train.config.compose import compose, groups
from ecdit_train.errors import ConfigError
from ecdit_train.parallel.owners import Sharding, assign, matrices_of
from ecdit_train.plan import slots
from ecdit_train.train.optimizers.muon import newton_schulz

MATRICES = {
    "blocks.0.self_attention.query.weight": (64, 64),
    "blocks.0.self_attention.key.weight": (32, 64),
    "blocks.0.feed_forward.up.weight": (256, 64),
    "blocks.0.feed_forward.down.weight": (64, 256),
}
STACKED = {"blocks.1.feed_forward.experts.up": (4, 48, 96), "blocks.1.feed_forward.experts.down": (4, 96, 48)}
STEPS = 10


@pytest.fixture(scope="module")
def muon():
    return compose(["optim=muon"], local=False).optim.optimizer


def parameters(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for name, shape in shapes.items()}


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[list[torch.Tensor]]) -> None:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


def gradients(params: dict[str, nn.Parameter]) -> list[list[torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=g).to(p.dtype) for p in params.values()] for _ in range(STEPS)]


def torchs(muon, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        params, lr=0.02, momentum=muon.momentum, nesterov=muon.nesterov, weight_decay=muon.weight_decay,
        ns_coefficients=muon.ns_coefficients, ns_steps=muon.ns_steps, adjust_lr_fn=muon.adjust_lr,
    )  # fmt: skip


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_torchs_muon_to_the_last_bit(muon, nesterov, adjust_lr):
    muon = replace(muon, nesterov=nesterov, adjust_lr=adjust_lr)
    ours, grads = parameters(MATRICES), gradients(parameters(MATRICES))
    theirs = list(parameters(MATRICES).values())
    train(muon.build(ours, lr=0.02), list(ours.values()), grads)
    train(torchs(muon, theirs), theirs, grads)
    for (name, p), q in zip(ours.items(), theirs, strict=True):
        assert torch.equal(p, q), name
        assert (p - parameters(MATRICES)[name]).abs().mean() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_torchs_muon_without_its_cast(muon, dtype, monkeypatch):
    """`precision: fp32` is the weights' own type; torch casts to bf16 in one line, which is taken out here."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    muon = replace(muon, precision="fp32")
    ours, theirs = parameters(MATRICES, dtype), list(parameters(MATRICES, dtype).values())
    grads = gradients(ours)
    train(muon.build(ours, lr=0.02), list(ours.values()), grads)
    train(torchs(muon, theirs), theirs, grads)
    assert all(torch.equal(p, q) for p, q in zip(ours.values(), theirs, strict=True))


@pytest.mark.parametrize(("dtype", "precision", "bound"), [
    (torch.float32, "bf16", 2e-2), (torch.float32, "fp32", 1e-5), (torch.float64, "fp32", 1e-12),
])  # fmt: skip
def test_stacked_experts_are_that_many_matrices(muon, dtype, precision, bound, monkeypatch):
    """Each (inputs, outputs), so torch is given its transpose. Products of a batch may differ in last bits: the bound is on
    the difference over the distance that the weights moved."""
    if precision == "fp32":
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    muon = replace(muon, precision=precision, adjust_lr="original", weight_decay=0.0)
    ours, grads = parameters(STACKED, dtype), gradients(parameters(STACKED, dtype))
    train(muon.build(ours, lr=0.02), list(ours.values()), grads)
    theirs = [nn.Parameter(w.detach().mT.contiguous()) for p in parameters(STACKED, dtype).values() for w in p]
    train(torchs(muon, theirs), theirs, [[w.mT.contiguous() for g in step for w in g] for step in grads])
    back = torch.cat([q.detach().mT.flatten() for q in theirs])
    mine = torch.cat([p.detach().flatten() for p in ours.values()])
    start = torch.cat([p.detach().flatten() for p in parameters(STACKED, dtype).values()])
    error = ((mine - back).norm() / (back - start).norm()).item()
    print(f"{precision} {dtype}: {error:.1e}")
    assert error < bound


def test_orthogonalised():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, 40, 24, generator=g)
    u = newton_schulz(x.clone(), steps=5, coefficients=(3.4445, -4.7750, 2.0315))
    assert torch.linalg.svdvals(u).sub(1).abs().max() < 0.35
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    assert ((u - left @ right).norm() / (left @ right).norm()) < 0.3


def test_the_rest_is_torchs_adamw(muon):
    shapes = {"patch_embed.weight": (32, 8), "final.bias": (8,), "blocks.0.modulation.weight": (96, 32), **MATRICES}
    rest = {n: s for n, s in shapes.items() if n not in MATRICES}
    muon = replace(muon, adamw_lr_ratio=0.5)
    ours, grads = parameters(shapes), gradients(parameters(shapes))
    optimizer = muon.build(ours, lr=0.02)
    train(optimizer, list(ours.values()), grads)
    theirs = list(parameters(shapes).values())[: len(rest)]
    adamw = torch.optim.AdamW(
        [{"params": [theirs[0], theirs[2]], "weight_decay": muon.adamw_weight_decay},
         {"params": [theirs[1]], "weight_decay": 0.0}],
        lr=0.01, betas=(muon.adamw_beta1, muon.adamw_beta2), eps=muon.adamw_eps,
    )  # fmt: skip
    train(adamw, theirs, [step[: len(rest)] for step in grads])
    assert all(torch.equal(ours[n], q) for n, q in zip(rest, theirs, strict=True))
    kept = {n: sorted(optimizer.state[p]) for n, p in ours.items()}
    assert kept["final.bias"] == ["exp_avg", "exp_avg_sq", "step"]
    assert kept["blocks.0.feed_forward.up.weight"] == ["momentum_buffer", "step"]
    assert {float(optimizer.state[p]["step"]) for p in ours.values()} == {float(STEPS)}


def test_state_exists_from_the_start_and_takes_four_bytes(muon):
    shapes = {"final.weight": (8, 32), **MATRICES, **STACKED}
    params = parameters(shapes)
    optimizer = muon.build(params, lr=0.1)
    for name, p in params.items():
        held = [t for t in optimizer.state[p].values() if t.dim()]
        assert all(t.shape == p.shape and not t.any() for t in held)
        assert 4 * len(held) == muon.state_bytes(name, tuple(p.shape))


def test_every_matrix_of_the_network_has_a_role(muon):
    """Of the shipped networks no parameter is left to `unnamed`."""
    cfg = compose(["experiment=ec_dit_m_64e", "optim=muon"], local=False)
    role = {n: muon.is_muons(n, tuple(p.shape)) for n, p in slots.network(cfg).named_parameters()}
    both = {
        n: replace(muon, modulation="muon").is_muons(n, tuple(p.shape))
        for n, p in slots.network(cfg).named_parameters()
    }
    ours = {n for n, mine in role.items() if mine}
    assert all(
        part in " ".join(ours) for part in ("cross_attention.key", "experts.up", "feed_forward.down", "text.layers.1.")
    )
    assert not any(n.endswith("bias") or "norm" in n or "router" in n or "embed" in n or "final" in n for n in ours)
    assert {n.split(".")[-2] for n in both if both[n] and not role[n]} == {
        "modulation",
        "shared_modulation",
        "final_modulation",
    }
    experts = sum(p.numel() for n, p in slots.network(cfg).named_parameters() if n in ours)
    assert experts > 0.98 * sum(p.numel() for p in slots.network(cfg).parameters())


@pytest.mark.parametrize("words", [
    *(("experiment=shapes_tiny", f"moe={name}") for name in groups()["moe"]),
    *((f"experiment={name}",) for name in groups()["experiment"] if name.startswith(("race_b", "nucleus"))),
], ids=" ".join)  # fmt: skip
def test_no_shipped_network_has_a_matrix_without_a_role(words):
    cfg = compose([*words, "optim=muon"], local=False)
    for name, p in slots.network(cfg).named_parameters():
        assert cfg.optim.optimizer.is_muons(name, tuple(p.shape)) in (True, False)


def test_a_matrix_without_a_role_is_refused_or_decided(muon):
    name = "blocks.1.feed_forward.target_head.weight"
    with pytest.raises(
        ConfigError, match=rf"unnamed = 'refuse': the matrix {name} of shape \[8, 4\].*nearest valid: adamw"
    ):
        muon.build(parameters({name: (8, 4)}), lr=0.1)
    assert replace(muon, unnamed="muon").is_muons(name, (8, 4))
    assert not replace(muon, unnamed="adamw").is_muons(name, (8, 4))
    assert not muon.is_muons("blocks.1.feed_forward.target_head.bias", (8,))
    assert muon.is_muons("blocks.1.feed_forward.shared.gate.weight", (8, 4))
    assert not muon.is_muons("blocks.1.feed_forward.experts.bias", (4, 8)), "a vector for each expert"


def test_a_matrix_without_a_gradient_counts_as_zero(muon):
    ours = parameters(MATRICES)
    first, *_ = ours.values()
    optimizer = muon.build(ours, lr=0.1)
    for p in list(ours.values())[1:]:
        p.grad = torch.ones_like(p)
    before = first.detach().clone()
    optimizer.step()
    torch.testing.assert_close(first.detach(), before * (1 - 0.1 * muon.weight_decay))


@pytest.mark.parametrize("world", [1, 2, 7, 64])
def test_owners_share_the_work(world):
    work = [float((7 * n) % 13 + 1) for n in range(300)]
    owners = assign(work, holders=[range(world)] * len(work), world=world)
    load = [sum(w for w, o in zip(work, owners, strict=True) if o == rank) for rank in range(world)]
    assert max(load) - min(load) <= max(work)
    assert owners == assign(list(work), holders=[range(world)] * len(work), world=world)


def test_an_owner_holds_a_piece_and_those_with_a_choice_even_it_out():
    """Two matrices that only rank 1 holds, four that ranks 2 and 3 hold, and small ones that all do."""
    holders = [range(4)] * 6 + [(2, 3)] * 4 + [(1,)] * 2
    work = [1.0] * 6 + [3.0] * 4 + [2.0] * 2
    owners = assign(work, holders=holders, world=4)
    assert all(owner in ranks for owner, ranks in zip(owners, holders, strict=True))
    load = [sum(w for w, o in zip(work, owners, strict=True) if o == rank) for rank in range(4)]
    assert load == [5.0, 5.0, 6.0, 6.0]


def test_matrices_of_a_stack():
    assert [str(box) for box in matrices_of((2, 3, 4))] == ["[0:1, 0:3, 0:4]", "[1:2, 0:3, 0:4]"]
    assert [str(box) for box in matrices_of((3, 4))] == ["[0:3, 0:4]"]


def test_one_process_exchanges_nothing(muon):
    params = parameters(MATRICES | STACKED)
    owners = muon.build(params, lr=0.1, sharding=Sharding.whole(params)).owners
    assert owners.rounds == ()
    assert owners.sent_bytes == 0
    assert len(owners.alone) == 4 + 8
