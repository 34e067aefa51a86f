"""Run folders of older versions, read as this version would have written them.

`resolved.yaml` says its format since format 2; format 1 (ecdit 0.1, before slots) says nothing. Format 3 has keys that
format 2 had not, format 4 has the sections that keep a run alive, format 5 what a job asks of Slurm and how it comes
back, format 6 how data are read, format 7 how a run is watched, format 8 what a step keeps and when it exchanges: each new
key gets the value that says what the code did before it (`ADDED`); a key that has other values since says so in `CHANGED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecdit_train.config.slots import TARGET
from ecdit_train.errors import RunFolderError

FORMAT = 8
"""What this version writes."""

KEY = "format"

ADDED: Mapping[str, Any] = {
    "model.cross_attention": True,
    "model.modulation": "shared",
    "moe.layers": "even",
    "moe.expert_ratio": None,
    "moe.shared_experts": 0,
    # Since format 4. Bounds on silence are new; they are the defaults, as nothing is lost by them.
    "checkpoint.hours_between_failures": 24.0,
    "checkpoint.save": "blocking",
    "checkpoint.keep_every": 0,
    "checkpoint.keep_best": 0,
    "watch.start": 1800.0,
    "watch.first_step": 1800.0,
    "watch.data": 600.0,
    "watch.step": 300.0,
    "watch.save": 1800.0,
    "watch.show": 1800.0,
    "watch.grace": 600.0,
    "watch.lease": 60.0,
    "health.non_finite": "stop",
    "health.spike": "ignore",
    "health.spike_deviations": 8.0,
    "health.spike_window": 128,
    "health.max_skips": 10,
    "health.max_roll_backs": 3,
    "health.digest_every": 0,
    "validation.images": 0,
    "validation.every_steps": 1000,
    # Since format 5. How often a job comes back by itself is new; nothing is lost by it.
    **{f"cluster.{key}": None for key in ("mem", "exclude", "constraint", "reservation", "dependency", "array")},
    **{f"cluster.{key}": None for key in ("mail_user", "mail_type", "python", "job_python", "interface")},
    **{f"cluster.{key}": [] for key in ("sbatch", "mounts")},
    "data.captions": [],
    "data.caption_weights": [],
    "data.no_caption": "bad",
    "cluster.exclusive": False,
    "cluster.container_kind": "pyxis",
    "cluster.lives_without_progress": 3,
    "cluster.lives": 100,
    "cluster.back_off": [15.0, 60.0, 240.0],
    "cluster.bad_node": "exclude",
    "cluster.preflight_bandwidth": 0.0,
    # Since format 6.
    "data.decoder": {TARGET: "ecdit_train.batches.decoders.Turbo"},
    "data.stages": {TARGET: "ecdit_train.batches.stages.NoStages"},
    "data.order": "exact",
    "data.buckets": {},
    "data.shuffle": 1000,
    "data.allow_pipe": False,
    "data.in_flight": 32,
    "data.read_budget": 2 << 30,
    "data.read_retries": 8,
    "data.read_deadline": 120.0,
    "data.hedge_after": None,
    "data.sources": {},
    "data.keep": [],
    "data.take_down": [],
    "data.manifest": None,
    # Since format 7. Limits that the code had.
    "observe.alerts": {
        "stall_frac": 0.25,
        "slow_steps": 1.5,
        "dead_experts": 1,
        "router_entropy": 0.01,
        "bad_samples": 1,
        "free_checkpoints": 2.0,
        "restarts": 5,
    },
    # Since format 8. How often ranks ask each other is new; nothing is lost by it.
    "moe.form": "plain",
    "parallel.keep": [],
    "parallel.checkpoint_blocks": 1.0,
    "parallel.reduce_gradients": "step",
    "parallel.replicate_experts": False,
    "parallel.exchange": "flat",
    "watch.agree_every": 5,
    **{f"cluster.{key}": 0.0 for key in ("call_latency", "intra_latency", "inter_latency", "peak_fp8_flops")},
    "train.fp8_recipe": "current",
    "train.fp8_backend": "scaled_mm",
}
"""Keys since format 3 and what was there before them."""

CHANGED: Mapping[str, Mapping[Any, Any]] = {
    # Since format 8.
    "parallel.reshard_after_forward": {True: "all", False: "none"},
}
"""Keys whose values have other names since: old -> new."""

ADDED_TO: Mapping[str, Mapping[str, Any]] = {
    "ecdit_train.model.routers.expert_choice.ExpertChoice": {"sees": "modulated", "schedule": []},
    "ecdit_train.model.routers.token_choice.TokenChoice": {"sees": "modulated"},
    "ecdit_train.model.routers.threshold.Threshold": {"sees": "modulated"},
    # Since format 7.
    "ecdit_train.observe.wandb_sink.Wandb": {
        **dict.fromkeys(("entity", "name", "group", "notes")),
        "tags": [],
        "rows": "committed",
    },
    # Since format 8. Not counted before.
    "ecdit_train.diffusion.encoders.stored.StoredText": {"parameters": 0},
    "ecdit_train.diffusion.encoders.stored.StoredLatents": {"parameters": 0},
}
"""The same for keys of classes that fill slots, wherever they do."""

_ROUTERS = {
    "expert_choice": ("ecdit_train.model.routers.expert_choice.ExpertChoice", ("capacity_factor",)),
    "token_choice": (
        "ecdit_train.model.routers.token_choice.TokenChoice",
        ("capacity_factor", "top_k", "balance_weight"),
    ),
}
_DISPATCHERS = {
    "index_add": "ecdit_train.model.dispatchers.index_add.IndexAdd",
    "deterministic": "ecdit_train.model.dispatchers.deterministic.Deterministic",
}
_TEXT = {
    "t5": ("ecdit_train.diffusion.encoders.t5.T5", ("path", "width", "max_tokens", "parameters")),
    "hash": ("ecdit_train.diffusion.encoders.hash_words.HashWords", ("width", "max_tokens")),
    "shards": ("ecdit_train.diffusion.encoders.stored.StoredText", ("width", "max_tokens")),
}
_LATENT = ("path", "channels", "factor", "scale", "shift")
_IMAGE = {
    "kl": ("ecdit_train.diffusion.encoders.kl.KL", (*_LATENT, "parameters")),
    "identity": ("ecdit_train.diffusion.encoders.identity.Identity", ("scale", "shift")),
    "shards": ("ecdit_train.diffusion.encoders.stored.StoredLatents", _LATENT),
}
_OPTIMIZERS = {
    "rmsprop": ("ecdit_train.train.optimizers.rmsprop.RMSProp", ("momentum", "decay", "eps", "weight_decay")),
    "adamw": ("ecdit_train.train.optimizers.adamw.AdamW", ("beta1", "beta2", "eps", "weight_decay")),
}
_SAMPLERS = {
    "euler": ("ecdit_train.diffusion.samplers.euler.Euler", ()),
    "heun": ("ecdit_train.diffusion.samplers.heun.Heun", ()),
}


def upgrade(tree: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The tree in this version's form, without its format number.

    Raises:
        RunFolderError: a newer version wrote it, or it is not what its version wrote.
    """
    tree = dict(tree)
    number = tree.pop(KEY, 1)
    if number == FORMAT:
        return tree
    if number not in range(1, FORMAT):
        raise RunFolderError(
            f"{where} has format {number!r}; this ecdit reads formats 1 to {FORMAT}: use the one that wrote it"
        )
    try:
        return _completed(_from_1(tree) if number == 1 else tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{where} should be of format {number}{', of ecdit 0.1, as it says none' if number == 1 else ''}, "
            f"but does not read as such: {error!r}"
        ) from error


def _from_1(old: dict[str, Any]) -> dict[str, Any]:
    moe, optim, observe = old["moe"], old["optim"], old["observe"]
    dense = moe["router"] == "dense"
    sinks = {}
    if observe["wandb"] != "disabled":
        target = "ecdit_train.observe.wandb_sink.Wandb"
        sinks["wandb"] = {TARGET: target, "mode": observe["wandb"], "project": observe["wandb_project"]}
    return old | {
        "config_dir": None,
        "moe": {
            "router": None if dense else _object(_ROUTERS, moe, by="router"),
            "experts": None if dense else {TARGET: "ecdit_train.model.experts.gelu.Gelu"},
            "dispatcher": None if dense else {TARGET: _DISPATCHERS[moe["combine"]], "cap": None},
            "num_experts": moe["experts"],
            "scope": moe["scope"],
            "group_size": moe["group_size"],
        },
        "sample": old["sample"] | {"sampler": _object(_SAMPLERS, old["sample"], by="sampler")},
        "encoders": {
            "text": _object(_TEXT, old["encoders"]["text"], by="kind"),
            "image": _object(_IMAGE, old["encoders"]["image"], by="kind"),
        },
        "optim": {
            "optimizer": _object(_OPTIMIZERS, optim, by="kind"),
            **{key: optim[key] for key in ("lr", "warmup_steps", "schedule", "clip_norm", "ema_decay")},
        },
        "observe": {key: observe[key] for key in ("log_every", "sample_every", "prompts")} | {"sinks": sinks},
    }


def _completed(old: Any) -> dict[str, Any]:
    """Formats 2 and later gained keys, and other names of values."""
    new = _with_classes_keys(old)
    for key, value in ADDED.items():
        section, _, name = key.rpartition(".")
        new[section] = {name: value, **new.get(section, {})}
    for key, names in CHANGED.items():
        section, _, name = key.rpartition(".")
        new[section] = {**new[section], name: names.get(new[section][name], new[section][name])}
    return new


def _with_classes_keys(tree: Any) -> Any:
    """Every object of a class that ADDED_TO names gets the keys it lacks."""
    if not isinstance(tree, Mapping):
        return tree
    return {**ADDED_TO.get(tree.get(TARGET, ""), {}), **{key: _with_classes_keys(value) for key, value in tree.items()}}


def _object(table: Mapping[str, tuple[str, tuple[str, ...]]], section: Mapping[str, Any], *, by: str) -> dict[str, Any]:
    target, keys = table[section[by]]
    return {TARGET: target, **{key: section[key] for key in keys}}
