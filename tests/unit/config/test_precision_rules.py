"""Rules of 8-bit products, each with the value that would do."""

import pytest

from ecdit_train.config.compat import kind
from ecdit_train.config.compose import compose
from ecdit_train.config.convert import with_values
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError

FP8 = ("experiment=shapes_tiny", "train.precision=fp8")


def problems(*overrides):
    with pytest.raises(ConfigError) as raised:
        validate(compose([*FP8, *overrides]))
    return {p.field: p for p in raised.value.problems}


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_fp8_is_a_precision(recipe):
    train = compose([*FP8, f"train.fp8_recipe={recipe}"]).train
    assert (train.compute, train.recipe) == ("bf16", recipe)


@pytest.mark.parametrize(("precision", "compute"), [("fp32", "fp32"), ("bf16", "bf16")])
def test_other_precisions_have_no_recipe(precision, compute):
    train = compose(["experiment=shapes_tiny", f"train.precision={precision}", "train.fp8_recipe=mxfp8"]).train
    assert (train.compute, train.recipe) == (compute, None)


def test_blocks_are_nothing_for_torchs_product():
    found = problems("train.fp8_recipe=mxfp8")
    assert found["train.fp8_backend"].nearest == "emulated"
    for backend in ("emulated", "transformer_engine"):
        validate(compose([*FP8, "train.fp8_recipe=mxfp8", f"train.fp8_backend={backend}"]))


@pytest.mark.parametrize(("recipe", "unit"), [("current", 16), ("mxfp8", 32)])
def test_experts_width(recipe, unit):
    width = compose([*FP8]).model.width
    odd = (2 * unit - unit // 2) / width
    found = problems(f"train.fp8_recipe={recipe}", "train.fp8_backend=emulated", f"moe.expert_ratio={odd}")
    assert found["moe.expert_ratio"].nearest * width % unit == 0
    compose([*FP8, f"train.fp8_recipe={recipe}", "train.fp8_backend=emulated", f"moe.expert_ratio={unit / width}"])


def test_what_remembers_is_another_run():
    old = compose([*FP8])
    delayed = with_values(old, {"train.fp8_recipe": "delayed"})
    plain = with_values(old, {"train.precision": "bf16"})
    assert kind("train.precision", old=old, new=plain) == "schedule"
    assert kind("train.fp8_recipe", old=old, new=delayed) == "identity"
    assert kind("train.precision", old=plain, new=delayed) == "identity"
    assert kind("train.fp8_backend", old=old, new=with_values(old, {"train.fp8_backend": "emulated"})) == "free"
    lean = with_values(delayed, {"moe.form": "lean"})
    assert kind("moe.form", old=delayed, new=lean) == "identity"
    assert kind("moe.form", old=old, new=with_values(old, {"moe.form": "lean"})) == "free"
