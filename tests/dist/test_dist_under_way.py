"""The device refuses a wrong update on all ranks, and hosts that are a step ahead have done no harm."""

from __future__ import annotations

import random

import pytest
from dist_harness import run_distributed
from dist_under_way import reads, spoiled

RUN = ("train.steps=12", "train.global_batch=8", "train.microbatch=2", "checkpoint.every_steps=50", "observe.log_every=50",
       "health.digest_every=0", "optim.ema_decay=0.99")  # fmt: skip
RMSPROP, ADAMW, MUON = "optim=rmsprop", "optim=adamw", "optim=muon"
CASES = {
    "loss": ("loss", (RMSPROP, "parallel.ep=2")),
    "expert-gradient": ("gradient", (RMSPROP, "parallel.ep=4")),
    "auxiliary": ("auxiliary", (ADAMW, "moe=token_choice", "parallel.tp=2", "parallel.ep=2")),
    "muon": ("gradient", (MUON, "parallel.tp=2")),
}


@pytest.mark.parametrize("case", CASES)
def test_one_wrong_number_on_one_rank_of_four_changes_no_bit_anywhere(case, tiny_shards, tmp_path):
    where, words = CASES[case]
    chance = random.Random(case)
    rank, step = chance.randrange(4), chance.randrange(2, 11)
    ranks = run_distributed(4, spoiled, tmp_path, tiny_shards, (*RUN, *words), where, rank, step, timeout=240)[0]
    for found in ranks:
        assert found["code"] == 80, found
        assert found["said"].startswith(f"step {step}, samples {8 * step - 8} to {8 * step - 1}: loss "), found
        assert found["said"].endswith("the update was not applied")
        assert found["unchanged"], (rank, step)
        assert found["step"] == step - 1
        assert found["issued"] == step + 1, "the hosts were a step ahead"
        seen = where != "gradient"
        assert (f"(first seen in the loss of rank {rank}" in found["said"]) == seen, found
    if where == "auxiliary":
        assert any("balance loss inf" in found["said"] for found in ranks), (
            "told by the ranks that share its batch or its part"
        )


def test_nobody_reads_the_device_between_records(tiny_shards, tmp_path):
    """Two ranks that exchange tokens; steps 4 to 9 of whole runs, of which step 5 agrees on stopping."""
    words = (*RUN, RMSPROP, "parallel.ep=2")
    for found in run_distributed(2, reads, tmp_path, tiny_shards, words, 4, 9, timeout=240)[0]:
        assert found == ["numbers", "agree", *["numbers"] * 5]
