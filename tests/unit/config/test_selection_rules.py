"""What the selection family and Expert Race refuse, each with its exact message."""

from __future__ import annotations

import pytest

from ecdit_train.config.compat import kind
from ecdit_train.config.compose import compose
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError


def configured(*words: str):
    return compose(["experiment=shapes_tiny", "train.microbatch=16", *words], local=False)


def problems(*words: str, world: int = 4) -> list[str]:
    """Lines of the one ConfigError, or nothing."""
    try:
        validate(configured(*words), world=world)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize("moe", ["expert_race", "be", "bl", "le", "tc", "ec_image"])
def test_presets_are_one_override_apart(moe):
    """Expert choice of an image needs experts that share its 18 and 36 tokens evenly, here as in its own file."""
    more = ("moe.num_experts=9",) if moe == "ec_image" else ()
    assert problems(f"moe={moe}", *more) == []


@pytest.mark.parametrize(("words", "said"), [
    (("moe=ec_image",), "moe.num_experts = 8: must let a whole number win: in training, 2 * 18 candidates / 8 "
     "experts = 4.5; nearest valid: 9"),
    (("moe=tc", "moe.router.capacity_factor=1.5"), "moe.router.capacity_factor = 1.5: must let a whole number "
     "win: in training, "
     "1.5 * 8 candidates / 8 experts = 1.5; nearest valid: 2.0"),
    (("moe=be", "moe.router.capacity_factor=0.51"), "moe.router.capacity_factor = 0.51: must let a whole number "
     "win: in training, "
     "0.51 * 128 candidates / 8 experts = 8.16; nearest valid: 1.0"),
    (("moe=be", "moe.router.apart=[tokens,tokens]"), "moe.router.apart = ('tokens', 'tokens'): must name each "
     "axis once and leave "
     "one that competes; nearest valid: ['tokens']"),
    (("moe=be", "moe.router.apart=[batch,tokens,experts]"), "moe.router.apart = ('batch', 'tokens', 'experts'): "
     "must name each axis "
     "once and leave one that competes; nearest valid: ['batch', 'tokens']"),
    (("moe=be", "moe.router.apart=[token]"), "moe.router.apart[0] = 'token': must be one of batch, tokens, experts"),
    (("moe=le", "moe.router.pool=ranks"), "moe.router.pool = 'ranks': must be group: with images kept apart "
     "(moe.router.apart) there is "
     "no pool of them; nearest valid: group"),
    (("moe=le", "moe.router.pool_images=64"), "moe.router.pool_images = 64: must be null: images compete in "
     "their routing group, which "
     "moe.scope sizes; nearest valid: null"),
    (("moe=expert_race", "moe.router.pool_images=100"), "moe.router.pool_images = 100: must be "
     "train.global_batch = 128: of several microbatches, other layouts would put other images together; "
     "nearest valid: 128"),
    (("moe=expert_race", "moe.router.pool_images=128"), "train.microbatch = 16: dp * microbatch = 4 * 16 = 64 "
     "must be the 128 images "
     "that the router selects among; nearest valid: 32"),
    (("moe=expert_race", "moe.router.capacity_factor=33"), "moe.router.capacity_factor = 33.0: must not exceed "
     "moe.num_experts = 32: an "
     "expert cannot take a token twice; nearest valid: 32.0"),
    (("moe=expert_race", "moe.router.momentum=1"), "moe.router.momentum = 1.0: must be at least 0 and below 1"),
    (("moe=expert_race", "moe.router.target_weight=-1"), "moe.router.target_weight = -1.0: must be at least 0; "
     "nearest valid: 0"),
])  # fmt: skip
def test_refused(words, said):
    assert problems(*words)[:1] == [said]


def test_a_fixed_pool_frees_the_microbatch():
    """With pool_images the layout's rule holds the selection together; without, microbatch and ranks decide it."""
    loose, fixed = configured("moe=expert_race"), configured("moe=expert_race", "moe.router.pool_images=128")
    apart = configured("moe=le")
    assert kind("train.microbatch", old=loose, new=loose) == "identity"
    assert kind("train.microbatch", old=fixed, new=fixed) == "free"
    assert kind("train.microbatch", old=apart, new=apart) == "free"
    for world, micro in ((1, 128), (2, 64), (8, 16)):
        assert problems("moe=expert_race", "moe.router.pool_images=128", f"train.microbatch={micro}", world=world) == []
