"""Everything of a run that must survive: listed here, nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecdit_train.config.schema import OptimConfig

from .optim import Ema


@dataclass(kw_only=True)
class TrainState:
    """The model with its buffers, what the optimizer remembers, the moving average and how many updates were made.

    The data position is the loader's own state; random numbers have no state.
    """

    model: nn.Module
    params: dict[str, nn.Parameter]
    """As the optimizer knows them. Never ask the model again: while FSDP has gathered a module, it names others."""
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0

    @classmethod
    def fresh(cls, model: nn.Module, config: OptimConfig) -> TrainState:
        params = dict(model.named_parameters())
        ema = Ema(params, decay=config.ema_decay) if config.ema_decay > 0 else None
        return cls(model=model, params=params, optimizer=config.optimizer.build(params, lr=config.lr), ema=ema)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor to save or to load in place, by `part/parameter` name. Shards stay shards."""
        out: dict[str, Tensor] = {}
        for name, p in self.params.items():
            out[f"model/{name}"] = p.detach()
            for key, value in self.optimizer.state[p].items():
                if key != "step":
                    out[f"optim.{key}/{name}"] = value
            if self.ema is not None:
                out[f"ema/{name}"] = self.ema.shadow[name]
        return out | {f"buffer/{name}": buffer for name, buffer in self.model.named_buffers()}

    def restore_step(self, step: int) -> None:
        """Set the count of updates, also where the optimizer keeps it per parameter."""
        self.step = step
        for state in self.optimizer.state.values():
            state["step"].fill_(float(step))


def parameter_of(tensor_name: str) -> str:
    """`optim.square_avg/blocks.0.modulation.weight` -> `blocks.0.modulation.weight`."""
    return tensor_name.split("/", 1)[1]
