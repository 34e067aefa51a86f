"""`python -m ecdit_train.plan.fits`: whether a run fits into its GPUs, for who may not import torch itself (`ecdit launch`).

In: the configuration's tree as JSON on stdin. Out: one line of JSON, {"fits": bool, "verdict": the plan's first line
where it does not fit, "checkpoint_bytes": float}; a ConfigError's lines on stderr and its exit code.
"""

from __future__ import annotations

import json
import sys

from ecdit_train.config.convert import from_dict
from ecdit_train.config.schema import RunConfig
from ecdit_train.config.user_folder import use_folder
from ecdit_train.errors import EcditError

from . import document, plan
from . import parameters as parameters_
from .cost import cost
from .layout import resolve


def answer(cfg: RunConfig) -> dict[str, object]:
    """The search for a layout that fits takes its seconds only where this one does not."""
    layout = resolve(cfg, world=cfg.cluster.nodes * cfg.cluster.gpus_per_node)
    parameters = parameters_.count(cfg.stages()[-1][1])
    fits = cost(cfg, parameters, layout).fits
    return {
        "fits": fits,
        "verdict": None if fits else document.verdict(plan.estimate(cfg)),
        "checkpoint_bytes": plan.checkpoint_bytes(cfg, parameters),
    }


if __name__ == "__main__":
    tree = json.load(sys.stdin)
    try:
        if tree["config_dir"] is not None:
            use_folder(tree["config_dir"])
        print(json.dumps(answer(from_dict(tree))))
    except EcditError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
