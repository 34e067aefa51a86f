"""Gather, and the gated sum by token, as Triton kernels (`ecdit_train.kernels.rows`); on CPUs and in fp64 their twins in torch.

Bitwise reproducible as `deterministic` is, with less traffic: the gate is applied where rows are summed, in fp32, so no
weighted copy of the rows is written, and the backward makes the rows' and the gates' gradients in one pass.

Legend: N tokens, R rows (one token at one expert), D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ecdit_train.config.slots import DispatcherConfig
from ecdit_train.kernels import language
from ecdit_train.kernels.rows import Gather, Sum, Weigh, list_rows

from ..moe import Dispatcher


@dataclass(frozen=True, kw_only=True)
class Triton(DispatcherConfig):
    """Sums in a fixed order, by fused kernels on CUDA."""

    same_result: ClassVar[bool] = True

    def build(self) -> TritonDispatcher:
        language.require(field="moe.dispatcher", value="triton", nearest="deterministic")
        return TritonDispatcher(cap=self.cap)


class TritonDispatcher(Dispatcher):
    def gather(self, x_ND: Tensor, index_R: Tensor) -> Tensor:
        return Gather.apply(x_ND, index_R)

    def sum(self, rows_RD: Tensor, index_R: Tensor, *, num_tokens: int) -> Tensor:
        return Sum.apply(rows_RD, index_R, list_rows(index_R, num_tokens=num_tokens))

    def weigh(self, y_RD: Tensor, gate_R: Tensor, index_R: Tensor, *, num_tokens: int) -> Tensor:
        return Weigh.apply(y_RD, gate_R, index_R, list_rows(index_R, num_tokens=num_tokens))
