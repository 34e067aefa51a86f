"""Typos get the right nearest key, choice and number."""

from __future__ import annotations

import pytest

from ecdit_train.config.compose import compose, groups
from ecdit_train.config.convert import key_types
from ecdit_train.config.nearest import ALIASES, closest, closest_key, divisors, nearest_divisor, nearest_multiple

KEYS = tuple(k for k in key_types(compose([], local=False)) if not k.endswith("_target_"))
CANDIDATES = [*KEYS, *groups()]


def single_edits() -> list[tuple[str, str]]:
    """One typo per key, in turn: a letter lost, doubled, swapped or replaced; position varies with the key."""
    found = []
    for n, key in enumerate(KEYS):
        head, _, leaf = key.rpartition(".")
        if len(leaf) < 3:
            continue
        i = n % (len(leaf) - 1)
        typo = (
            leaf[:i] + leaf[i + 1 :],
            leaf[:i] + leaf[i] + leaf[i:],
            leaf[:i] + leaf[i + 1] + leaf[i] + leaf[i + 2 :],
            leaf[:i] + "q" + leaf[i + 1 :],
        )[n % 4]
        wrong = f"{head}.{typo}" if head else typo
        if wrong not in CANDIDATES:
            found.append((wrong, key))
    return found


def test_there_are_at_least_fifty_typos():
    assert len(single_edits()) >= 50


@pytest.mark.parametrize(("typo", "key"), single_edits())
def test_single_edit_finds_its_key(typo, key):
    assert closest_key(typo, CANDIDATES) == key


@pytest.mark.parametrize(
    ("typo", "key"),
    [
        ("moe.num_expert", "moe.num_experts"),
        ("moe.experts", "moe.num_experts"),
        ("model.widht", "model.width"),
        ("widht", "model.width"),
        ("lr", "optim.lr"),
        ("model.lr", "optim.lr"),
        ("optimizer.lr", "optim.lr"),
        ("train.batch_size", "train.global_batch"),
        ("learning_rate", "optim.lr"),
        ("modle.width", "model.width"),
        ("diffusion.mask", "diffusion.mask_ratio"),
        ("experimnt", "experiment"),
        ("encoders.txt.width", "encoders.text.width"),
        ("MODEL.WIDTH", "model.width"),
    ],
)
def test_other_slips_find_their_key(typo, key):
    assert closest_key(typo, CANDIDATES) == key


def test_names_of_other_trainers_lead_to_keys():
    assert set(ALIASES.values()) <= set(KEYS)


def test_nothing_similar_gives_nothing():
    assert closest_key("zzzz", CANDIDATES) is None
    assert closest("zzzz", ["xl", "m"]) is None


def choice_typos() -> list[tuple[str, str]]:
    """The last letter lost, where it alone does not tell two apart, or the middle one doubled."""
    choices = groups()["experiment"]
    stems = [c[:-1] for c in choices]
    edits = [(stem, c) for stem, c in zip(stems, choices, strict=True) if stems.count(stem) == 1] + [
        (c[: len(c) // 2] + c[len(c) // 2 - 1 :], c) for c in choices
    ]
    return [(typo, choice) for typo, choice in edits if typo not in choices]


@pytest.mark.parametrize(("typo", "choice"), choice_typos())
def test_experiment_typo_finds_its_choice(typo, choice):
    assert closest(typo, groups()["experiment"]) == choice


def test_numbers():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert nearest_divisor(5, 12) == 4
    assert nearest_divisor(100, 12) == 12
    assert [nearest_multiple(v, 8) for v in (1, 8, 11, 12, 13)] == [8, 8, 8, 8, 16]
    assert nearest_multiple(3, 8, least=16) == 16
