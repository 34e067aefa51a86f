"""Everything of a run that must survive: listed here, nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecdit_train.checkpoint.layout import Placed
from ecdit_train.config.schema import OptimConfig
from ecdit_train.errors import ConfigError, Problem
from ecdit_train.model.init import persistent_buffers
from ecdit_train.parallel.context import ParallelContext
from ecdit_train.parallel.owners import Sharding

from .optim import Ema
from .optimizers.blocks import BlockOptimizer


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
    def fresh(cls, model: nn.Module, config: OptimConfig, *, sharding: Sharding | None = None) -> TrainState:
        """`sharding`: where the parameters lie; None: whole in this one process."""
        params = dict(model.named_parameters())
        sharding = sharding or Sharding.whole(params)
        ema = Ema(params, decay=config.ema_decay) if config.ema_decay > 0 else None
        optimizer = config.optimizer.build(params, lr=config.lr, sharding=sharding)
        state = cls(model=model, params=params, optimizer=optimizer, ema=ema)
        wrong = sorted(
            {
                key
                for p in params.values()
                for key, value in state.optimizer.state[p].items()
                if not isinstance(value, Tensor) or (key != "step" and value.shape != p.shape)
            }
        )
        if wrong:
            rule = f"keeps state ({', '.join(wrong)}) that is no tensor of its parameter's shape: it has no place in a checkpoint"
            raise ConfigError(Problem(field="optim.optimizer._target_", value=config.optimizer.target(), rule=rule))
        return state

    def check_names(self, before: Collection[str]) -> None:
        """After the first update: an optimizer that makes its state only then could be saved and not be loaded again."""
        new = sorted({name.partition("/")[0] for name in set(self.tensors()) ^ set(before)})
        if new:
            rule = f"made its state ({', '.join(new)}) at the first update; it must make it when it is built"
            value = type(self.optimizer).__name__
            raise ConfigError(Problem(field="optim.optimizer._target_", value=value, rule=rule))

    @property
    def guarded(self) -> bool:
        """Whether the optimizer heeds `found_inf`, as torch's `GradScaler` asks of those that it need not wait for."""
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def update(self, *, lr: float, refuse: Tensor | None) -> None:
        """Weights, optimizer state and moving average after one more step; gradients are used up. `refuse` (0-dim, on the device):
        unless it is 0, every bit stays. The count of steps is the host's, who knows later: `restore_step`."""
        optimizer, ema = self.optimizer, self.ema
        assert refuse is None or self.guarded
        for group in optimizer.param_groups:
            group["lr"] = lr
        if self.guarded:
            optimizer.found_inf = refuse  # type: ignore[attr-defined]
        joint = isinstance(optimizer, BlockOptimizer) and ema is not None
        if isinstance(optimizer, BlockOptimizer):
            optimizer.average = None if ema is None else ema.beside(self.step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None and not joint:
            ema.update(self.step, refuse=refuse)

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
        return out | {f"buffer/{name}": buffer for name, buffer in persistent_buffers(self.model)}

    def restore_step(self, step: int) -> None:
        """Set the count of updates, also where the optimizer keeps it per parameter."""
        self.step = step
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(step))


def parameter_of(tensor_name: str) -> str:
    """`optim.square_avg/blocks.0.modulation.weight` -> `blocks.0.modulation.weight`."""
    return tensor_name.split("/", 1)[1]


def placed(tensors: Mapping[str, Tensor], parallel: ParallelContext) -> dict[str, Placed]:
    """Tensors named `part/parameter` with the place of the parameter they belong to."""
    return {name: Placed(tensor=t, placement=parallel.placements[parameter_of(name)]) for name, t in tensors.items()}
