"""`ecdit compare` and `ecdit report`: what runs say, on the terminal, as files, and live on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ecdit_train import errors
from ecdit_train.drawing import written


def declare(verb: Any, *, config_dir: Any) -> None:
    p = verb(
        "compare",
        compare,
        "compare runs, or those of a sweep: final loss with mean and spread over seeds, the first step at which their logs differ, "
        "what their configurations differ in\n\n"
        "  ecdit compare runs/a runs/b --html compared.html\n"
        "  ecdit compare runs/sweeps/shapes_tiny-20260101-120000",
    )
    p.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="run folders and sweep folders; all are held against the first",
    )
    p.add_argument(
        "--tolerance",
        type=_share,
        default=0.0,
        metavar="X",
        help="relative difference of logged values that does not count (default 0: bit for bit)",
    )
    p.add_argument("--html", metavar="FILE", help="write a self-contained page: curves over each other, and the tables")
    p.add_argument("--png", metavar="FILE", help="write a picture of the main curves")
    p.add_argument("--json", action="store_true", help="print one JSON object")

    p = verb(
        "report",
        report,
        "write RUN/report.html: curves, samples over time, where the experts work, in one self-contained page\n\n"
        "  ecdit report runs/demo\n"
        "  ecdit report runs/demo --serve",
    )
    p.add_argument("runs", nargs="+", metavar="run", help="run folder")
    p.add_argument(
        "--serve",
        action="store_true",
        help="instead, serve the page on 127.0.0.1 until Ctrl-C: it follows the run while it goes on",
    )
    p.add_argument("--port", type=_port, default=0, metavar="N", help="with --serve: its port (default: a free one)")

    p = verb(
        "play",
        play,
        "type a prompt, see the picture come out of noise with the experts' map over it; a page on 127.0.0.1 until Ctrl-C\n\n"
        "  ecdit play runs/demo\n"
        "  ecdit play runs/demo --step 500 --weights raw --port 8000",
    )
    p.add_argument("run", help="run folder, or a pipeline folder of `ecdit ckpt export form=pipeline`")
    p.add_argument("--step", type=_step, metavar="N", help="a committed step (default: the newest)")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default) or raw")
    p.add_argument("--port", type=_port, default=0, metavar="N", help="its port (default: a free one)")
    config_dir(p)


def compare(args: argparse.Namespace) -> int:
    from ecdit_train import comparison

    found = comparison.compared(args.folders, tolerance=args.tolerance)
    print(json.dumps(found.as_json(), indent=2) if args.json else found.text(), flush=True)
    if args.html is None and args.png is None:
        return errors.EXIT_OK
    from ecdit_train.observe import compare_page

    runs = [(run.letter, run.folder.resolve().name, run.folder) for run in found.runs]
    for name, draw in (
        (args.html, partial(compare_page.write_page, told=found.told())),
        (args.png, compare_page.write_picture),
    ):
        if name is not None:
            with written(Path(name), instead="; name another place"):
                print(draw(Path(name), runs=runs), file=sys.stderr)
    return errors.EXIT_OK


def report(args: argparse.Namespace) -> int:
    from ecdit_train.observe.which_run import run_folder

    runs = [run_folder(name) for name in args.runs]  # none is written if one is no run
    if sys.stderr.isatty():
        print(f"reading {', '.join(map(str, runs))} ...", file=sys.stderr, flush=True)
    if args.serve:
        return _serve(runs, port=args.port)
    from ecdit_train.observe.report import write_report
    from ecdit_train.run_folder import REPORT

    for run in runs:
        with written(run / REPORT):
            print(write_report(run))
    return errors.EXIT_OK


def play(args: argparse.Namespace) -> int:
    from ecdit_train.run_folder import RESOLVED

    if not (Path(args.run) / RESOLVED).exists() and not (Path(args.run) / "model_index.json").exists():
        from ecdit_train.observe.which_run import run_folder

        run_folder(args.run)  # says what is there instead
    print(f"reading the weights of {args.run} ...", file=sys.stderr, flush=True)
    try:
        from ecdit_train.opened import open_run
        from ecdit_train.play import Playground

        run = open_run(args.run, step=args.step, weights=args.weights, config_dir=args.config_dir)
        run.read()  # what is wrong with them is said here, not in the page
        ground = Playground(run)
        try:
            with ground.server(port=args.port) as served:
                print(f"{served.url}  (Ctrl-C ends it)\nfrom a machine of your own: {served.tunnel()}", flush=True)
                served.serve_forever()
        finally:
            ground.end()
    except KeyboardInterrupt:
        print()
    return errors.EXIT_OK


def _serve(runs: Sequence[Path], *, port: int) -> int:
    """Until Ctrl-C."""
    try:
        from ecdit_train.observe.serve import server

        with server(runs, port=port) as served:
            print(f"{served.url}  (Ctrl-C ends it)\nfrom a machine of your own: {served.tunnel()}", flush=True)
            served.serve_forever()
    except KeyboardInterrupt:
        print()
    return errors.EXIT_OK


def _step(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a step, 0 or more")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 (a free one) to 65535")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, 0 to 1")
    return value
