"""Each rule with its exact message, and all of them at once. The default is EC-DiT-XL-8E on one process."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecdit_train.config.cluster_rules import seconds
from ecdit_train.config.convert import with_values
from ecdit_train.config.rules import is_whole
from ecdit_train.config.validate import validate
from ecdit_train.errors import ConfigError
from ecdit_train.secrets import is_secret_name


def broken(cfg, *, world=None) -> list[str]:
    """Lines of the one ConfigError, or nothing."""
    try:
        validate(cfg, world=world)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


DENSE = {"moe.router": None, "moe.experts": None, "moe.dispatcher": None, "moe.num_experts": 1}
TOKEN_CHOICE = {
    "moe.router": {
        "_target_": "ecdit_train.model.routers.token_choice.TokenChoice",
        "capacity_factor": 2.0,
        "top_k": 2,
        "balance_weight": 0.01,
        "sees": "modulated",
    }
}
THRESHOLD = {
    "moe.router": {
        "_target_": "ecdit_train.model.routers.threshold.Threshold",
        "capacity_factor": 2.0,
        "momentum": 0.9,
        "sees": "modulated",
    }
}
IDENTITY = {
    "encoders.image": {"_target_": "ecdit_train.diffusion.encoders.identity.Identity", "scale": 1.0, "shift": 0.0}
}
BATCH_SCOPE = {"moe.scope": "batch"}

RULES = [
    # --- the network
    ({"model.width": 1000}, "model.width = 1000: must be model.heads * 64 = 18 * 64 = 1152; nearest valid: 1152"),
    ({"model.kv_heads": 5}, "model.kv_heads = 5: must divide model.heads = 18; nearest valid: 6"),
    ({"model.text_width": 1500}, "model.text_width = 1500: must be a multiple of 64; nearest valid: 1472"),
    ({"model.layers": 0, **DENSE}, "model.layers = 0: must be at least 1; nearest valid: 1"),
    ({"model.layers": 1}, "model.layers = 1: must be at least 2 with experts: layers 2, 4, ... carry them; nearest valid: 2"),
    ({"model.text_refiner_layers": -1}, "model.text_refiner_layers = -1: must be at least 0; nearest valid: 0"),
    # --- experts
    ({"moe.num_experts": 0}, "moe.num_experts = 0: must be at least 1; nearest valid: 1"),
    ({"moe.num_experts": 7}, "moe.num_experts = 7: capacity = group * experts per token / experts = 1024 * 2 / 7 = 292.571 "
     "must be whole; nearest valid: 8"),
    ({"moe.router.capacity_factor": 1.3}, "moe.router.capacity_factor = 1.3: capacity = group * experts per token / experts = "
     "1024 * 1.3 / 8 = 166.4 must be whole; nearest valid: 1.3125"),
    ({"moe.router.capacity_factor": 0.0}, "moe.router.capacity_factor = 0.0: must be greater than 0"),
    ({"moe.router.capacity_factor": 9.0}, "moe.router.capacity_factor = 9.0: must not exceed moe.num_experts = 8: an expert cannot "
     "take a token twice; nearest valid: 8.0"),
    ({**TOKEN_CHOICE, "moe.router.top_k": 9}, "moe.router.top_k = 9: must not exceed moe.num_experts = 8; nearest valid: 8"),
    ({"moe.group_size": 1000}, "moe.group_size = 1000: must hold whole images of 128 kept patches; nearest valid: 1024"),
    ({**TOKEN_CHOICE, "moe.router.balance_weight": -0.1}, "moe.router.balance_weight = -0.1: must be at least 0; nearest valid: 0"),
    # --- image and mask
    ({"data.resolution": 250}, "data.resolution = 250: must be a multiple of encoders.image.factor * model.patch = 8 * 2 "
     "= 16; nearest valid: 256"),
    ({"diffusion.mask_ratio": 0.3}, "diffusion.mask_ratio = 0.3: must keep a whole number of the 256 patches, keeps "
     "179.2; nearest valid: 0.5"),
    ({"diffusion.mask_ratio": 1.0}, "diffusion.mask_ratio = 1.0: must be at least 0 and below 1"),
    ({"diffusion.caption_drop": 1.5}, "diffusion.caption_drop = 1.5: must be between 0 and 1; nearest valid: 1.0"),
    ({"diffusion.caption_drop": -0.5}, "diffusion.caption_drop = -0.5: must be between 0 and 1; nearest valid: 0.0"),
    ({"diffusion.timestep_std": 0.0}, "diffusion.timestep_std = 0.0: must be greater than 0"),
    # --- sampling
    ({"sample.scope": "group", "sample.group_size": 500}, "sample.group_size = 500: must hold whole images of 256 "
     "patches; nearest valid: 512"),
    ({"moe.router.capacity_factor": 1.0, "moe.num_experts": 1024, "sample.scope": "group"}, "sample.group_size = 512: sampling "
     "capacity = group * experts per token / experts = 512 * 1 / 1024 = 0.5 must be whole; nearest valid: 1024"),
    ({"moe.router.capacity_factor": 1.0, "moe.num_experts": 512}, "sample.scope = 'image': sampling capacity = group * "
     "experts per token / experts = 256 * 1 / 512 = 0.5 must be whole; nearest valid: group"),
    ({"sample.steps": 0}, "sample.steps = 0: must be at least 1; nearest valid: 1"),
    # --- encoders
    ({"encoders.text.path": " "}, "encoders.text.path = ' ': must be a local folder with config.json and safetensors "
     "weights; nearest valid: encoders/t5"),
    ({"encoders.image.path": ""}, "encoders.image.path = '': must be a local folder with config.json and safetensors "
     "weights; nearest valid: encoders/vae"),
    ({"encoders.image.scale": 0.0}, "encoders.image.scale = 0.0: must be greater than 0"),
    # --- batch and schedule
    ({"train.microbatch": 60}, "train.microbatch = 60: must be a multiple of the 8 images of a routing group (1024 tokens "
     "/ 128 per image); nearest valid: 64"),
    ({"train.microbatch": 48}, "train.microbatch = 48: must divide train.global_batch = 4096; nearest valid: 32"),
    ({"train.global_batch": 4100}, "train.global_batch = 4100: must be a multiple of the 8 images of a routing group "
     "(moe.group_size 1024); nearest valid: 4096"),
    ({"optim.schedule": "wsd"}, "optim.decay_steps = 0: must be at least 1 and at most train.steps - optim.warmup_steps = 780000 "
     "with optim.schedule=wsd; nearest valid: 80000"),
    ({"optim.schedule": "wsd", "optim.decay_steps": 790_000}, "optim.decay_steps = 790000: must be at least 1 and at most "
     "train.steps - optim.warmup_steps = 780000 with optim.schedule=wsd; nearest valid: 780000"),
    ({"optim.warmup_steps": 800_000}, "optim.warmup_steps = 800000: must be below train.steps = 800000; nearest valid: "
     "799999"),
    ({"optim.lr": 0.0}, "optim.lr = 0.0: must be greater than 0"),
    ({"optim.optimizer.momentum": 1.0}, "optim.optimizer.momentum = 1.0: must be at least 0 and below 1"),
    ({"optim.ema_decay": -1.0}, "optim.ema_decay = -1.0: must be at least 0 and below 1; nearest valid: 0.0"),
    ({"observe.prompts": ()}, "observe.prompts = (): must not be empty while observe.sample_every = 5000; nearest valid: "
     "observe.sample_every=0"),
    ({"run": " "}, "run = ' ': must not be empty"),
    # --- layout, without the number of ranks
    ({"parallel.tp": 12, **DENSE}, "parallel.tp = 12: must divide model.heads = 18; nearest valid: 6"),
    ({"parallel.tp": 9, **DENSE}, "parallel.tp = 9: must be a multiple of model.kv_heads = 6; nearest valid: 6"),
    ({"parallel.tp": 3}, "parallel.tp = 3: must divide the capacity = 256: each tp rank carries its share of an expert's "
     "slots; nearest valid: 2"),
    ({"parallel.ep": 3}, "parallel.ep = 3: must divide moe.num_experts = 8; nearest valid: 2"),
    ({"parallel.ep": 2, **DENSE}, "parallel.ep = 2: must be 1 in a dense network: no experts; nearest valid: 1"),
    ({"parallel.sequence_parallel": True}, "parallel.sequence_parallel = True: not available: an expert ranks its whole "
     "group, so each tp rank needs all tokens; nearest valid: false"),
    ({"parallel.overlap_chunks": 3}, "parallel.overlap_chunks = 3: must divide the 8 routing groups of a microbatch; "
     "nearest valid: 2"),
    ({**THRESHOLD, "parallel.overlap_chunks": 2}, "parallel.overlap_chunks = 2: must be 1 while the number of rows varies "
     "(moe.dispatcher.cap = null); nearest valid: 1"),
    ({**THRESHOLD, "moe.dispatcher.cap": 0.0}, "moe.dispatcher.cap = 0.0: must be greater than 0"),
    ({"parallel.dp_shard": 0}, "parallel.dp_shard = 0: must be at least 1, or -1 for the ranks that are left; nearest "
     "valid: -1"),
    ({"parallel.keep": ("experts",)}, "parallel.keep = ('experts',): must be [] with activation_checkpointing = none: "
     "`selective` keeps what is named here; nearest valid: []"),
    ({"parallel.activation_checkpointing": "selective", "parallel.keep": ("experts", "attention", "experts")},
     "parallel.keep = ('experts', 'attention', 'experts'): must name each kind once; nearest valid: [experts,attention]"),
    ({"parallel.checkpoint_blocks": 0.0}, "parallel.checkpoint_blocks = 0.0: must be above 0 and at most 1; no block is "
     "activation_checkpointing=none; nearest valid: 1.0"),
    ({"parallel.checkpoint_blocks": 0.5}, "parallel.checkpoint_blocks = 0.5: must be 1 with activation_checkpointing = none; "
     "nearest valid: 1.0"),
    ({"parallel.exchange": "hierarchical", "parallel.ep": 8, "cluster.gpus_per_node": 8}, "parallel.exchange = 'hierarchical': "
     "needs ep = 8 to be several whole nodes of cluster.gpus_per_node = 8; nearest valid: flat"),
    ({"parallel.exchange": "hierarchical", "parallel.ep": 8, "cluster.gpus_per_node": 3}, "parallel.exchange = 'hierarchical': "
     "needs ep = 8 to be several whole nodes of cluster.gpus_per_node = 3; nearest valid: flat"),
    ({**THRESHOLD, "parallel.exchange": "hierarchical", "parallel.ep": 8, "cluster.gpus_per_node": 4},
     "parallel.exchange = 'hierarchical': must be flat while the number of rows varies (moe.dispatcher.cap = null); "
     "nearest valid: flat"),
    # --- machine room
    ({"cluster.time_limit": "90"}, "cluster.time_limit = '90': must be HH:MM:SS or D-HH:MM:SS; nearest valid: 1-00:00:00"),
    ({"cluster.signal_lead": 3600}, "cluster.signal_lead = 3600: must be below cluster.time_limit = 01:00:00 (3600 s); "
     "nearest valid: 360"),
    ({"cluster.gemm_efficiency": 1.2}, "cluster.gemm_efficiency = 1.2: must not exceed 1; nearest valid: 1.0"),
    ({"cluster.partition": "a b"}, "cluster.partition = 'a b': must be one word without quotes or shell signs, or null"),
    ({"cluster.modules": ("cuda", "x;y")}, "cluster.modules = 'x;y': must be one word without quotes or shell signs"),
    ({"cluster.env": ("OK=1", "no equals")}, "cluster.env = 'no equals': must be NAME=value on one line"),
    ({"cluster.env": ("WANDB_API_KEY=abc123",)}, "cluster.env = 'WANDB_API_KEY=...': looks like a secret; configs and job "
     "scripts are copied around, so export it in your shell or read it from a 0600 file"),
]  # fmt: skip


def repaired(cfg, *, world=None):
    """`cfg` with every value that the problems name."""
    with pytest.raises(ConfigError) as caught:
        validate(cfg, world=world)
    values = {}
    for p in (p for p in caught.value.problems if p.nearest is not None):
        key, equals, text = str(p.nearest).partition("=")
        values |= {key: int(text)} if equals else {p.field: {"false": False}.get(str(p.nearest), p.nearest)}
    return with_values(cfg, values), all(p.nearest is not None for p in caught.value.problems)


def in_order(values):
    """A slot before its keys."""
    return dict(sorted(values.items(), key=lambda item: item[0].count(".")))


@pytest.mark.parametrize(("values", "message"), RULES)
def test_rule(base, values, message):
    assert broken(with_values(base, in_order(values)))[0] == message


WORLD_RULES = [
    ({"parallel.tp": 6, **DENSE}, 16, "parallel.tp = 6: dp_replicate * tp = 1 * 6 = 6 must divide the world of 16 ranks; "
     "nearest valid: 2"),
    ({"parallel.dp_replicate": 3}, 8, "parallel.dp_replicate = 3: dp_replicate * tp = 3 * 1 = 3 must divide the world of "
     "8 ranks; nearest valid: 2"),
    ({"parallel.dp_shard": 4}, 8, "parallel.dp_shard = 4: dp_replicate * dp_shard * tp = 1 * 4 * 1 = 4 must equal the "
     "world of 8 ranks; nearest valid: 8"),
    ({"parallel.ep": 8}, 4, "parallel.ep = 8: must divide the world of 4 ranks (edp * ep = world); nearest valid: 4"),
    ({}, 128, "train.microbatch = 64: dp * microbatch = 128 * 64 = 8192 must divide train.global_batch = 4096; nearest "
     "valid: 32"),
    ({}, 3, "train.global_batch = 4096: dp * microbatch = 3 * 64 = 192 must divide train.global_batch = 4096; nearest "
     "valid: 4032"),
    ({"parallel.replicate_experts": True, "parallel.dp_replicate": 2, "parallel.ep": 8}, 8, "parallel.replicate_experts = True: "
     "needs dp_replicate = 2 to divide edp = world / ep = 8 / 8 = 1; nearest valid: false"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "world", "message"), WORLD_RULES)
def test_rule_of_a_world(base, values, world, message):
    assert broken(with_values(base, values)) == []
    assert broken(with_values(base, values), world=world)[0] == message


@pytest.mark.parametrize(("values", "world"), [(v, None) for v, _ in RULES] + [(v, w) for v, w, _ in WORLD_RULES])
def test_all_named_values_together_are_valid(base, values, world):
    """A hint is never itself invalid, and hides nothing: one round of corrections is enough."""
    broken_cfg = with_values(base, in_order(values))
    try:
        cfg, complete = repaired(broken_cfg, world=world)
    except ConfigError:
        return  # a value without a nearest one is still wrong
    if complete:
        validate(cfg, world=world)


def test_what_a_broken_value_hides_is_listed_with_it(base):
    """The global batch was never asked about while the group size was wrong."""
    lines = broken(with_values(base, {"moe.group_size": 1000, "train.global_batch": 4100, "train.microbatch": 41}))
    assert [line.split(" = ")[0] for line in lines] == ["moe.group_size", "train.global_batch", "train.microbatch"]


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "moe.group_size": st.integers(-1, 3000),
            "moe.num_experts": st.integers(0, 70),
            "train.global_batch": st.integers(0, 9000),
            "train.microbatch": st.integers(0, 200),
            "sample.group_size": st.integers(0, 2000),
            "data.resolution": st.integers(1, 600),
            "model.kv_heads": st.integers(0, 20),
            "parallel.tp": st.integers(0, 10),
            "parallel.ep": st.integers(0, 10),
            "parallel.overlap_chunks": st.integers(0, 5),
            "optim.warmup_steps": st.integers(-2, 900_000),
        },
    ),
    st.sampled_from([None, 1, 8, 12]),
)
def test_one_round_of_corrections_is_enough(base, values, world):
    cfg = with_values(base, values)
    if broken(cfg, world=world):
        cfg, complete = repaired(cfg, world=world)
        if complete:
            assert broken(cfg, world=world) == []


def test_all_problems_at_once(base):
    values = {
        "model.width": 1000,
        "model.kv_heads": 5,
        "moe.num_experts": 7,
        "train.microbatch": 60,
        "optim.warmup_steps": 900_000,
        "parallel.ep": 3,
        "parallel.sequence_parallel": True,
        "cluster.env": ("A_TOKEN=1",),
        "encoders.text.path": "",
    }
    fields = [line.split(" = ")[0] for line in broken(with_values(base, values), world=8)]
    assert set(values) <= set(fields)


def test_dense_asks_nothing_about_groups(base):
    odd = {**DENSE, "moe.group_size": 1000, "train.microbatch": 1, "train.global_batch": 3}
    assert broken(with_values(base, odd)) == []


def test_image_and_batch_scope_ask_nothing_about_group_size(base):
    for scope in ("image", "batch"):
        assert broken(with_values(base, {"moe.scope": scope, "moe.group_size": 1000, "train.microbatch": 1})) == []


def test_batch_scope_counts_the_microbatch(base):
    cfg = with_values(base, {**BATCH_SCOPE, "moe.num_experts": 256, "train.microbatch": 2})
    assert cfg.capacity == 2
    assert broken(cfg) == []
    assert len(broken(with_values(cfg, {"parallel.overlap_chunks": 2}))) == 1  # the pool is one group


def test_tensor_parallel_may_exceed_kv_heads_evenly(base):
    ok = {"model.heads": 24, "model.width": 1536, "model.kv_heads": 2, **DENSE}
    assert broken(with_values(base, {**ok, "parallel.tp": 8})) == []
    assert broken(with_values(base, {**ok, "parallel.tp": 2})) == []
    assert len(broken(with_values(base, {**ok, "parallel.tp": 3}))) == 1


def test_sequence_parallel_is_refused_with_tensor_parallel_too(base):
    (line,) = broken(with_values(base, {"parallel.sequence_parallel": True, "parallel.tp": 2}), world=8)
    assert line.startswith("parallel.sequence_parallel = True: not available")


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({"tp": 3}, {"tp"}),
        ({"ep": 7}, {"ep"}),
        ({"tp": 0}, {"tp"}),
        ({"dp_shard": 0}, {"dp_shard"}),
        ({"dp_replicate": 3}, {"dp_replicate"}),
        ({"dp_replicate": 2, "dp_shard": 2}, {"dp_shard"}),
        ({"overlap_chunks": 0}, {"overlap_chunks"}),
        ({"tp": 3, "ep": 5}, {"tp", "ep"}),
    ],
)
def test_bad_layouts_of_eight_ranks(base, values, fields):
    lines = broken(with_values(base, {f"parallel.{name}": value for name, value in values.items()}), world=8)
    assert {line.split(" = ")[0].removeprefix("parallel.") for line in lines} == fields
    assert all("nearest valid" in line for line in lines)


@pytest.mark.parametrize("layout", [(1, -1, 2, 8), (2, -1, 1, 4), (2, 2, 2, 8), (1, 8, 1, 1), (1, 4, 2, 2)])
def test_good_layouts_of_eight_ranks(base, layout):
    names = ("dp_replicate", "dp_shard", "tp", "ep")
    values = {f"parallel.{name}": value for name, value in zip(names, layout, strict=True)}
    assert broken(with_values(base, values), world=8) == []


def test_images_per_group(base):
    assert base.images_per_group == 8
    assert with_values(base, DENSE).images_per_group == 1
    assert with_values(base, {"moe.scope": "image"}).images_per_group == 1


def test_secret_names_and_times():
    assert all(map(is_secret_name, ["HF_TOKEN", "WANDB_API_KEY", "APIKEY", "db_password", "AWS_SECRET", "MY_KEYS"]))
    assert not any(map(is_secret_name, ["TOKENIZERS_PARALLELISM", "NCCL_IB_HCA", "KEYBOARD", "PATH"]))
    assert [seconds(t) for t in ("00:00:10", "24:00:00", "2-01:00:00")] == [10, 86_400, 176_400]
    assert [seconds(t) for t in ("10", "1:2:3", "00:60:00")] == [None, None, None]


def test_a_secret_is_never_printed(base):
    lines = broken(with_values(base, {"cluster.env": ("HF_TOKEN=hf_planted", "PROXY=http://me:hf_planted@host")}))
    assert len(lines) == 2
    assert "hf_planted" not in "\n".join(lines)


def test_whole_numbers_survive_floating_point():
    assert is_whole(256 * (1 - 0.3125))
    assert is_whole(0.1 * 30)
    assert not is_whole(2.5)


def test_a_place_of_shards_is_a_folder_or_a_url_that_is_read(base):
    for place in ("data/images", "s3://bucket/set", "https://host/set", "http://host:8080/set"):
        assert broken(with_values(base, {"data.shards": place})) == []
    (line,) = broken(with_values(base, {"data.shards": "gs://bucket/set"}))
    assert line.endswith("must be a folder or begin with s3://, https:// or http://; nearest valid: s3://bucket/set")
    (line,) = broken(with_values(base, {"data.shards": "https://me:word@host/set"}))
    assert "address with a password in it" in line
    assert "word@" not in line


def test_how_a_store_is_read_has_bounds(base):
    wrong = {
        "data.in_flight": 0,
        "data.read_budget": 0,
        "data.read_retries": -1,
        "data.read_deadline": 0.0,
        "data.hedge_after": -1.0,
    }
    lines = broken(with_values(base, wrong))
    assert [line.partition(" ")[0] for line in sorted(lines)] == sorted(wrong)
    assert broken(with_values(base, {"data.hedge_after": 0.0})) == []
