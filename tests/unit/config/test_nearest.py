"""Typos get the right nearest key; wrong words are all refused at once."""

from __future__ import annotations

import pytest

from ecdit_train.config.compose import compose, groups
from ecdit_train.config.convert import leaf_types
from ecdit_train.config.nearest import closest, closest_key, divisors, nearest_divisor, nearest_multiple
from ecdit_train.errors import ConfigError

KEYS = tuple(leaf_types())
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
        ("moe.num_expert", "moe.experts"),
        ("moe.num_experts", "moe.experts"),
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


def test_nothing_similar_gives_nothing():
    assert closest_key("zzzz", CANDIDATES) is None
    assert closest("zzzz", ["xl", "m"]) is None


def choice_typos() -> list[tuple[str, str]]:
    """The last letter lost, or the middle one doubled."""
    choices = groups()["experiment"]
    edits = [(c[:-1], c) for c in choices] + [(c[: len(c) // 2] + c[len(c) // 2 - 1 :], c) for c in choices]
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


def refused(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(list(words))
    assert len(caught.value.problems) == len(str(caught.value).splitlines())
    return str(caught.value).splitlines()


def test_every_wrong_word_at_once():
    lines = refused("moe.num_expert=8", "model.widht=3", "experiment=ec_dit_xl_8", "train.steps=8e5", "optim.lr=abc")
    assert lines[:2] == [
        "moe.num_expert = 8: unknown key; nearest valid: moe.experts",
        "model.widht = 3: unknown key; nearest valid: model.width",
    ]
    assert lines[2].startswith("experiment = 'ec_dit_xl_8': unknown choice of experiment; there are dense_3xl, ")
    assert lines[2].endswith("; nearest valid: ec_dit_xl_8e")
    assert lines[3:] == [
        "train.steps = 800000.0: must be a whole number; nearest valid: 800000",
        "optim.lr = 'abc': must be a number",
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "+train.seed=3",
            "train.seed = '+train.seed=3': `+` and `~` are not used: every key exists already, write key=value; "
            "nearest valid: train.seed=3",
        ),
        (
            "~model",
            "model = '~model': `+` and `~` are not used: every key exists already, write key=value; "
            "nearest valid: model",
        ),
        ("train", "train = None: is not key=value; nearest valid: train=VALUE"),
        ("model=3x", "model = '3x': unknown choice of model; there are 3xl, m, m_dense46, small, tiny, xl, xxl; "
         "nearest valid: 3xl"),
        ("train.seed=1,2", "train.seed = '1,2': takes one value; a list is written [a,b]; "
         "nearest valid: train.seed=[1,2]"),
        ("train.seed=[", "train.seed = '[': cannot be read; put quotes around special characters; "
         "nearest valid: train.seed='['"),
        ("cluster.env=[A=1,B=2]", "cluster.env = '[A=1,B=2]': cannot be read; put quotes around special characters; "
         "nearest valid: cluster.env=['A=1','B=2']"),
        ("model@moe=xl", "model@moe = 'xl': packages (@) are not used; nearest valid: model"),
        ("encoders.image={kind: kl}", "encoders.image = {'kind': 'kl'}: is a section; set one of encoders.image.kind, "
         "encoders.image.path, encoders.image.channels, encoders.image.factor, encoders.image.scale, "
         "encoders.image.shift, encoders.image.parameters"),
        ("parallel.compile=1", "parallel.compile = 1: must be true or false; nearest valid: true"),
        ("moe.scope=grup", "moe.scope = 'grup': must be one of group, image, batch; nearest valid: group"),
        ("observe.prompts=hello", "observe.prompts = 'hello': must be a list of text; nearest valid: [hello]"),
        ("model=null", "model = None: unknown choice of model; there are 3xl, m, m_dense46, small, tiny, xl, xxl"),
        ("hydra.run.dir=x", "hydra.run.dir = 'x': unknown key"),
    ],
)  # fmt: skip
def test_wrong_word(word, message):
    assert refused(word) == [message]
