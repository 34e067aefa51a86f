"""Words of the command line: what a Hydra user types is taken, all that is wrong is said at once, and every hint is valid."""

from __future__ import annotations

import functools

import pytest

from ecdit_train.config.compose import compose, configure, explicit_keys, override
from ecdit_train.config.resolve import declarations_only
from ecdit_train.errors import ConfigError, Problem


@pytest.fixture(autouse=True)
def light():
    """Only what classes declare is read: composing needs no torch."""
    with declarations_only():
        yield


def refusal(*words: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        configure(list(words))
    assert len(caught.value.problems) == len(str(caught.value).splitlines())
    return caught.value.problems


def refused(*words: str) -> list[str]:
    return [str(p) for p in refusal(*words)]


# --- all at once -----------------------------------------------------------------------------------------------------


def test_every_wrong_word_at_once():
    lines = refused("moe.num_expert=8", "model.widht=3", "experiment=ec_dit_xl_8", "train.steps=8e5", "optim.lr=abc")
    assert lines[:2] == [
        "moe.num_expert = 8: unknown key; nearest valid: moe.num_experts",
        "model.widht = 3: unknown key; nearest valid: model.width",
    ]
    assert lines[2].startswith("experiment = 'ec_dit_xl_8': unknown choice of experiment; there are dense_3xl, ")
    assert lines[2].endswith("; nearest valid: ec_dit_xl_8e")
    assert lines[3:5] == [
        "train.steps = 800000.0: must be a whole number; nearest valid: 800000",
        "optim.lr = 'abc': must be a number",
    ]
    assert lines[5].startswith("model.width = 3: must be")  # and the rule that the corrected key would break


def test_a_wrong_key_does_not_hide_a_broken_rule():
    lines = refused("train.stepz=5", "train.microbatch=3")
    assert [line.split(" = ")[0] for line in lines] == ["train.stepz", "train.microbatch", "optim.warmup_steps"]
    assert "must be below train.steps = 5" in lines[2]


def test_a_wrong_choice_does_not_hide_what_is_wrong_with_the_right_one():
    lines = refused("moe=token_choise", "moe.router.top_kk=3", "moe.router.top_k=0", "train.sed=1")
    assert {line.split(" = ")[0] for line in lines} == {"moe", "moe.router.top_kk", "moe.router.top_k", "train.sed"}


def test_a_word_without_a_correction_brings_no_problems_of_its_own():
    """optim.warmup_steps keeps its default of 20000, which does not fit 10 steps: that is not what the user said."""
    assert refused("train.steps=10", "optim.warmup_steps=abc") == ["optim.warmup_steps = 'abc': must be a whole number"]


def test_a_key_of_another_choice_says_which():
    line = refused("moe.router.top_k=3")[0]
    assert line.startswith("moe.router.top_k = 3: unknown key; moe")
    assert "token_choice has it" in line
    assert compose(["moe=token_choice", "moe.router.top_k=3"]).moe.router.top_k == 3


# --- Hydra's grammar ---------------------------------------------------------------------------------------------------


def test_hydras_signs():
    assert compose(["++train.seed=3"]).train.seed == 3
    assert compose(["~experiment"]).experiment == "default"
    assert compose(["experiment=dense_xl", "experiment=null"]).experiment == "default"
    assert compose(["+cluster.env=['A=1']"]).cluster.env == ("A=1",)
    assert compose(["encoders.text={width: 64}"]).encoders.text.width == 64
    assert compose(["model={layers: 4, name: short}"]).model.layers == 4


def test_nested_groups():
    cfg = compose(["moe/router=token_choice", "moe/dispatcher=deterministic", "moe.router.top_k=1"])
    assert (type(cfg.moe.router).__name__, cfg.moe.router.top_k) == ("TokenChoice", 1)
    assert type(cfg.moe.dispatcher).__name__ == "Deterministic"
    assert {"moe.router.top_k", "moe.router._target_"} <= explicit_keys(["moe/router=token_choice"])
    assert "moe.dispatcher._target_" not in explicit_keys(["moe/router=token_choice"])


def test_nested_group_of_a_stored_run():
    stored = compose(["experiment=shapes_tiny"], local=False)
    changed = override(stored, ["moe/dispatcher=deterministic", "sample/sampler=heun", "++train.seed=0"])
    assert type(changed.config.moe.dispatcher).__name__ == "Deterministic"
    assert type(changed.config.sample.sampler).__name__ == "Heun"
    assert changed.config.sample.steps == 20
    assert "sample.sampler._target_" in changed.explicit


def test_only_some_sections_of_a_stored_run():
    stored = compose(["experiment=shapes_tiny"], local=False)
    with pytest.raises(ConfigError) as caught:
        override(stored, ["model.width=4", "guidance=3", "prompt=x"], sections=["sample"], own=["prompts"])
    assert [str(p).split(";")[-1] for p in caught.value.problems] == [
        " this verb changes only sample",
        " nearest valid: sample.guidance",
        " nearest valid: prompts",
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+train.seed=3", "train.seed = 3: is there already; `+` adds a key; nearest valid: train.seed=3"),
        ("~model", "model = None: is a section that every run needs; choose one of 3xl, m, m_dense46, "),
        ("~train.seed", "train.seed = None: missing key: a whole number"),
        ("train.seed", "train.seed = None: is not key=value; nearest valid: train.seed=0"),
        ("shapes_tiny", "shapes_tiny = None: is not key=value; nearest valid: experiment=shapes_tiny"),
        ("train.seed=1,2", "train.seed = '1,2': takes one value; -m runs one job for each of several; "
         "nearest valid: train.seed=1"),
        ("observe.prompts=a,b", "observe.prompts = 'a,b': takes one value; -m runs one job for each of several; "
         "nearest valid: observe.prompts=[a,b]"),
        ("model=xl,tiny", "model = 'xl,tiny': takes one choice; -m runs one job for each of several; "
         "nearest valid: model=xl"),
        ("train.seed=[", "train.seed = '[': cannot be read; put quotes around special characters"),
        ("cluster.env=[A=1,B=2]", "cluster.env = '[A=1,B=2]': cannot be read; put quotes around special characters; "
         "nearest valid: cluster.env=['A=1','B=2']"),
        ("run=it's", "run = \"it's\": cannot be read; put quotes around special characters; nearest valid: run=\"it's\""),
        ("model@moe=xl", "model = 'xl': is not in the defaults list"),
        ("encoders.image=3", "encoders.image = 3: is a section; set one of"),
        ("parallel.compile=1", "parallel.compile = 1: must be true or false; nearest valid: true"),
        ("moe.scope=grup", "moe.scope = 'grup': must be one of group, image, batch; nearest valid: group"),
        ("observe.prompts=hello", "observe.prompts = 'hello': must be a list of text; nearest valid: [hello]"),
        ("cluster.account=true", "cluster.account = True: must be text or null; nearest valid: 'true'"),
        ("model=null", "model = None: is a section that every run needs"),
        ("moe/ruter=token_choice", "moe/ruter = 'token_choice': unknown group; nearest valid: moe/router"),
        ("+experiment=shapes_tiny", "experiment = 'shapes_tiny': has a choice already; `+` adds a group; "
         "nearest valid: experiment=shapes_tiny"),
        ("hydra.run.dir=x", "hydra.run.dir = 'x': has no use here: run says it; nearest valid: run=x"),
        ("hydra.searchpath=/none", "hydra.searchpath = '/none': must be a list of folders"),
        ("hydra/launcher=slrm", "hydra/launcher = 'slrm': unknown choice of hydra/launcher; there are local, slurm"),
        ("config_dir=/tmp", "config_dir = '/tmp': unknown key; --config-dir DIR says it"),
        ("train.microbatch=${nope}", "conf = None: the configuration does not compose: "),
    ],
)  # fmt: skip
def test_wrong_word(word, message):
    assert refused(word)[0].startswith(message)


def test_a_dense_network_has_no_router():
    assert refused("moe=dense", "moe/router=token_choice")[0].startswith(
        "moe/router = 'token_choice': is not in the defaults list of moe=dense"
    )


# --- a hint is never itself invalid ------------------------------------------------------------------------------------

TYPOS = ["train.sed=3", "model.widht=1152", "lr=1e-3", "moe.num_expert=8", "parallel.tpp=1", "sampel.steps=3",
         "encoders.txt.width=2048", "cluster.node=1", "observe.log_evry=3", "checkpoint.kep=2", "data.resolutoin=256",
         "optim.optimizer.momntum=0.5", "moe.router.capacty_factor=2.0",
         "sample.sampler._targt_=ecdit_train.diffusion.samplers.heun.Heun",
         "++train.sed=3", "diffusion.mask=0.5", "batch_size=4096", "max_steps=800000", "cfg_scale=2.0", "num_heads=18"]  # fmt: skip
VALUES = ["train.steps=8e5", "train.seed=1.0", "parallel.compile=1", "parallel.compile=yes", "parallel.compile=off",
          "moe.scope=grup", "moe.scope=imge", "observe.prompts=hello", "observe.prompts=a b", "cluster.account=true",
          "cluster.modules=gcc", "train.precision=bf", "data.on_bad=fial", "run=true", "run=1.5", "diffusion.prediction=velo",
          "cluster.gpu=1.5", "cluster.partition=false", "optim.schedule=cos", "observe.prompts=3"]  # fmt: skip
CHOICES = ["model=xll", "moe=dens", "moe=expertchoice", "experiment=shapes_tin", "experiment=dense-xl", "parallel=single1",
           "optim=adam", "cluster=loca", "moe/router=expert-choice", "moe/ruter=expert_choice", "encoders/text=T5",
           "modle=xl", "debug=sanit", "sample/sampler=eular", "hydra/launcher=slurmm", "optim/optimizer=rmspro"]  # fmt: skip
FORMS = ["train.seed=1,2", "train.seed=range(1,4)", "train.seed=choice(4,5)", "model=xl,xxl", "moe=glob(*)", "run=a=b",
         "run=it's", "run=(x)", "cluster.env=[A=1,B=2]", "observe.prompts=[a=b, c]", "observe.prompts=a,b", "model", "train.seed",
         "shapes_tiny", "train", "sed", "run", "+train.seed=3", "+experiment=dense_xl", "++experiment=dense_xl",
         "+moe/router=expert_choice", "hydra.run.dir=runs/x", "hydra.sweep.subdir=runs/x", "hydra.sweep.dr=runs/x",
         "run='", "cluster.time_limit=1:00:00'"]  # fmt: skip


def corrected(word: str, problem: Problem) -> str:
    """The word with its hint applied, as a reader would: a whole word, another name, or another value."""
    hint, (name, _, value) = str(problem.nearest), word.partition("=")
    if "=" in hint and not hint.startswith(("[", "'", '"')):
        return hint
    if "unknown key" in problem.rule or "unknown group" in problem.rule or "is no key" in problem.rule:
        return f"{hint}={value}"
    return f"{name}={hint}"


WRONG = [*TYPOS, *VALUES, *CHOICES, *FORMS]


@functools.cache
def problems_of(word: str) -> list[Problem]:
    with declarations_only(), pytest.raises(ConfigError) as caught:
        compose([word], local=False)
    return caught.value.problems


@pytest.mark.parametrize("word", WRONG)
def test_every_hint_is_taken(word):
    """Types and names: the hinted word composes. (What a rule hints at is the rule's own test.)"""
    first, *others = problems_of(word)
    assert not others, "a hint would be refused in its turn"
    if first.nearest is not None:
        compose([corrected(word, first)], local=False)


def test_nearly_all_of_them_have_a_hint():
    without = [word for word in WRONG if problems_of(word)[0].nearest is None]
    assert len(WRONG) >= 80
    assert len(without) <= 5, without
