"""The selection family: one router that is token choice, expert choice, BL, BE, LE choice or an expert race, by which axes of the
scores are kept apart (Race-DiT, arXiv 2503.16057, figure 3).

    apart            competes, in one problem        winners of it    rows of an expert
    batch, tokens    experts                         f_c              vary          token choice
    batch, experts   tokens of an image              L f_c / E        fixed         expert choice per image
    experts          tokens of all images            B L f_c / E      fixed         BL choice
    tokens           images and experts              B f_c            vary          BE choice
    batch            tokens and experts of an image  L f_c            vary          LE choice
    nothing          everything                      B L f_c          vary          expert race

A token's place, which BE choice keeps apart, is its place among those the network sees: with masked patches the l-th
kept one, which is another spot of each picture.

Legend: G routing groups, S tokens of a group, B images that compete (of a group, or of all ranks), L tokens of an image, E
experts, P problems of a group, N candidates of each, C rows of an expert and group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ecdit_train.config.selection import SelectionConfig
from ecdit_train.config.slots import RouterSizes

from ..assignment import Assignment, Selection, Table
from ..router import AffinityRouter, RouterInput, whole_capacity
from ..selecting import GroupRanks, Largest, Problems, Ranks, largest


@dataclass(frozen=True, kw_only=True)
class SelectionFamily(SelectionConfig):
    """The largest scores win, among those of the axes that are not kept apart."""

    apart: tuple[Literal["batch", "tokens", "experts"], ...]
    """Axes that are kept apart; the others compete. [experts] is BL choice, [tokens] BE, [batch] LE, [batch, experts] expert
    choice per image, [batch, tokens] token choice, [] a race of everything."""

    gate: Literal["softmax", "sigmoid", "identity"]
    """What makes scores of logits: softmax over experts, sigmoid or nothing. A score ranks and is the weight of its row."""

    pool: Literal["group", "ranks"]
    """Images that compete where the batch is not kept apart: a routing group (`moe.scope`), or in training those of a microbatch on
    all ranks; pictures are drawn in groups either way (`sample.scope`)."""

    mixes: bool
    """Whether a layer x <- GELU(x W) of the tokens' width comes before the logits (Expert Race)."""

    def build(self, sizes: RouterSizes) -> SelectionRouter:
        return SelectionRouter(sizes, config=self)


class SelectionRouter(AffinityRouter):
    """Gates are the scores themselves."""

    def __init__(self, sizes: RouterSizes, *, config: SelectionConfig) -> None:
        super().__init__(sizes, sees=config.sees, mixes=config.mixes)
        self.config = config
        self.ranks: Ranks | None = None

    def on_ranks(self, *, dp_group: dist.ProcessGroup | None) -> None:
        self.ranks = GroupRanks(dp_group) if dp_group is not None and self.config.over_ranks else None

    def forward(self, tokens: RouterInput) -> Assignment:
        logits_GSE = self.logits(tokens)
        score_GSE, chances_GSE = self._scores(logits_GSE), logits_GSE.detach().softmax(-1)
        if "experts" in self.config.apart and not self._over_ranks:
            return self._table(score_GSE, chances_GSE, image_tokens=tokens.image_tokens)
        won_GSE = self._select(score_GSE, image_tokens=tokens.image_tokens)[0]
        return Selection(
            selected_GSE=won_GSE,
            gate_GSE=score_GSE,
            mean_rows=self._mean_rows(score_GSE),
            probability_GSE=chances_GSE,
            metrics={"experts_per_token": won_GSE.sum(-1).float().mean()},
        )

    @property
    def _over_ranks(self) -> bool:
        """Whether images of different groups and ranks compete now: a picture must not depend on where others are drawn."""
        return self.config.over_ranks and self.training

    def _scores(self, logits_GSE: Tensor) -> Tensor:
        if self.config.gate == "softmax":
            return logits_GSE.softmax(-1)
        return logits_GSE.sigmoid() if self.config.gate == "sigmoid" else logits_GSE

    def _mean_rows(self, score_GSE: Tensor) -> float:
        return score_GSE.shape[1] * self.config.capacity_factor / score_GSE.shape[2]

    def _problems(self, score_GSE: Tensor, *, image_tokens: int) -> Problems:
        apart = self.config.apart
        return Problems.of(score_GSE, image_tokens=image_tokens, apart=apart, across_groups=self._over_ranks)

    def _select(self, score_GSE: Tensor, *, image_tokens: int) -> tuple[Tensor, Largest]:
        """(G, S, E) bools of who won, and the same by problem with its K-th largest score."""
        problems = self._problems(score_GSE, image_tokens=image_tokens)
        ranks = self.ranks if self._over_ranks else None
        score_PN = problems.cut(score_GSE.detach())
        size = 1 if ranks is None else ranks.size
        candidates = score_PN.shape[1] * size
        winners = whole_capacity(self.config.capacity_factor * candidates / score_GSE.shape[2], tokens=candidates)
        found = largest(score_PN, winners, ranks=ranks)
        return problems.join(found.won_PN), found

    def _table(self, score_GSE: Tensor, chances_GSE: Tensor, *, image_tokens: int) -> Table:
        """Every expert takes the same number of rows of each problem: nothing varies, so nothing is counted."""
        G, S, E = score_GSE.shape
        problems = self._problems(score_GSE, image_tokens=image_tokens)
        N = problems.candidates
        place_GSE = torch.arange(G * S, device=score_GSE.device).view(G, S, 1).expand(G, S, E)
        # Problems of an expert and group lie at (group, image or token, expert): experts to the front.
        score_EGPN, place_EGPN = (problems.cut(x).view(G, -1, E, N).permute(2, 0, 1, 3) for x in (score_GSE, place_GSE))
        K = whole_capacity(self.config.capacity_factor * N / E, tokens=N)
        gate_EGPK, winner_EGPK = score_EGPN.topk(K, dim=-1, sorted=False)
        return Table(
            index_EGC=place_EGPN.gather(3, winner_EGPK).flatten(2),
            gate_EGC=gate_EGPK.flatten(2),
            probability_GSE=chances_GSE,
        )
