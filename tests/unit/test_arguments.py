"""Words of the verbs that draw, grade and make data: one grammar, nothing cut in silence, every hint valid."""

from __future__ import annotations

import pytest

from ecdit_train.arguments import Evaluate, Sample, forms, read
from ecdit_train.data_words import Shapes
from ecdit_train.errors import ConfigError


def sample(*words: str) -> Sample:
    return read(Sample, ["run=r", *words]).build(Sample)


def problems(kind: type, *words: str, alone: bool = False) -> list[str]:
    return [str(p) for p in read(kind, words, alone=alone).problems]


@pytest.mark.parametrize(
    ("word", "prompts"),
    [
        ("prompts=a red circle", ("a red circle",)),
        ("prompts=[a red circle, a blue square]", ("a red circle", "a blue square")),
        ("prompts=a red circle|a blue square", ("a red circle|a blue square",)),
        ("prompts=[a | b, |]", ("a | b", "|")),
        ("prompts=['a circle, red', b]", ("a circle, red", "b")),
        ("prompts='it is [not] a list'", ("it is [not] a list",)),
        ('prompts="a cat\'s hat"', ("a cat's hat",)),
        ("prompts=7", ("7",)),
    ],
)
def test_prompts(word, prompts):
    assert sample(word).prompts == prompts


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle, big\n\nit's [x]=|\n")
    assert sample(f"prompts=@{tmp_path / 'p.txt'}").prompts == ("a red circle, big", "it's [x]=|")


def test_defaults_and_the_words_that_are_left():
    request = read(Sample, ["run=runs/sweep/moe-dense+train.seed-1", "sample.guidance=3", "prompts=x", "+a=b"])
    assert request.rest == ("sample.guidance=3", "+a=b")
    got = request.build(Sample)
    assert (got.run, got.out, got.repeat, got.weights, got.step) == (
        "runs/sweep/moe-dense+train.seed-1", None, 1, "ema", None)  # fmt: skip
    assert read(Evaluate, ["run=r"]).build(Evaluate).tasks == ()
    assert read(Evaluate, ["run=r", "tasks=colors"]).build(Evaluate).tasks == ("colors",)


def test_shapes():
    got = read(Shapes, ["out=d", "mix={colors: 4, counting: 1}", "scale=[0.5,0.8]", "count=8"], alone=True).build(
        Shapes
    )
    assert (got.mix, got.scale, got.count, got.format) == ({"colors": 4.0, "counting": 1.0}, (0.5, 0.8), 8, "png")


@pytest.mark.parametrize(
    ("kind", "word", "message"),
    [
        (Sample, "prompts=a,b", "prompts = 'a,b': takes one value, or a list [a,b]; a comma inside a text stands between "
         "quotes; nearest valid: prompts=[a,b]"),
        (Sample, "prompts=it's", "prompts = \"it's\": cannot be read; put quotes around special characters; "
         "nearest valid: prompts=\"it's\""),
        (Sample, "prompts=[]", "prompts = []: needs at least one, as in 'a photo of a red circle'"),
        (Sample, "prompts=@/none", "prompts = '@/none': cannot be read: [Errno 2] No such file or directory: '/none'"),
        (Sample, "out=a=b.png", "out = 'a=b.png': cannot be read; put quotes around special characters; "
         "nearest valid: out='a=b.png'"),
        (Sample, "repeat=0", "repeat = 0: must be at least 1; nearest valid: 1"),
        (Sample, "repeat=1,2", "repeat = '1,2': takes one value, or a list [a,b]; a comma inside a text stands between "
         "quotes; nearest valid: repeat=1"),
        (Sample, "+repeat=2", "repeat = '2': is a word of the verb: it takes no `+` or `~`; nearest valid: repeat=2"),
        (Sample, "repeat", "repeat = None: is not key=value"),
        (Sample, "step=last", "step = 'last': must be a whole number or null"),
        (Sample, "weights=best", "weights = 'best': must be one of ema, raw"),
        (Evaluate, "tasks=colors,position", "tasks = 'colors,position': takes one value, or a list [a,b]; a comma inside a "
         "text stands between quotes; nearest valid: tasks=[colors,position]"),
        (Evaluate, "tasks=colours", "tasks[0] = 'colours': must be one of single_object, two_object, counting, colors, "
         "position, color_attr; nearest valid: colors"),
        (Shapes, "mix=colors:4,counting:1", "mix = 'colors:4,counting:1': takes one value, or a list [a,b]; a comma inside "
         "a text stands between quotes; nearest valid: mix={colors:4,counting:1}"),
        (Shapes, "scale=0.2,0.3", "scale = '0.2,0.3': takes one value, or a list [a,b]; a comma inside a text stands "
         "between quotes; nearest valid: scale=[0.2,0.3]"),
        (Shapes, "scale=1", "scale = 1: must be a list of 2 numbers: scale=[LOW,HIGH]"),
        (Shapes, "cuont=3", "cuont = '3': is not a key of this verb; nearest valid: count"),
    ],
)  # fmt: skip
def test_wrong_word(kind, word, message):
    needed = {Sample: ["run=r", "prompts=x"], Evaluate: ["run=r"], Shapes: ["out=d"]}[kind]
    needed = [w for w in needed if w.partition("=")[0] != word.partition("=")[0]]
    found = problems(kind, *needed, word, alone=kind is Shapes)
    assert found[0].startswith(message)
    hint = found[0].partition("nearest valid: ")[2]
    if hint:  # applied, it is taken
        name, _, value = word.lstrip("+").partition("=")
        hinted = hint if "=" in hint else f"{hint}={value}" if "not a key" in found[0] else f"{name}={hint}"
        assert problems(kind, *needed, hinted, alone=kind is Shapes) == []


def test_every_problem_at_once():
    found = problems(Sample, "repeat=0", "step=x", "weights=y")
    assert [line.split(" = ")[0] for line in found] == ["repeat", "step", "weights", "run", "prompts"]
    with pytest.raises(ConfigError) as caught:
        read(Sample, ["repeat=0"]).build(Sample)
    assert len(caught.value.problems) == 3


def test_forms_name_every_word():
    assert forms(Evaluate) == (
        "run=FOLDER; optional: tasks=[A,B,...], split=all|train|heldout, repeat=N, weights=ema|raw, step=N"
    )
