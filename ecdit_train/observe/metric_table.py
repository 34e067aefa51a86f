"""Every number that a run logs: its name, unit, reduction and the question that it answers. `docs/reference/metrics.md`
is made from it.

All of them are over every microbatch and every rank of a step, tensor-parallel ranks counted once, and none depends on how
the work was laid out: what is not linear (a maximum, a spread, MaxVio) is computed from sums over the whole step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Reduction = Literal["mean", "max", "sum", "last"]
"""Over the steps of a window, and then over ranks. `last`: the newest step; a tensor is averaged over ranks, a float is
kept (it is equal on all ranks)."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    unit: str
    reduction: Reduction
    question: str
    """What a reader learns from it."""

    def __str__(self) -> str:
        return f"{self.question} [{self.unit}; {self.reduction}]"


def _metric(unit: str, reduction: Reduction, question: str) -> Metric:
    return Metric(unit=unit, reduction=reduction, question=question)


def _moe(name: str, unit: str, reduction: Reduction, question: str, *, over_layers: str = "mean") -> dict[str, Metric]:
    """A number of every sparse layer, and the same over layers."""
    return {
        f"moe/{name}": _metric(unit, reduction, question),
        f"moe/L{{n}}/{name}": _metric(
            unit, reduction, f"The same of layer n; `moe/{name}` is the {over_layers} over layers."
        ),
    }


METRICS: dict[str, Metric] = {
    # train/
    "train/loss": _metric(
        "latent units^2", "mean", "Is it learning? Mean squared error of the prediction at kept patches."
    ),
    "train/balance_loss": _metric("1", "mean", "Token choice only: how uneven are the experts, weight included?"),
    "train/{name}_loss": _metric("1", "mean", "An auxiliary loss of a router (`Assignment.losses`), weight included."),
    "train/images": _metric("images", "last", "How many images has the run seen?"),
    # optim/
    "optim/lr": _metric("1", "last", "Which learning rate is in force?"),
    "optim/grad_norm": _metric(
        "1", "mean", "How large is the global gradient before clipping? Spikes come before trouble."
    ),
    "optim/grad_norm_max": _metric("1", "max", "Was there a spike between two log steps?"),
    "optim/clipped_frac": _metric(
        "share of steps", "mean", "How often did clipping act? Near 1: the limit sets the step."
    ),
    # moe/: of the whole log step.
    **_moe("dropped_frac", "share of tokens", "mean", "How many tokens does no expert of a layer take?"),
    "moe/dropped_everywhere_frac": _metric(
        "share of tokens", "mean", "How many tokens does no expert of any layer take?"
    ),
    **_moe(
        "experts_per_token_std",
        "experts",
        "mean",
        "How unevenly is compute spread over tokens? (the mean is f_c by construction)",
    ),
    **_moe(
        "experts_per_token_max",
        "experts",
        "max",
        "What is the largest compute that one token gets?",
        over_layers="largest",
    ),
    "moe/experts_per_token_t{b}": _metric(
        "experts",
        "mean",
        "On which timesteps is compute spent? Mean over layers and the tokens of images with t in [b/10, (b+1)/10); 0 is noise.",
    ),
    **_moe("entropy", "share of log E", "mean", "How undecided is the router? 1: uniform over experts, 0: certain."),
    **_moe("gate_mean", "1", "mean", "With what weight do experts enter? Near 1/E: the router has not specialised."),
    **_moe(
        "max_violation",
        "share of mean load",
        "mean",
        "By how much is the busiest expert of a layer over the mean load (MaxVio), loads counted over the whole step? 0: loads are "
        "equal, as in expert choice.",
    ),
    **_moe(
        "load_cv",
        "std / mean",
        "mean",
        "Routers whose experts' loads vary only: how unequal are loads over the whole step? 0: equal.",
    ),
    **_moe(
        "combination_usage",
        "share of pairs",
        "mean",
        "How many pairs of experts cover 95 % of all that work on one token, over the whole step? Near 0: collapse.",
    ),
    **_moe(
        "dead_experts",
        "experts",
        "mean",
        "How many experts' gates add up to less than a tenth of the layer's mean, over the whole step? Next to nothing of what "
        "they compute enters; loads are no sign of it under expert choice, where they are equal.",
        over_layers="sum",
    ),
    **_moe(
        "edge_margin",
        "difference / sum",
        "mean",
        "How far is the last token that an expert takes of a group from the first that it refuses, in affinity? Near 0: rounding "
        "decides. Below 0: the router does not rank tokens by expert (token choice).",
    ),
    **_moe(
        "expert_similarity",
        "cosine",
        "mean",
        "How alike are two experts to the router? Mean over pairs of the cosine of its columns. Near 1: they take the same tokens.",
    ),
    **_moe(
        "expert_similarity_max",
        "cosine",
        "max",
        "How alike are the two most similar experts of a layer?",
        over_layers="largest",
    ),
    **_moe(
        "expert_timestep_std",
        "t",
        "mean",
        "Do experts share out the timesteps? Spread over experts of the mean timestep of their tokens; 0: each works on all alike.",
    ),
    **_moe("overflow_frac", "share of choices", "mean", "Token choice only: how many choices found their expert full?"),
    **_moe(
        "capped_frac",
        "share of rows",
        "mean",
        "Routers of varying load under a static cap only: how many rows are beyond it and dropped?",
    ),
    "moe/predictor_accuracy": _metric(
        "share of choices", "mean", "DiffMoE only: how much of the selection does its predictor foresee?"
    ),
    "moe/predicted_experts_per_token": _metric(
        "experts",
        "mean",
        "DiffMoE only: what would drawing take of these tokens? The budget is moe.router.capacity_factor.",
    ),
    "moe/{name}": _metric(
        "the router's", "mean", "What a router reports of itself (`Assignment.metrics`), over layers."
    ),
    "moe/{name}_max": _metric("the router's", "max", "The same, where the name ends in _max."),
    "moe/L{n}/{name}": _metric("the router's", "mean", "What the router of layer n reports of itself."),
    "moe/L{n}/{name}_max": _metric("the router's", "max", "The same, where the name ends in _max."),
    # diffusion/
    "diffusion/loss_t{b}": _metric(
        "latent units^2",
        "mean",
        "At which timesteps does it learn? `train/loss` of the images with t in [b/10, (b+1)/10); 0 is noise, 1 is data.",
    ),
    "diffusion/images_t{b}": _metric(
        "images", "sum", "How many images is that the mean of? Where the timestep distribution puts its weight."
    ),
    # perf/: wall time of the window without pauses (checkpoints, samples).
    "perf/images_per_s": _metric("images/s, all ranks", "mean", "How fast is it?"),
    "perf/tokens_per_s": _metric("tokens/s, all ranks", "mean", "How fast is it, whatever resolution and mask ratio?"),
    "perf/step_s": _metric("s", "mean", "How long does an optimizer step take?"),
    "perf/mfu": _metric(
        "share of peak", "mean", "How much of the GPUs' peak does model arithmetic use? Absent on CPU."
    ),
    "perf/mfu_of_plan": _metric(
        "share of the plan's", "mean", "Is the run as fast as `ecdit plan` foresaw? 1: exactly. Absent on CPU."
    ),
    "perf/goodput": _metric(
        "share of time",
        "last",
        "How much of this life's time, from the process's start, went into steps that count? The rest loaded, waited, saved, drew, "
        "measured or was rolled back. `ecdit status` says it over all lives.",
    ),
    "perf/time/{phase}": _metric(
        "s per step",
        "mean",
        "Where does the time of a step go? Pauses are spread over the steps since the last record. On CUDA the device's own time "
        "between two events on its stream. Mean over ranks; phases as in `ecdit status`: data, encode, forward, "
        "backward, exchange (gradients' norm and the agreement on the step), optimizer, log, validate, show, save.",
    ),
    "perf/slowest/{phase}": _metric(
        "s per step",
        "max",
        "Does one rank hold up the others? data and encode of the slowest rank; far above `perf/time/{phase}`: look at its node. "
        "In the other phases ranks wait for each other, and the slowest is the one that waits least.",
    ),
    "perf/time/expert_exchange": _metric(
        "s per step",
        "mean",
        "How much of forward and backward are the experts' all-to-alls, waits for other ranks included? Only where they can be "
        "told apart: with `parallel.ep`, a fixed number of rows and no `parallel.overlap_chunks`.",
    ),
    "perf/node{i}/cpu_frac": _metric(
        "share of time",
        "last",
        "Are processors the limit? How much of node i's the machine used since the last record.",
    ),
    "perf/node{i}/gpu_frac": _metric(
        "share of time",
        "last",
        "Is a node's GPU idle? Share of the driver's last sample in which a kernel ran; mean over node i's GPUs. Not how well it "
        "is used: that is `perf/mfu`. Absent on CPU.",
    ),
    **{
        f"perf/nodes/{name}_{{name}}": _metric(
            "share of time", "last", f"In place of `perf/node{{i}}/{name}` with more than 64 nodes: min, mean, max."
        )
        for name in ("cpu_frac", "gpu_frac")
    },
    # mem/: of the fullest rank.
    "mem/allocated_gib": _metric(
        "GiB", "max", "How close to the end of device memory? Largest so far that tensors took. Absent on CPU."
    ),
    "mem/reserved_gib": _metric(
        "GiB",
        "max",
        "How much device memory does the allocator hold? Far above `mem/allocated_gib`: fragments. Absent on CPU.",
    ),
    "mem/retries": _metric(
        "times", "max", "How often had the allocator to empty its cache to go on? Each costs a wait. Absent on CPU."
    ),
    "mem/host_rss_gib": _metric("GiB", "max", "Does a rank's process grow on its host? What it has in memory now."),
    "mem/node{i}/host_gib": _metric(
        "GiB", "last", "Is a node about to run out? Memory in use on node i, by whomever; numbers, as names stay here."
    ),
    "mem/node{i}/gpu_gib": _metric("GiB", "last", "The same of device memory: mean over node i's GPUs. Absent on CPU."),
    **{
        f"mem/nodes/{name}_{{name}}": _metric(
            "GiB", "last", f"In place of `mem/node{{i}}/{name}` with more than 64 nodes: min, mean, max."
        )
        for name in ("host_gib", "gpu_gib")
    },
    # data/
    "data/stall_frac": _metric(
        "share of time", "mean", "How long do ranks wait for the loader? Above a few percent, feed more."
    ),
    "data/substituted": _metric("samples", "sum", "How many unreadable samples were replaced since the last log step?"),
    "data/skipped": _metric(
        "samples",
        "sum",
        "How many samples without a caption were replaced since the last log step (`data.no_caption=skip`)?",
    ),
    "data/uncaptioned": _metric(
        "samples", "sum", "How many were trained on without text since then, as they have no caption (`unconditional`)?"
    ),
    "data/passed_over": _metric(
        "samples", "sum", "How many samples stand in for ones that were taken down (`data.take_down`) since then?"
    ),
    "data/bad/{kind}": _metric(
        "samples",
        "sum",
        "The substituted samples by kind of error; together they are `data/substituted`. Absent when 0.",
    ),
    "data/epochs": _metric(
        "passes", "last", "How often has the run been through its data? Absent where nobody can say."
    ),
    "data/source/{name}/epochs": _metric("passes", "last", "Mixtures only: the same for each source."),
    "data/left_out": _metric(
        "samples",
        "last",
        "How many samples does an epoch leave out, as they fill no global batch? Others in each epoch.",
    ),
    # data/loader/: this process's own, over all ranks; prefetched samples included, so they are not repeated by a resume.
    "data/loader/samples_per_s": _metric(
        "samples/s, all ranks", "sum", "How many samples did training take, pauses left out?"
    ),
    "data/loader/samples": _metric("samples", "sum", "How many samples were delivered since the last log step?"),
    "data/loader/bytes_read": _metric("bytes", "sum", "How many bytes of samples were read since then?"),
    "data/loader/bytes_fetched": _metric(
        "bytes",
        "sum",
        "How many came from an object store? Far above `data/loader/bytes_read`: ranges hold what nobody wants.",
    ),
    "data/loader/read_retries": _metric(
        "reads", "sum", "How many reads had to be repeated? A disk or a store is in trouble."
    ),
    "data/loader/hedged": _metric(
        "ranges", "sum", "How many ranges were asked for twice, as the first answer was slow?"
    ),
    "data/loader/decoder_fallbacks": _metric("calls", "sum", "How often did the reference take over from DALI?"),
    "data/loader/steps_ready": _metric(
        "steps", "mean", "How many steps lie ready when training asks for one? At `data.prefetch` loading is faster."
    ),
    "data/loader/steps_late_max": _metric(
        "steps",
        "max",
        "How many of the prefetched steps were missing at worst, on any rank? All of them: somebody waited.",
    ),
    # reliability/: only in runs where it happened.
    "reliability/skipped": _metric(
        "updates", "last", "How many updates were left out? Their samples are in the log and in the checkpoints."
    ),
    "reliability/roll_backs": _metric("times", "last", "How often did the run go back to a checkpoint by itself?"),
    # eval/: at fixed draws on the held-out images (`validation.images`).
    "eval/loss": _metric("latent units^2", "last", "Does it learn more than its training images?"),
    "eval/loss_ema": _metric("latent units^2", "last", "The same with the averaged weights, with which it draws."),
    "eval/loss_t{b}": _metric(
        "latent units^2",
        "last",
        "At which timesteps does it generalise? `eval/loss` of the held-out images that are drawn with t in [b/10, (b+1)/10).",
    ),
    "eval/loss_ema_t{b}": _metric("latent units^2", "last", "The same with the averaged weights."),
    "eval/selection_drift": _metric(
        "share of choices",
        "last",
        "Has routing settled? Of all choices (token, expert) on one batch of held-out images, always with the same noise and "
        "timesteps, the share that is not what it was at the measurement before; over layers. 0: nothing moved, 1: no choice "
        "stayed. Absent at a life's first measurement.",
    ),
    "eval/L{n}/selection_drift": _metric("share of choices", "last", "The same of layer n."),
    "eval/substituted": _metric(
        "samples",
        "last",
        "How many held-out images could not be read? Others stood in; above 0 the loss is not comparable.",
    ),
    # samples/: in the record after pictures were drawn.
    "samples/draw_s": _metric("s", "last", "How long did training wait for the newest sample pictures?"),
    # ckpt/: in the records after a save; this life's own.
    "ckpt/step": _metric("step", "last", "Up to where can nothing be lost? The newest committed step."),
    "ckpt/age_s": _metric(
        "s", "last", "How much time would be lost now? Since the newest commit of this life, or since its start."
    ),
    "ckpt/blocked_s": _metric("s", "last", "How long did training wait for the newest save?"),
    "ckpt/save_s": _metric("s", "last", "How long did it take from the request to the commit?"),
    "ckpt/interval": _metric(
        "steps", "last", "How far apart are saves? Only with `checkpoint.every_steps: null`, which derives it."
    ),
    "ckpt/failed": _metric("saves", "last", "How many saves in a row has the disk refused?"),
}
"""Every name that a training run logs. `{n}` stands for a layer number, `{i}` for a node's, `{b}` for a tenth of the
timesteps, 0 to 9."""


RENAMED = {"loader/": "data/loader/", "validation/": "eval/", "perf/memory_gib": "mem/allocated_gib"}
"""How names began in the logs of earlier versions, and how they do now."""


def current_names(record: dict[str, Any]) -> dict[str, Any]:
    """A record of any version, with today's names."""
    starts = tuple(RENAMED)
    if not any(name.startswith(starts) for name in record):
        return record
    return {_current(name): value for name, value in record.items()}


def _current(name: str) -> str:
    old = next((old for old in RENAMED if name.startswith(old)), "")
    return RENAMED[old] + name.removeprefix(old) if old else name


def metric_key(name: str) -> str:
    """The key of METRICS that describes a logged name: `moe/L2/entropy` -> `moe/L{n}/entropy`; what a router of one's own
    reports falls under the entries with `{name}`."""
    key = re.sub(r"/L\d+/", "/L{n}/", name)
    key = re.sub(r"/node\d+/", "/node{i}/", key)
    key = re.sub(r"^(\w+/nodes/\w+)_(min|mean|max)$", r"\1_{name}", key)
    key = re.sub(r"_t\d$", "_t{b}", key)
    key = key if key in METRICS else re.sub(r"^perf/(time|slowest)/\w+$", r"perf/\1/{phase}", key)
    key = re.sub(r"^data/bad/\w+$", "data/bad/{kind}", key)
    key = re.sub(r"^data/source/[\w-]+/", "data/source/{name}/", key)
    if key in METRICS:
        return key
    room, _, rest = key.rpartition("/")
    end = next((end for end in ("_max", "_loss") if rest.endswith(end)), "")
    own = f"{room}/{{name}}{end}"
    return own if own in METRICS else key


def undocumented(record: Mapping[str, object]) -> set[str]:
    """Names of a record that METRICS does not describe."""
    return {name for name in record if metric_key(name) not in METRICS}
