"""Same prompts, same seed, same pictures: on one process and on any layout, for any number of prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from dist_harness import run_distributed
from dist_runs import TWO_HEADS, Layout
from dist_sampling import draw, drawn_once
from tiny_runs import configure, live

LAYOUTS = {
    "one": Layout(world=1),
    "dp2": Layout(world=2),
    "tp2": Layout(world=2, words=("parallel.tp=2",)),
    "dp2_ep2": Layout(world=2, words=("parallel.ep=2",)),
}
PROMPTS = ["a red circle", "a blue square", "a green triangle", "a red circle", "a yellow cross"]
ASKED = [("image", PROMPTS[:1]), ("image", PROMPTS[:3]), ("image", PROMPTS), ("group", PROMPTS[:1]),
         ("group", PROMPTS[:3]), ("group", PROMPTS)]  # fmt: skip
"""Two pictures fill a group: fewer prompts than ranks, than pools, and neither even."""


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained")
    assert live(configure(run, tiny_shards, *TWO_HEADS, "optim.lr=3e-3")).finished
    return run


def test_pictures_do_not_depend_on_the_layout(trained, tiny_shards):
    drawn: dict = {}
    for world in (1, 2):
        some = {name: layout for name, layout in LAYOUTS.items() if layout.world == world}
        answers = run_distributed(world, draw, trained, tiny_shards, some, ASKED, timeout=240)
        for answer in answers:  # every rank knows all pictures
            for name, pictures in answer.items():
                for mine, first in zip(pictures, answers[0][name], strict=True):
                    assert all(np.array_equal(a, b) for a, b in zip(mine, first, strict=True))
        drawn |= answers[0]
    worst = 0
    for name, pictures in drawn.items():
        for (scope, prompts), (images, counts), (true, true_counts) in zip(ASKED, pictures, drawn["one"], strict=True):
            assert images.shape == (len(prompts), 16, 16, 3), (name, scope)
            error = int(np.abs(images.astype(int) - true.astype(int)).max())
            assert error <= 1, (name, scope, len(prompts), error)
            worst = max(worst, error)
            assert np.array_equal(counts, true_counts), (name, scope, "another routing")
    print(f"largest difference of a pixel: {worst} of 255")

    # The comparison can fail: other prompts, and the same prompt asked for twice, are other pictures.
    images = drawn["one"][2][0].astype(int)
    assert min(np.abs(images[a] - images[b]).max() for a in range(5) for b in range(a)) > 20
    # A prompt alone is the prompt in company, when pools are images; and the third prompt fills its group with itself.
    assert np.abs(drawn["one"][0][0][0].astype(int) - images[0]).max() <= 1


def test_a_prompts_work_is_done_once_and_weights_are_gathered_once(trained, tiny_shards):
    layouts = {name: layout for name, layout in LAYOUTS.items() if layout.world == 2}
    layouts["bf16"] = Layout(world=2, words=("train.precision=bf16", "parallel.reshard_after_forward=all"))
    for found in run_distributed(2, drawn_once, trained, tiny_shards, layouts, PROMPTS[:3], timeout=240):
        for name, of in found.items():
            assert of["fsdp"] > 0, name
            assert of["equal"], name
            assert of["gathers"][0] == of["gathers"][1] <= of["fsdp"], (name, of)
            assert of["given_back"], name


def ecdit(*words: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "ecdit_train.cli", *words], env=env, capture_output=True, text=True,
                          timeout=240, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done


def test_evaluate_on_two_ranks_is_evaluate_on_one(trained):
    words = ("evaluate", f"run={trained}", "tasks=single_object", "weights=raw")
    path = trained / "evaluation" / "shapes_00000012.json"
    results, said = [], []
    for nproc in ((), ("--nproc", "2")):
        said.append(ecdit(*nproc, *words).stdout)
        results.append(json.loads(path.read_text()))
        path.unlink()
    assert results[0] == results[1]
    assert said[0] == said[1]
    assert said[0].count("single_object") == 1
