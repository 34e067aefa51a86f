"""The K largest over ranks: exact against a plain sort, on thousands of random cases with ties, sizes and ranks."""

from __future__ import annotations

import math
import random

import pytest
import torch
from lockstep_ranks import in_lockstep
from torch import Tensor

from ecdit_train.config.selection import LARGEST_TABLE, digits, selection_messages
from ecdit_train.model.selecting import Problems, largest

CALLS, PROBLEMS = 400, 25
"""10,000 problems; those of one call share ranks, sizes and K."""

SPECIAL = [
    math.inf,
    -math.inf,
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1e-40,
    -1e-40,
    3.4e38,
    -3.4e38,
    5e-324,
    -5e-324,
    1e308,
    -1e308,
]


def plain(row: list[float], winners: int) -> tuple[list[bool], float]:
    """Who wins among all candidates in their global order, and the last score that does. NaN is above everything."""

    def rank_of(place: int) -> tuple[bool, float, int]:
        x = row[place]
        return (not math.isnan(x), 0.0 if math.isnan(x) else -x, place)

    best = sorted(range(len(row)), key=rank_of)[:winners]
    taken = set(best)
    return [place in taken for place in range(len(row))], row[best[-1]]


def candidates(draw: random.Random, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Of each rank: distinct values, coarse ones that tie, or values from the edges of the number range."""
    kind = draw.choice(["distinct", "coarse", "coarse", "special", "one value"])
    generator = torch.Generator().manual_seed(draw.randrange(2**31))

    def of(n: int) -> Tensor:
        if kind == "special":
            pool = torch.tensor([*SPECIAL, *([math.nan] if draw.random() < 0.5 else [])], dtype=dtype)
            return pool[torch.randint(len(pool), (PROBLEMS, n), generator=generator)]
        if kind == "one value":
            return torch.full((PROBLEMS, n), draw.choice([0.0, -1.5, 7.0]), dtype=dtype)
        x = torch.randn(PROBLEMS, n, generator=generator, dtype=dtype)
        return x if kind == "distinct" else x.mul(2).round()

    return [of(n) for n in sizes]


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def test_exact_on_ten_thousand_cases():
    draw, ties, problems = random.Random(5), 0, 0
    for call in range(CALLS):
        dtype = torch.float64 if call % 4 == 0 else torch.float32
        sizes = [draw.randint(0, 24) for _ in range(draw.randint(1, 4))]
        if not sum(sizes):
            sizes[0] = 1
        parts, winners = candidates(draw, sizes, dtype), draw.randint(1, sum(sizes))
        answers = [
            found
            for found, _ in in_lockstep(
                len(sizes), lambda rank, p=parts, k=winners: largest(p[rank.rank], k, ranks=rank)
            )
        ]
        won, here = torch.cat([a.won_PN for a in answers], dim=1), largest(torch.cat(parts, dim=1), winners)
        assert torch.equal(won, here.won_PN), "one process and many decide differently"
        for row, flags, last in zip(torch.cat(parts, 1).tolist(), won.tolist(), here.last_P.tolist(), strict=True):
            expected, value = plain(row, winners)
            assert flags == expected
            assert same(last, value)
            ties += row.count(value) > 1 and sum(flags) < len(row)
            problems += 1
        for answer in answers:
            assert all(same(a, b) for a, b in zip(answer.last_P.tolist(), here.last_P.tolist(), strict=True))
    assert problems == 10_000
    assert ties > 2_000, "ties must be common, or the test says little about them"


@pytest.mark.parametrize("problems", [1, 40, 300, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrow_digits_of_many_problems_find_the_same(problems, dtype):
    parts = [
        torch.randn(problems, 6, dtype=dtype, generator=torch.Generator().manual_seed(n)).round(decimals=1)
        for n in (1, 2)
    ]
    answers = in_lockstep(2, lambda rank: largest(parts[rank.rank], 5, ranks=rank))
    won = torch.cat([found.won_PN for found, _ in answers], 1)
    assert torch.equal(won, largest(torch.cat(parts, 1), 5).won_PN)
    assert won.sum(1).eq(5).all()
    bits = 8 * parts[0].element_size()
    said = [(message.kind, message.bytes) for message in selection_messages(problems, ranks=2, bits=bits)]
    assert all(rank.sent == said for _, rank in answers), "messages are not those that the plan prints"


def test_messages_are_bounded_and_independent_of_the_scores():
    assert [message.bytes for message in selection_messages(1, ranks=512)] == [2**14, 2**14, 2**13, 4096]
    for problems in (1, 2, 31, 32, 33, 256, 1024, 4096):
        for bits, rounds in ((32, 3), (64, 6)):
            found = digits(problems, bits=bits)
            assert sum(width for _, width in found) == bits
            assert [shift for shift, _ in found] == [
                bits - sum(w for _, w in found[: n + 1]) for n in range(len(found))
            ]
            assert problems << found[0][1] <= LARGEST_TABLE
            assert len(found) == rounds or problems > 32


POOLS = [(), ("tokens",), ("experts",), ("tokens", "experts")]
IMAGES_APART = [("batch",), ("batch", "tokens"), ("batch", "experts")]


@pytest.mark.parametrize(
    ("apart", "across_groups"), [*((a, True) for a in POOLS), *((a, False) for a in POOLS + IMAGES_APART)]
)
def test_problems_hold_what_competes(apart, across_groups):
    """Every problem's scores share the axes kept apart and no two problems do; joining undoes cutting."""
    G, images, L, E = 2, 3, 4, 5
    place = torch.arange(G * images * L * E).view(G, images * L, E)
    problems = Problems.of(place, image_tokens=L, apart=apart, across_groups=across_groups)
    cut = problems.cut(place)
    assert cut.shape[1] == problems.candidates
    assert torch.equal(problems.join(cut), place)
    image, token, expert = cut // (L * E), cut // E % L, cut % E
    keys = [value for axis, value in (("batch", image), ("tokens", token), ("experts", expert)) if axis in apart]
    keys += [] if across_groups or "batch" in apart else [image // images]
    for key in keys:
        assert (key == key[:, :1]).all()
    assert len({tuple(int(key[p, 0]) for key in keys) for p in range(len(cut))}) == len(cut)
    assert (cut[:, 1:] > cut[:, :-1]).all(), "ties are decided in the order of images, tokens, experts"
