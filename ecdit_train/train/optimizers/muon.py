"""Muon (Jordan et al. 2024): momentum, orthogonalised by Newton-Schulz, for matrices; AdamW for everything else.

torch.optim.Muon to the last bit in one process and `precision: bf16`, where no matrices are stacked. It works on whole
matrices, and on a layout no rank has one: `parallel.owners` brings each to its owner and the result back. Momentum
stays sharded like its parameter.

Legend: k matrices at a time, m rows, n columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ecdit_train.config.rules import Checker
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import Held, OptimizerConfig
from ecdit_train.errors import ConfigError, Problem
from ecdit_train.parallel.owners import MatrixOwners, Sharding, assign, matrices_of
from ecdit_train.parallel.placement import Box, Piece, local, pieces

from . import make_state
from .adamw import AdamW
from .blocks import Choice

ROLES = (
    (r"blocks\.\d+\.(self|cross)_attention\.(query|key|value|out)\.weight", "muon"),
    (r"blocks\.\d+\.feed_forward\.(shared\.)?(up|gate|down)\.weight", "muon"),
    (r"blocks\.\d+\.feed_forward\.experts\..+", "muon"),
    (r"blocks\.\d+\.feed_forward\.router\..+", "adamw"),
    (r"text\.layers\.\d+\.(attention|feed_forward)\.(query|key|value|out|up|down)\.weight", "muon"),
    (r"(shared_|final_|blocks\.\d+\.)modulation\.weight", "modulation"),
    (r"(patch_embed|timestep\.(up|down)|text\.project|pooled_text|final)\.weight", "adamw"),
)
"""A matrix's name -> muon, adamw, or the key of Muon that decides. What has one dim (biases, norms, the null text), and
what experts stack of one dim, is AdamW's whatever its name. Embeddings, the output layer and routers are AdamW's as in
common practice: their rows are looked up or read out one by one, and a router's scale is its temperature. A matrix that
no line names is `unnamed`'s."""

EPS = 1e-7
"""torch.optim.Muon's: least norm that a matrix is divided by."""

ROUND_BYTES = 256 * 2**20
"""Of an owner's buffer in one round of the exchange. A round holds about five such buffers at once."""


@dataclass(frozen=True, kw_only=True)
class Muon(OptimizerConfig):
    """Orthogonalised momentum for the matrices of attention, feed-forward and experts; AdamW for the rest."""

    identity = ("modulation", "unnamed")

    momentum: float
    """Share of the old momentum that a step keeps: b <- momentum b + (1 - momentum) g."""
    nesterov: bool
    """Orthogonalise g + momentum (b - g) and not b."""
    ns_steps: int
    """Newton-Schulz iterations."""
    ns_coefficients: tuple[float, ...]
    """a, b, c of an iteration X <- a X + (b A + c A A) X, A = X X^T."""
    adjust_lr: Literal["original", "match_rms_adamw"]
    """A matrix's rate: lr sqrt(max(1, outputs / inputs)), or 0.2 lr sqrt(max(outputs, inputs)), which moves weights as far as AdamW
    does, so that its rate and decay can be kept."""
    weight_decay: float
    """Decoupled weight decay on these matrices, p <- p (1 - lr wd)."""
    precision: Literal["fp32", "bf16"]
    """Of Newton-Schulz and of what travels for it; fp32 means the master weights' own type."""
    modulation: Literal["adamw", "muon"]
    """Who updates the modulation layers (AdaLN)."""
    unnamed: Literal["refuse", "adamw", "muon"]
    """Who updates a matrix that the table of names in muon.py does not have, as of a class of your own."""
    adamw_lr_ratio: float
    """AdamW's rate over `optim.lr`."""
    adamw_beta1: float
    """AdamW: decay of the mean gradient."""
    adamw_beta2: float
    """AdamW: decay of the mean squared gradient."""
    adamw_eps: float
    """AdamW: added to the root of the mean squared gradient."""
    adamw_weight_decay: float
    """AdamW: decoupled weight decay on its matrices."""

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        check.share([f"{key}.momentum", f"{key}.adamw_beta1", f"{key}.adamw_beta2"], below_one=True)
        check.at_least(1, [f"{key}.ns_steps"])
        check.at_least(0, [f"{key}.weight_decay", f"{key}.adamw_weight_decay"])
        check.positive([f"{key}.adamw_lr_ratio", f"{key}.adamw_eps"])
        rule = "must be the three numbers a, b, c"
        check.require(len(self.ns_coefficients) == 3, f"{key}.ns_coefficients", rule=rule)

    def is_muons(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether Muon updates this parameter, by its name and global shape.

        Raises:
            ConfigError: no rule names this matrix and `unnamed` is refuse.
        """
        if len(shape) < (3 if ".experts." in name else 2):
            return False
        role = next((role for pattern, role in ROLES if re.fullmatch(pattern, name)), self.unnamed)
        if role == "refuse" or len(shape) > 3:
            rule = f"the matrix {name} of shape {list(shape)} has no role in Muon's table; say who updates it"
            raise ConfigError(Problem(field="optim.optimizer.unnamed", value=self.unnamed, rule=rule, nearest="adamw"))
        return (self.modulation if role == "modulation" else role) == "muon"

    def state_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        return 4.0 if self.is_muons(name, shape) else 8.0

    def flops(self, rows: int, cols: int) -> float:
        """Of orthogonalising one matrix: three products an iteration, the smaller dim first."""
        m, n = min(rows, cols), max(rows, cols)
        return self.ns_steps * (4.0 * m * m * n + 2.0 * m**3)

    def step_flops(self, held: Sequence[Held], *, world: int) -> float:
        load = [0.0] * world
        for _, box, _, owner in _planned(self, held, world=world):
            load[owner] += self.flops(*box.size[-2:])
        return max(load)

    def step_traffic(self, held: Sequence[Held], *, world: int) -> tuple[int, float]:
        size, pieces_sent, results = (2 if self.precision == "bf16" else 4), 0.0, [0] * world
        for h, box, holders, owner in _planned(self, held, world=world):
            if len(holders) > 1:
                pieces_sent += box.volume / len(holders) if 0 in holders else 0.0
                results[owner] += box.volume * h.copies
        rounds = max((-(-size * n // ROUND_BYTES) for n in results), default=0)
        return 2 * rounds, size * (pieces_sent + results[0])

    def build(
        self, params: Mapping[str, nn.Parameter], *, lr: float, sharding: Sharding | None = None
    ) -> torch.optim.Optimizer:
        sharding = sharding or Sharding.whole(params)
        shapes = {name: sharding.placements[name].global_shape for name in params}
        ours = {name: p for name, p in params.items() if self.is_muons(name, shapes[name])}
        rest = {name: p for name, p in params.items() if name not in ours}
        return MuonOptimizer(self, ours, rest, lr=lr, sharding=sharding)


def _planned(config: Muon, held: Sequence[Held], *, world: int) -> Iterator[tuple[Held, Box, range, int]]:
    """Every matrix that Muon updates with its holders and its owner, as `MatrixOwners` chooses it."""
    ours = [h for h in held if config.is_muons(h.name, h.shape)]
    found = [(h, box, ranks) for h in ours for box, ranks in zip(matrices_of(h.shape), h.holders, strict=True)]
    work = [config.flops(*box.size[-2:]) for _, box, _ in found]
    owners = assign(work, holders=[ranks for _, _, ranks in found], world=world)
    for (h, box, ranks), owner in zip(found, owners, strict=True):
        yield h, box, ranks, owner


class MuonOptimizer(torch.optim.Optimizer):
    """Two rules under one roof: `matrices` by Muon, `others` by AdamW, whose state is kept here."""

    _step_supports_amp_scaling = True

    def __init__(
        self,
        config: Muon,
        matrices: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        *,
        lr: float,
        sharding: Sharding,
    ) -> None:
        groups = [list(group.values()) for group in (matrices, others) if group]
        super().__init__([{"params": group} for group in groups], {"lr": lr})
        self._config, self._matrices, self._placements = config, matrices, sharding.placements
        self.found_inf: Tensor | None = None
        """As `blocks.BlockOptimizer` has it. A refused update is computed and weighs nothing."""
        make_state(self, matrices.values(), names=("momentum_buffer",))
        self._adamw = None
        if others:
            self._adamw = AdamW(
                beta1=config.adamw_beta1,
                beta2=config.adamw_beta2,
                eps=config.adamw_eps,
                weight_decay=config.adamw_weight_decay,
            ).build(others, lr=lr)
            self.state.update(self._adamw.state)
        dtype = torch.bfloat16 if config.precision == "bf16" else next(iter(matrices.values()), torch.empty(0)).dtype
        self._dtype = dtype
        self.owners = MatrixOwners(matrices, sharding, work=config.flops, dtype=dtype, round_bytes=ROUND_BYTES)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A parameter without a gradient counts as one with a gradient of zeros, on every layout alike."""
        assert closure is None, "the training step computes gradients itself"
        lr = self.param_groups[0]["lr"]
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = lr * self._config.adamw_lr_ratio
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            self._adamw.step()
        if self._matrices:
            self._step_matrices(lr)

    def _step_matrices(self, lr: float) -> None:
        c = self._config
        refuse = None if self.found_inf is None else self.found_inf != 0
        choice = None if self.found_inf is None else Choice(self.found_inf)
        here: dict[tuple[str, str], list[Piece]] = {}
        for name, p in self._matrices.items():
            momentum, grad = self.state[p]["momentum_buffer"], torch.zeros_like(p) if p.grad is None else p.grad
            self.state[p]["step"] += 1
            if choice is None:
                local(momentum).lerp_(local(grad), 1 - c.momentum)
                local(p).mul_(1 - lr * c.weight_decay)
            else:
                choice.write(local(momentum).lerp(local(grad), 1 - c.momentum), into=local(momentum))
                choice.write(local(p).mul(1 - lr * c.weight_decay), into=local(p))
            for kind, tensor in (("weight", p), ("momentum", momentum), ("grad", grad)):
                here[kind, name] = pieces(tensor, self._placements[name])

        def view(kind: str, name: str, box: Box) -> Tensor:
            piece = next(piece for piece in here[kind, name] if piece.box.meet(box) == box)
            return piece.box.within(piece.view, box)

        def update_of(name: str, box: Box) -> Tensor:
            update = view("momentum", name, box)
            if c.nesterov:
                update = view("grad", name, box).lerp(update, c.momentum)
            return update.to(
                self._dtype, copy=not c.nesterov
            )  # never the momentum itself: Newton-Schulz writes into it

        def move(name: str, box: Box, update: Tensor) -> None:
            rate = self._rate(lr, self._placements[name].global_shape)
            if refuse is not None:
                update = torch.where(refuse, 0.0, update)  # times -rate it is -0, and p + -0 is p to the last bit
            view("weight", name, box).add_(update, alpha=-rate)

        self.owners.run(take=update_of, compute=self._orthogonal, give=move)

    def _orthogonal(self, x: Tensor) -> Tensor:
        return newton_schulz(x, steps=self._config.ns_steps, coefficients=self._config.ns_coefficients)

    def _rate(self, lr: float, shape: tuple[int, ...]) -> float:
        """A linear layer's matrix is (outputs, inputs), stacked experts' are (inputs, outputs)."""
        outputs, inputs = shape if len(shape) == 2 else shape[:0:-1]
        if self._config.adjust_lr == "original":
            return lr * math.sqrt(max(1, outputs / inputs))
        return lr * 0.2 * math.sqrt(max(outputs, inputs))


def newton_schulz(x: Tensor, *, steps: int, coefficients: Sequence[float]) -> Tensor:
    """(m, n), or (k, m, n) as k matrices: about U V^T of x = U S V^T, singular values between 0.7 and 1.2. Writes into x."""
    a, b, c = coefficients
    multiply = torch.addmm if x.dim() == 2 else torch.baddbmm
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x.div_((x.norm() if x.dim() == 2 else x.norm(dim=(-2, -1), keepdim=True)).clamp(min=EPS))
    for _ in range(steps):
        gram = x @ x.mT
        x = multiply(x, multiply(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
