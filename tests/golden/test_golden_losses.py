"""Twenty steps of a tiny run, loss by loss, for each router.

Twice in one process the losses are equal bit for bit. Against the stored file they are equal to `GROWTH` times the
number of steps: the last bits depend on the machine (vector and matrix units, cache sizes, the libraries' choice of
kernels), which two machines of the same processor number do not share, and what they differ by grows with training.
"""

from __future__ import annotations

import pytest
import torch
from tiny_runs import ROUTERS, configure, live, records

STEPS = 20
FILE = "losses/tiny.txt"
GROWTH = 2e-6  # relative, per step; two machines of one processor number differed by at most 5e-6 at step 14
CLOSE_CALLS = {"expert_race": 2e-4, "nucleus": 2e-4}
"""From step 5 on, of routers by which all tokens of a batch compete, or a cut lies anywhere in a sum: on another
maker's processor a last bit decided otherwise about one token at step 5 or 6, and losses were 5e-5 a step apart."""
CALM = 4


def losses(run, shards, *extra: str) -> list[float]:
    steps = (f"train.steps={STEPS}", "checkpoint.every_steps=100")
    assert live(configure(run, shards, *steps, *extra)).finished
    return [line["train/loss"] for line in records(run)]


@pytest.mark.parametrize("router", ROUTERS)
def test_losses(router, tiny_shards, tmp_path, golden, stored, update):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = (losses(tmp_path / name, tiny_shards, *ROUTERS[router]) for name in ("a", "b"))
    finally:
        torch.set_num_threads(threads)
    assert first == second
    if update:
        golden(FILE, section=router, text="\n".join(map(repr, first)))
        return
    expected = [float(line) for line in stored(FILE, router).split()]
    assert len(first) == len(expected) == STEPS
    for step, (loss, wanted) in enumerate(zip(first, expected, strict=True), 1):
        growth = GROWTH if step <= CALM else CLOSE_CALLS.get(router, GROWTH)
        assert loss == pytest.approx(wanted, rel=growth * step), f"step {step} of {router}"
