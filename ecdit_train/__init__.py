"""Distributed training of expert-choice diffusion transformers (EC-DiT)."""

import importlib
import os
import sys

# `python -m ecdit_train.cli` and torchrun's `-m` put the working directory first in sys.path: a `launch.py`, `torch.py`
# or `wandb/` of the user's would be imported in place of ours or a vendor's. Python's own switch against it is
# PYTHONSAFEPATH, which the processes that ecdit starts carry; this does the same for a command typed by hand.
# argv[0] is "-m" only while the program is looked up, so importing ecdit from a script or a notebook changes nothing.
# A checkout that is not installed stays on the path.
if (
    sys.argv[:1] == ["-m"]
    and not sys.flags.safe_path
    and sys.path[:1] == [os.getcwd()] != [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
):
    del sys.path[0]


def __getattr__(name: str) -> object:
    """`ecdit_train.open_run`, without which nothing here imports torch."""
    if name != "open_run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("ecdit_train.opened").open_run
