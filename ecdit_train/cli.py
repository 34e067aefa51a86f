"""The `ecdit` command: its words and its exit codes. What a verb does is in `verbs`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ecdit_train import (
    arguments,
    checkpoint_verbs,
    dash_verbs,
    data_verbs,
    errors,
    header,
    life_verbs,
    look_verbs,
    submit_verbs,
)
from ecdit_train.allocation_verb import allocation
from ecdit_train.doctor import verb as doctor
from ecdit_train.errors import EcditError, PeerLostError, PeerRefusedError
from ecdit_train.leaving import as_decided
from ecdit_train.study import study_routing
from ecdit_train.supervise.exit_file import leave_exit_code
from ecdit_train.verbs import (
    config_diff,
    config_explain,
    config_keys,
    config_show,
    evaluate,
    multirun,
    plan,
    resume,
    sample,
    show,
    slots,
    train,
)

OVERRIDES = "Hydra words: experiment=NAME, GROUP=CHOICE, section.key=value, +key=value, ~key (see `ecdit config keys`)"

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""What Hydra can print about a composition."""

RANKS = ("train", "resume", "sample", "evaluate", "allocation")
"""Verbs that run on several ranks."""
NEEDS_WORDS = (*RANKS, "launch", "report", "compare", "play", "merge", "study")
"""Verbs that explain themselves when nothing else is said."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb; a user's mistake becomes one line on stderr and its own exit code."""
    parser = make_parser()
    line, after = submit_verbs.split(sys.argv[1:] if argv is None else argv)
    if _bare(line):
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
            parser.parse_args([*line[-1:], "--help"])
        sys.exit(2)
    args, rest = parser.parse_known_args(line)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest  # argparse stops collecting words at the first option
    if (args.nproc or 1) > 1 and not args.ranks:
        parser.error(f"argument --nproc: only for {', '.join(RANKS)}")
    if args.nodes is not None and (args.nproc is None or not args.ranks):
        parser.error(f"argument --nodes: with --nproc (ranks of each node), and only for {', '.join(RANKS)}")
    submit_verbs.read_line(args, after, parser=parser)
    verb = _instead(args, parser)
    if not hasattr(args, "stop_after"):  # a launcher starts ranks with these blocked; training unblocks them itself
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2))
    why = ""
    try:
        if args.nproc is None:
            args.nproc = (
                life_verbs.ranks_for(Path(args.run), args.overrides)
                if verb is resume and "RANK" not in os.environ
                else 1
            )
        if (args.nproc > 1 or args.nodes is not None) and "RANK" not in os.environ and verb is args.verb:
            from launch import place
            from launch.local import run_ranks

            here = None if args.nodes is None else place.find(args.nodes)
            sys.exit(run_ranks(sys.argv[1:] if argv is None else argv, nproc=args.nproc, place=here))
        code = verb(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough, as in `ecdit plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = errors.EXIT_OK
    except Exception as error:
        e = errors.of_disk(error) if isinstance(error, OSError) else error
        if not isinstance(getattr(e, "exit_code", None), int):
            raise
        _tell(e)
        code, why = e.exit_code, f"{type(e).__name__}: {e}"  # type: ignore[attr-defined]
    if code and code != PeerLostError.exit_code:  # the rank that was lost knows better
        leave_exit_code(code, why=why)  # torchrun answers every failure with 1, srun that of a killed task
    sys.exit(code)


def _bare(line: Sequence[str]) -> bool:
    """A verb that does nothing without words, or none at all: its help answers better than a refusal, or than the paper's XL."""
    words = line[2:] if line[:1] == ["--nproc"] and "".join(line[1:2]).strip("0").isdecimal() else line
    return len(line) == 0 or (len(words) == 1 and words[0] in NEEDS_WORDS and "RANK" not in os.environ)


def _instead(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Any:
    """The verb, or what an option puts in its place: a sweep (`-m`), or a look at the composition (`--cfg`, `--info`)."""
    looks = bool(getattr(args, "cfg", None) or getattr(args, "info", None))
    sweeps = getattr(args, "multirun", False)
    if (looks and sweeps) or (getattr(args, "cfg", None) and args.info):
        parser.error("--multirun, --cfg and --info: one of them")
    if not getattr(args, "cfg", None) and (getattr(args, "resolve", False) or getattr(args, "package", None)):
        parser.error("--resolve and --package: only with --cfg")
    if sweeps and "RANK" in os.environ:
        parser.error("--multirun starts ranks itself (--nproc N): not under torchrun")
    return multirun if sweeps else show if looks else args.verb


def _tell(error: Exception) -> None:
    """One line per problem on stderr, once: what all ranks found is told by the first one of each machine."""
    shared = getattr(error, "everywhere", False) and os.environ.get("LOCAL_RANK", "0") != "0"
    if shared or isinstance(error, PeerRefusedError):
        return
    rank = f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""
    for line in str(error).splitlines():
        print(f"ecdit: {type(error).__name__}{rank}: {line}", file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ecdit",
        description="Train, sample, measure and plan EC-DiT: diffusion transformers whose experts choose their tokens.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--nproc",
        type=_ranks,
        metavar="N",
        help=f"run the verb as N ranks on this machine (only {', '.join(RANKS)}; default 1, and for resume as many as the run was "
        "trained on); on a cluster use `ecdit launch`, --nodes or torchrun",
    )
    parser.add_argument(
        "--nodes",
        type=_ranks,
        metavar="N",
        help="this is one of N machines with --nproc ranks each: one task a node of srun, or NODE_RANK, MASTER_ADDR, MASTER_PORT",
    )
    parser.add_argument(
        "--version", action="version", version=f"ecdit {header.version()}", help="print the version and exit"
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=argparse.ArgumentParser)

    def verb(name: str, function: Any, text: str, *, parent: Any = verbs) -> argparse.ArgumentParser:
        p = parent.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        p.set_defaults(verb=function, ranks=name in RANKS)
        return p

    p = verb(
        "train",
        train,
        "train a run from a configuration; goes on where it stopped if the run folder has checkpoints\n\n"
        "  ecdit train experiment=shapes_tiny run=runs/demo train.steps=200\n"
        "  ecdit --nproc 8 train experiment=ec_dit_xl_8e parallel.ep=8 data.shards=/data/shards run=/runs/xl8e\n"
        "  ecdit train -m moe=dense,expert_choice train.seed=1,2 experiment=shapes_tiny train.steps=200",
    )
    _composes(p)
    _stop_after(p)

    p = verb(
        "resume",
        resume,
        "go on with a run from its newest sound checkpoint, on any number of ranks\n\n"
        "  ecdit --nproc 2 resume runs/demo train.steps=2000",
    )
    p.add_argument("run", help="run folder")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="WORD",
        help="changes to layout, schedule or logging; what defines the network, "
        "the data order or the random draws is refused",
    )
    _config_dir(p)
    _stop_after(p)

    life_verbs.declare(verb)

    p = verb(
        "sample",
        sample,
        "draw prompts with a trained run: an image grid with captions\n\n"
        "  ecdit sample run=runs/demo prompts='[a photo of a red circle, a photo of a blue square]'\n"
        "  ecdit sample run=runs/demo prompts=@prompts.txt sample.guidance=3 sample.steps=50 out=grid.png",
    )
    p.add_argument("words", nargs="+", metavar="WORD", help=f"{arguments.forms(arguments.Sample)}, and {DRAWING}")
    _config_dir(p)

    p = verb(
        "evaluate",
        evaluate,
        "grade a run on the coloured-shapes suite with its exact grader\n\n"
        "  ecdit evaluate run=runs/demo tasks=colors repeat=4",
    )
    p.add_argument("words", nargs="+", metavar="WORD", help=f"{arguments.forms(arguments.Evaluate)}, and {DRAWING}")
    _config_dir(p)

    p = verb(
        "allocation",
        allocation,
        "do objects get more experts than the background? the paper's Figure 6 as numbers, by layer and timestep, with spread\n\n"
        "  ecdit allocation run=runs/demo\n"
        "  ecdit allocation run=runs/demo seeds=5 images=256\n"
        "  ecdit allocation run=runs/xl8e pictures=mine     # NAME.png, NAME.mask.png (white: object), NAME.txt",
    )
    p.add_argument("words", nargs="+", metavar="WORD", help=f"{arguments.forms(arguments.Allocation)}, and {DRAWING}")
    _config_dir(p)

    study = parser_group(verbs, "study", "train and measure many small models, and tell what came out")
    p = verb(
        "routing",
        study_routing,
        "every router at equal activated FLOPs, with seeds: a table and a plot; the same command goes on where it was stopped\n\n"
        "  ecdit study routing\n"
        "  ecdit study routing arms='[dense, expert_choice, expert_race]' seeds='[1,2,3]' train.steps=500 out=runs/mine",
        parent=study,
    )
    p.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help=f"{arguments.forms(arguments.RoutingStudy)}; any other word is about the configuration of all runs",
    )
    _config_dir(p)

    _config_dir(checkpoint_verbs.add_merge(verb))

    look_verbs.declare(verb, config_dir=_config_dir)

    p = verb(
        "plan",
        plan,
        "what a run would cost: parameters, memory, traffic, step time, the layout that fits; on a CPU, in seconds\n\n"
        "  ecdit plan experiment=ec_dit_m_64e cluster=h100_ib400 cluster.nodes=8",
    )
    _composes(p)
    p.add_argument("--json", action="store_true", help="print one JSON object (docs/reference/plan-json.md)")
    p.add_argument("--world", type=int, help="ranks (default: cluster.nodes * cluster.gpus_per_node)")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="build and spread the real model on fake ranks, run forward and backward, compare every collective and "
        "the memory with the plan; exit code 1 if one is off by more than a tenth",
    )

    submit_verbs.declare(verb, composes=_composes, words=_words)
    doctor.declare(verb, words=_words)

    p = verb(
        "slots",
        slots,
        "what can fill each slot: routers, experts, encoders, samplers, optimizers ... with each one's keys\n\n"
        "  ecdit slots --config-dir mylab",
    )
    _config_dir(p)

    data_verbs.declare(verb, parser_group(verbs, "data", "make, index, verify and salvage shards"))

    dash_verbs.declare(
        verb, parser_group(verbs, "dash", "dashboards at W&B: bring runs there, and keep what is shown of them")
    )

    config = parser_group(verbs, "config", "show, list and compare configurations")
    p = verb("show", config_show, "print the resolved configuration of some words", parent=config)
    _composes(p)
    p = verb("keys", config_keys, "list every key with its type and how it may change on resume", parent=config)
    _words(p)
    p = verb("explain", config_explain, "what a key means, or what choices a group has", parent=config)
    p.add_argument("key", help="a key or a group")
    _words(p)
    p = verb("diff", config_diff, "what two run folders' configurations differ in", parent=config)
    _config_dir(p)
    p.add_argument("old")
    p.add_argument("new")

    ckpt = parser_group(verbs, "ckpt", "list, verify, compare, export and upcycle checkpoints")
    for p in checkpoint_verbs.add_parsers(ckpt, verb):
        _config_dir(p)
    return parser


DRAWING = "keys of the run's sample and encoders sections (sample.guidance=3)"


def _composes(p: argparse.ArgumentParser) -> None:
    """The arguments of a verb that composes a configuration: Hydra's words and Hydra's options."""
    _words(p)
    p.add_argument("-m", "--multirun", action="store_true", help="one job for each combination of `key=A,B` words")
    p.add_argument("-c", "--cfg", choices=("job", "hydra", "all"), help="print the composed YAML instead of running")
    p.add_argument("--resolve", action="store_true", help="with --cfg: interpolations resolved")
    p.add_argument("-p", "--package", metavar="SECTION", help="with --cfg: only this section")
    p.add_argument(
        "-i", "--info", nargs="?", const="all", choices=INFO, help="print how it is composed instead of running"
    )


def _words(p: argparse.ArgumentParser) -> None:
    p.add_argument("overrides", nargs="*", metavar="WORD", help=OVERRIDES)
    _config_dir(p)


def _config_dir(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "-cd",
        "--config-dir",
        metavar="DIR",
        help="a folder of your own: GROUP/CHOICE.yaml, experiment/NAME.yaml, and the Python modules that they name",
    )


class _Parser(argparse.ArgumentParser):
    """Looks exit codes up when help is asked for: they lie in rooms that a command need not import."""

    def format_help(self) -> str:
        self.epilog = _exit_codes()
        return super().format_help()


def parser_group(verbs: Any, name: str, text: str) -> Any:
    p = verbs.add_parser(name, help=text, description=text)
    return p.add_subparsers(required=True, metavar="VERB")


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _stop_after(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--stop-after",
        type=int,
        metavar="STEP",
        help="save and exit with code 75 after this step, as if Slurm had asked (a drill; the demo uses it)",
    )
    p.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait so long for another job that owns the run folder, instead of being refused (exit code 85)",
    )


def _exit_codes() -> str:
    import data_pipeline.errors
    import launch.submit  # noqa: F401 - defines its own kind

    lines = [
        "exit codes:",
        f"  {errors.EXIT_OK:<4} done",
        "  2    the command line itself cannot be read",
        f"  {errors.EXIT_REQUEUE:<4} stopped on request, everything saved: run again",
    ]
    kinds: list[Any] = [
        *EcditError.__subclasses__(),
        data_pipeline.errors.DataError,
        *data_pipeline.errors.DataError.__subclasses__(),
    ]
    for kind in sorted((kind for kind in kinds if "exit_code" in vars(kind)), key=lambda kind: kind.exit_code):
        lines.append(f"  {kind.exit_code:<4} {kind.__name__}: {(kind.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


program = functools.partial(as_decided, main)

if __name__ == "__main__":
    program()
