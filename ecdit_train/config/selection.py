"""Routers that let the largest scores win: what they have in common and what they cost. Imports no torch.

Scores form a tensor over (images, tokens, experts). Which axes are kept apart decides the problems, the other axes compete in each
(Race-DiT, arXiv 2503.16057): token choice keeps images and tokens apart, an expert race nothing. In every problem as many
scores win as give `capacity_factor` experts per token.

Legend: B images of a routing group or of all ranks, L tokens of an image, E experts, f_c experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ecdit_train.config.rules import Checker, is_whole, short
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.slots import AffinityConfig, Message, RouterSizes

LARGEST_TABLE = 2**16
"""Counts in one message of a selection, at most: 512 KiB."""

WIDEST_DIGIT, NARROWEST_DIGIT = 11, 4
"""Bits of a score that one round looks at: 2048 counts in one problem of fp32 scores make three rounds."""


def digits(problems: int, *, bits: int) -> tuple[tuple[int, int], ...]:
    """(shift, width) of the digits of a score, from the top, when so many problems are solved at once. A round counts one
    digit, in a table (problems, 2^width): at most LARGEST_TABLE counts, until there are more than 4096 problems."""
    room = (LARGEST_TABLE // problems).bit_length() - 1
    width = min(max(room, NARROWEST_DIGIT), WIDEST_DIGIT)
    tops = range(bits, 0, -width)
    return tuple((max(top - width, 0), min(width, top)) for top in tops)


def selection_messages(problems: int, *, ranks: int, bits: int = 32) -> tuple[Message, ...]:
    """What `model.selecting.largest` sends: one table of int64 counts per digit, then one int64 per problem and rank."""
    tables = (Message(kind="all_reduce", bytes=8 * problems << width) for _, width in digits(problems, bits=bits))
    return (*tables, Message(kind="all_gather", bytes=8 * problems * ranks))


@dataclass(frozen=True, kw_only=True)
class SelectionConfig(AffinityConfig):
    """The largest scores of every problem win."""

    pool_images: int | None
    """Images that compete when the pool is all ranks, the same on every layout: all of train.global_batch, so that
    data-parallel ranks * train.microbatch must be as many. null: the microbatches that the run begins with; a resume
    that puts other images together is refused."""

    selects_at_inference: ClassVar[bool] = True
    """Whether pictures are drawn by the same selection, in their routing groups."""

    if TYPE_CHECKING:  # fields or constants of the class

        @property
        def apart(self) -> tuple[Literal["batch", "tokens", "experts"], ...]:
            """Axes that are kept apart."""

        @property
        def gate(self) -> Literal["softmax", "sigmoid", "identity"]:
            """What makes scores of logits; a score ranks and is the weight of its row."""

        @property
        def pool(self) -> Literal["group", "ranks"]:
            """Images that compete where the batch is not kept apart: a routing group, or those of all ranks while training."""

        @property
        def mixes(self) -> bool:
            """Whether a layer x <- GELU(x W) comes before the logits."""

    @property
    def over_ranks(self) -> bool:
        """Whether tokens of different ranks compete while training."""
        return self.pool == "ranks" and "batch" not in self.apart

    @property
    def equal_loads(self) -> bool:
        """Whether every expert takes the same number of rows in every group."""
        return "experts" in self.apart and not self.over_ranks

    @property
    def whole_batch(self) -> bool:
        return self.over_ranks and self.pool_images is None

    def images_together(self) -> int | None:
        return self.pool_images if self.over_ranks else None

    def capacity(self, *, group_tokens: int, num_experts: int) -> float | None:
        return group_tokens * self.capacity_factor / num_experts if self.equal_loads else None

    def candidates(self, *, images: int, image_tokens: int, num_experts: int) -> int:
        """Scores of one problem."""
        sizes = {"batch": images, "tokens": image_tokens, "experts": num_experts}
        return math.prod(size for axis, size in sizes.items() if axis not in self.apart)

    def flops_per_token(self, sizes: RouterSizes) -> float:
        return 2.0 * sizes.width * (sizes.num_experts + (sizes.width if self.mixes else 0))

    def kept_bytes_per_token(self, sizes: RouterSizes, *, compute_bytes: int) -> float:
        """Besides the rest: the mixed tokens before and after GELU, and one byte per score that says whether it won."""
        kept = super().kept_bytes_per_token(sizes, compute_bytes=compute_bytes) + sizes.num_experts
        return kept + (8.0 * sizes.width if self.mixes else 0.0)

    def messages(self, sizes: RouterSizes, *, image_tokens: int, ranks: int) -> tuple[Message, ...]:
        if not self.over_ranks:
            return ()
        apart = {"tokens": image_tokens, "experts": sizes.num_experts}
        return selection_messages(math.prod(apart[axis] for axis in self.apart if axis in apart), ranks=ranks)

    def check(self, run: RunConfig, check: Checker, *, key: str) -> None:
        named = len(set(self.apart))
        if named < len(self.apart) or named == 3:
            rule, nearest = "must name each axis once and leave one that competes", list(dict.fromkeys(self.apart))[:2]
            check.require(False, f"{key}.apart", rule=rule, nearest=nearest)
            return
        if self.pool_images is not None and self.over_ranks and check.sane("train.global_batch"):
            batch = run.train.global_batch
            rule = f"must be train.global_batch = {batch}: of several microbatches, other layouts would put other images together"
            check.require(self.pool_images == batch, f"{key}.pool_images", rule=rule, nearest=batch)
        if f"{key}.pool" in check.values and "batch" in self.apart:
            rule = f"must be group: with images kept apart ({key}.apart) there is no pool of them"
            check.require(self.pool == "group", f"{key}.pool", rule=rule, nearest="group")
        if self.pool_images is not None and not self.over_ranks:
            rule = "must be null: images compete in their routing group, which moe.scope sizes"
            check.require(False, f"{key}.pool_images", rule=rule, nearest="null")
        if self.check_factor(run, check, key=key):
            self._whole(run, check, key=key)

    def _whole(self, run: RunConfig, check: Checker, *, key: str) -> None:
        """A whole number of scores wins: in training, and in drawing, where nothing is masked and ranks do not compete."""
        sizes = ("data.resolution", "encoders.image.factor", "model.patch", "diffusion.mask_ratio")
        if not check.sane(*sizes, "moe.group_size", "train.microbatch", "sample.group_size", f"{key}.apart"):
            return
        E, kept, whole = run.moe.num_experts, run.tokens_per_image, run.patches_per_image
        if not kept or not whole or run.group_tokens % kept:
            return  # another rule says so
        drawn = run.sample.group_size // whole if run.sample.scope == "group" else 1
        group = run.train.microbatch if self.over_ranks else run.group_tokens // kept
        where = {"training": self.candidates(images=group, image_tokens=kept, num_experts=E)}
        if self.selects_at_inference:
            where["sampling"] = self.candidates(images=max(drawn, 1), image_tokens=whole, num_experts=E)
        unit = math.gcd(*where.values())
        field, nearest = f"{key}.capacity_factor", max(round(self.capacity_factor * unit / E), 1) * E / unit
        if "experts" in self.apart:  # another number of experts keeps the compute
            fitting = [n for n in range(1, 2 * E + 1) if self._fits(unit, num_experts=n)]
            if fitting:
                field, nearest = "moe.num_experts", min(fitting, key=lambda n: (abs(n - E), n))
        for when, candidates in where.items():
            winners = self.capacity_factor * candidates / E
            rule = (
                f"must let a whole number win: in {when}, {short(self.capacity_factor)} * {candidates} candidates / "
                f"{E} experts = {short(winners)}"
            )
            if not check.require(self._fits(candidates, num_experts=E), field, rule=rule, nearest=nearest):
                return

    def _fits(self, candidates: int, *, num_experts: int) -> bool:
        winners = self.capacity_factor * candidates / num_experts
        return is_whole(winners) and 1 <= round(winners) <= candidates
