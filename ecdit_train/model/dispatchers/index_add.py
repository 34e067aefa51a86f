"""Gather and sum by torch's own indexing: fast; on CUDA sums use atomics, so their last bits change from run to run.

Legend: N tokens, R rows (one token at one expert), D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ecdit_train.config.slots import DispatcherConfig

from ..moe import Dispatcher


@dataclass(frozen=True, kw_only=True)
class IndexAdd(DispatcherConfig):
    """index_select and index_add."""

    same_result: ClassVar[bool] = True

    def build(self) -> IndexAddDispatcher:
        return IndexAddDispatcher(cap=self.cap)


class IndexAddDispatcher(Dispatcher):
    def gather(self, x_ND: Tensor, index_R: Tensor) -> Tensor:
        return x_ND.index_select(0, index_R)

    def sum(self, rows_RD: Tensor, index_R: Tensor, *, num_tokens: int) -> Tensor:
        # In place: index_add would copy the zeros first.
        return rows_RD.new_zeros(num_tokens, rows_RD.shape[-1]).index_add_(0, index_R, rows_RD)
