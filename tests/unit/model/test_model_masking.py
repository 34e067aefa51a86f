"""Masked training: dropped patches do not exist, kept ones carry their positions, ratio 0 is the unmasked path."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from model_worlds import PATCHES, latents, lively, random, text, times

from ecdit_train.config.schema import DiffusionConfig
from ecdit_train.diffusion.flow import Flow
from ecdit_train.model.embed import patchify, unpatchify
from ecdit_train.train.step import Microbatch, forward_backward

CONFIG = DiffusionConfig(prediction="velocity", timestep_mean=0.0, timestep_std=1.0, mask_ratio=0.5, caption_drop=0.3)
KEPT = PATCHES // 2
POSITIONS = torch.tensor([5, 6, 7, 2**33])


def flow(*, kept: int) -> Flow:
    return Flow(config=CONFIG, seed=1, patch=2, num_kept=kept)


def keep_of(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize("router", ["dense", "expert_choice"])
def test_the_order_of_kept_patches_does_not_matter(router):
    """Positions and patches travel together: each patch's output follows it, and the same tokens are selected."""
    dit = lively(router=router)
    keep = flow(kept=KEPT).draw(POSITIONS, shape=(3, 8, 8)).keep_BK
    order = torch.stack([torch.randperm(KEPT, generator=torch.Generator().manual_seed(b)) for b in range(4)])
    shuffled = keep.gather(1, order)
    a, b = (dit(latents(), t_B=times(), text=text(), keep_BK=k, group_tokens=2 * KEPT) for k in (keep, shuffled))
    expected = a.patches_BKP.gather(1, order[:, :, None].expand(-1, -1, 12))
    torch.testing.assert_close(b.patches_BKP, expected, rtol=1e-9, atol=1e-10)

    def chosen(out, kept) -> list[set[tuple[int, int]]]:
        """Patches (image, place in the whole image) that each expert took."""
        return [
            {(i // KEPT, int(kept[i // KEPT, i % KEPT])) for i in row.flatten().tolist()}
            for row in out.assignments[0].index_EGC
        ]

    if router == "expert_choice":
        assert chosen(a, keep) == chosen(b, shuffled)


def test_kept_patches_have_their_own_positions():
    """The same values at two places of the image give two outputs, and attention sees kept patches only."""
    dit = lively(router="dense")
    flat = torch.ones_like(latents())
    out = dit(flat, t_B=times(), text=text(), keep_BK=keep_of(*[[0, 5]] * 4), group_tokens=2).patches_BKP
    assert (out[:, 0] - out[:, 1]).abs().max() > 1e-3
    other = dit(flat, t_B=times(), text=text(), keep_BK=keep_of(*[[0, 9]] * 4), group_tokens=2).patches_BKP
    assert (out[:, 0] - other[:, 0]).abs().max() > 1e-5, "its neighbour moved"


def test_keeping_all_patches_is_the_unmasked_path_bitwise():
    results = []
    for keep in (None, torch.arange(PATCHES).expand(4, -1)):
        dit = lively()
        out = dit(latents(), t_B=times(), text=text(), keep_BK=keep, group_tokens=2 * PATCHES).patches_BKP
        out.square().sum().backward()
        results.append((out, {name: p.grad for name, p in dit.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


class Alone:
    """One process."""

    def accumulate(self, *, last):
        return nullcontext()


def step(x, *, kept: int, router: str = "expert_choice", microbatches: int = 1):
    """Loss and gradients of one training step."""
    dit = lively(router=router)
    words = text()
    size = 4 // microbatches
    parts = [
        Microbatch(
            position_B=POSITIONS[i : i + size],
            latents_BCHW=x[i : i + size],
            features_BLX=words.features_BLX[i : i + size],
            mask_BL=words.mask_BL[i : i + size],
        )
        for i in range(0, 4, size)
    ]
    done = forward_backward(dit, parts, flow=flow(kept=kept), group_tokens=2 * kept, parallel=Alone())
    loss, auxiliary = torch.stack(done.losses).mean(), {k: torch.stack(v).mean() for k, v in done.auxiliary.items()}
    return loss, auxiliary, {name: p.grad for name, p in dit.named_parameters()}


@pytest.mark.parametrize("router", ["dense", "expert_choice", "token_choice"])
def test_dropped_patches_have_no_influence_on_loss_and_gradients_bitwise(router):
    x = latents()
    keep = flow(kept=KEPT).draw(POSITIONS, shape=(3, 8, 8)).keep_BK
    dropped = torch.ones(4, PATCHES, dtype=torch.bool).scatter(1, keep, False)
    patches = patchify(x, patch=2) + 7.0 * dropped[:, :, None] * random(4, PATCHES, 12, seed=4)
    changed = unpatchify(patches, patch=2, side=4)
    assert not torch.equal(changed, x)
    a, b = (step(z, kept=KEPT, router=router) for z in (x, changed))
    assert torch.equal(a[0], b[0])
    assert a[1] == b[1]
    for name, grad in a[2].items():
        assert grad is not None, name
        assert torch.equal(grad, b[2][name]), name
    kept_changed = unpatchify(patchify(x, patch=2) + ~dropped[:, :, None] * 0.1, patch=2, side=4)
    assert not torch.equal(step(kept_changed, kept=KEPT, router=router)[0], a[0])


def test_ratio_zero_trains_as_if_masks_did_not_exist():
    draws = flow(kept=PATCHES).draw(POSITIONS, shape=(3, 8, 8))
    assert draws.keep_BK is None
    masked = flow(kept=KEPT).draw(POSITIONS, shape=(3, 8, 8))
    for field in ("eps_BCHW", "t_B", "drop_B"):
        assert torch.equal(getattr(draws, field), getattr(masked, field)), "no other draw depends on the mask"


def test_microbatches_of_whole_pools_give_the_gradients_of_the_whole_batch():
    whole, halves = step(latents(), kept=KEPT), step(latents(), kept=KEPT, microbatches=2)
    torch.testing.assert_close(whole[0], halves[0], rtol=1e-6, atol=0)
    for name, grad in whole[2].items():
        torch.testing.assert_close(grad, halves[2][name], rtol=1e-5, atol=1e-7, msg=name)
