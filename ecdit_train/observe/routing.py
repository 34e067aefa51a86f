"""Who got how much compute, patch by patch: maps for pictures (`routing_scalars.py`: numbers for curves).

Legend: G routing groups, S tokens of a group, E experts, C capacity, N tokens of the call (G * S), B images, K patches
the network saw of each, L sparse layers, T timesteps.

Everything up to `RoutingMaps` stays on the device and waits for nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecdit_train import atomic
from ecdit_train.errors import RunFolderError
from ecdit_train.model.assignment import Assignment, chosen, experts_per_token

from .routing_scalars import overload, pairs_needed


def max_violation(chosen_NE: Tensor) -> Tensor:
    """`routing_scalars.overload` of who was chosen by whom."""
    return torch.tensor(overload(chosen_NE.sum(0).cpu().numpy()))


def combination_usage(chosen_NE: Tensor) -> Tensor:
    """`routing_scalars.pairs_needed` of who was chosen by whom."""
    E = chosen_NE.shape[1]
    together_EE = (chosen_NE.t() @ chosen_NE).cpu().numpy()
    return torch.tensor(pairs_needed(together_EE[np.triu_indices(E, 1)]))


def count_maps(assignments: Sequence[Assignment], *, batch: int, side: int, keep: Tensor | None = None) -> Tensor:
    """Experts per patch: (L, B, side, side) int64, summing to E * C * G in every layer of expert choice.

    `batch`: images of the call (with guidance, both halves: slice them afterwards). `keep`: (B, K) patches the network
    saw, in the order of its tokens; the others are 0.
    """
    counts_LN = torch.stack([experts_per_token(a).flatten() for a in assignments])
    return _on_canvas(counts_LN, batch=batch, side=side, keep=keep)


def expert_maps(assignments: Sequence[Assignment], *, batch: int, side: int) -> Tensor:
    """Which experts took each patch: (L, B, side, side, ceil(E / 8)) uint8, expert e in bit e % 8 of byte e // 8."""
    chosen_LNE = torch.stack([chosen(a) for a in assignments]) > 0
    L, N, E = chosen_LNE.shape
    bits = torch.zeros(L, N, -(-E // 8) * 8, dtype=torch.uint8, device=chosen_LNE.device)
    bits[..., :E] = chosen_LNE
    weight = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    packed_LNb = (bits.unflatten(-1, (-1, 8)) * weight).sum(-1, dtype=torch.uint8)
    assert batch * side * side == N, f"{N} tokens do not fill {batch} times {side} x {side}"
    return packed_LNb.unflatten(1, (batch, side, side))


def _on_canvas(values_LN: Tensor, *, batch: int, side: int, keep: Tensor | None) -> Tensor:
    values_LBK = values_LN.unflatten(1, (batch, -1))
    if keep is not None:
        canvas = values_LBK.new_zeros(len(values_LBK), batch, side * side)
        values_LBK = canvas.scatter(2, keep.expand(len(values_LBK), -1, -1), values_LBK)
    assert values_LBK.shape[-1] == side * side, f"{values_LBK.shape[-1]} tokens per image do not fill {side} x {side}"
    return values_LBK.unflatten(-1, (side, side))


_META = ("prompts", "layers", "scope", "group_size", "experts", "capacity_factor", "step")


@dataclass(frozen=True, kw_only=True)
class RoutingMaps:
    """Compute per patch of a few pictures while they were drawn: the data behind the paper's Figure 6."""

    counts: np.ndarray
    """(T, L, B, side, side) uint8: experts per patch."""
    timesteps: np.ndarray
    """(T,) float32; 0 is noise, 1 is data."""
    layers: tuple[int, ...]
    """Block numbers counted from 1."""
    prompts: tuple[str, ...]
    images: np.ndarray
    """(B, H, W, 3) uint8: the finished pictures."""
    scope: str
    """Routing group while sampling: group, image or batch."""
    group_size: int
    """Tokens of a group when scope is `group`."""
    experts: int
    capacity_factor: float
    """f_c, the mean of every map when routing is expert choice."""
    step: int
    """Training step of the weights."""
    chosen: np.ndarray | None = None
    """(T, L, B, side, side, ceil(E / 8)) uint8: `expert_maps`. None in files of older runs."""

    def __post_init__(self) -> None:
        T, L, B = self.counts.shape[:3]
        assert self.counts.ndim == 5, self.counts.shape
        assert (self.counts.dtype, self.images.dtype) == (np.uint8, np.uint8)
        assert (len(self.timesteps), len(self.layers), len(self.prompts)) == (T, L, B)
        assert (self.images.shape[0], *self.images.shape[3:]) == (B, 3), self.images.shape
        if self.chosen is not None:
            whole = (*self.counts.shape, -(-self.experts // 8))
            assert (self.chosen.shape, self.chosen.dtype) == (whole, np.uint8), (self.chosen.shape, self.chosen.dtype)

    @property
    def experts_per_token(self) -> float:
        """What drawing spent on these maps (the captioned half, a few timesteps): `capacity_factor` is what it should be. Routers
        with a threshold or a predictor are right on average only."""
        return float(self.counts.mean())

    def experts_at(self, t: int, *, layer: int, image: int) -> np.ndarray:
        """(side, side, E) bool: who took each patch. Indices into timesteps, layers and prompts; needs `chosen`."""
        assert self.chosen is not None, "this file counts experts but does not name them"
        bits = np.unpackbits(self.chosen[t, layer, image], axis=-1, bitorder="little")
        return bits[..., : self.experts].astype(bool)

    def caption(self) -> str:
        """Everything that a heatmap cannot be read without."""
        group = f"groups of {self.group_size} tokens" if self.scope == "group" else f"one group per {self.scope}"
        return f"step {self.step:,}, {self.experts} experts, f_c = {self.capacity_factor:g}, {group}"

    def save(self, path: Path) -> None:
        """One .npz without pickle, replaced atomically."""
        meta = {name: getattr(self, name) for name in _META}
        arrays = {"counts": self.counts, "timesteps": self.timesteps.astype(np.float32), "images": self.images}
        if self.chosen is not None:
            arrays["chosen"] = self.chosen
        buffer = io.BytesIO()
        np.savez_compressed(buffer, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
        atomic.write(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> RoutingMaps:
        """Raises RunFolderError for a missing or damaged file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(file["meta"].tobytes())
                names = ("counts", "timesteps", "images", *(["chosen"] if "chosen" in file.files else []))
                arrays: dict[str, Any] = {name: file[name] for name in names}
                values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta.items()}
                return cls(**arrays, **values)
        except Exception as error:  # zip, deflate, header and array: bytes that were hit may raise anything
            raise RunFolderError(f"{path}: not a file of routing maps ({type(error).__name__}: {error})") from error
