"""One rank of a preset on one device: torch's fake process group answers for the others at once, with this rank's own values.

So shapes, kernels and memory are those of the real rank, messages cost a copy in this device's memory instead of a network, and
what is timed is what remains when all communication is hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ecdit_train.config.compose import compose
from ecdit_train.config.schema import RunConfig
from ecdit_train.errors import ConfigError
from ecdit_train.model.block import Block
from ecdit_train.model.dit import DiT
from ecdit_train.model.moe import MoE
from ecdit_train.parallel.compiling import apply_compile
from ecdit_train.parallel.expert_parallel import apply_expert_parallel
from ecdit_train.parallel.low_precision import Fp8, apply_fp8, check_device
from ecdit_train.parallel.mesh import Mesh, make_mesh
from ecdit_train.parallel.runtime import Runtime
from ecdit_train.parallel.tensor_parallel import apply_tensor_parallel

from .device import Device
from .record import Skipped

PRESETS = ("ec_dit_xl_8e", "ec_dit_3xl_32e", "ec_dit_m_64e")
"""8, 64 and 64 GPUs."""
LAYOUTS = {
    "ec_dit_3xl_32e, ep8": ("experiment=ec_dit_3xl_32e", "parallel=ep8"),
    "ec_dit_m_64e, ep64": ("experiment=ec_dit_m_64e", "parallel=ep64"),
}
"""The fewest and the most rows that an expert of the large presets meets, for the layer alone."""

SMALL = (
    *("model.layers=2", "model.width=64", "model.heads=1", "model.text_width=64", "model.text_refiner_layers=1"),
    *("encoders.text.width=32", "encoders.text.max_tokens=8", "data.resolution=16", "moe.num_experts=4"),
    *("moe.group_size=16", "train.global_batch=16", "train.microbatch=4", "train.precision=bf16", "train.steps=10"),
    *("parallel.ep=4", "parallel.overlap_chunks=2", "optim.warmup_steps=1"),
)
"""The demo, made smaller, on four ranks: what tests run."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    name: str
    words: tuple[str, ...]
    world: int

    def config(self, *extra: str) -> RunConfig:
        return compose([*self.words, *extra], local=False)


def presets(device: Device) -> list[Preset]:
    if not device.cuda:
        return [Preset(name="small", words=("experiment=shapes_tiny", *SMALL), world=4)]
    return [_preset(name, (f"experiment={name}",)) for name in PRESETS]


def layouts(device: Device) -> list[Preset]:
    """The presets, and their large ones spread otherwise."""
    others = [_preset(name, words) for name, words in LAYOUTS.items()] if device.cuda else []
    return [*presets(device), *others]


def _preset(name: str, words: tuple[str, ...]) -> Preset:
    cluster = compose(list(words), local=False).cluster
    return Preset(name=name, words=words, world=cluster.nodes * cluster.gpus_per_node)


def with_words(preset: Preset, words: Sequence[str]) -> RunConfig:
    """Raises Skipped where this version of ecdit does not know a word."""
    try:
        return preset.config(*words)
    except ConfigError as why:
        raise Skipped(f"{' '.join(words)}: {str(why).splitlines()[0]}") from why


@contextlib.contextmanager
def fake_world(world: int) -> Iterator[None]:
    """A process group in which nobody else is there. Owns the process's groups."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("one rank of many needs the process group to itself")
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_zero(device: Device, *, world: int) -> Runtime:
    return Runtime(rank=0, world=world, local_rank=0, device=torch.device(device.kind), control=None)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Two blocks of a preset as rank 0 holds them when FSDP has gathered them: bf16, routers in fp32."""

    config: RunConfig
    mesh: Mesh
    blocks: dict[str, Block]
    """`dense` and `sparse`."""

    @property
    def moe(self) -> MoE:
        layer = self.blocks["sparse"].feed_forward
        assert isinstance(layer, MoE)
        return layer

    @property
    def rows(self) -> tuple[int, int]:
        """Experts on this rank, and rows of each."""
        c = self.config
        assert c.capacity is not None
        slots = int(c.train.microbatch * c.tokens_per_image // c.group_tokens * c.capacity)
        return c.moe.num_experts // self.mesh.ep_size, slots * self.mesh.ep_size // self.mesh.tp_size


def check_products(config: RunConfig, device: Device) -> None:
    """Raises Skipped where the device has no such products, or nobody installed who makes them."""
    try:
        check_device(config.train, torch.device(device.kind))
    except ConfigError as why:
        raise Skipped(str(why).splitlines()[0]) from why


def part(config: RunConfig, device: Device, *, world: int, dtype: torch.dtype = torch.bfloat16) -> Part:
    """Inside of `fake_world`. Weights are made on the device. Raises Skipped where the device has no such products."""
    check_products(config, device)
    gpus = config.cluster.gpus_per_node
    mesh = make_mesh(config.parallel, device_type=device.kind, world=world, gpus_per_node=gpus)
    mesh.build()
    with torch.device("meta"):
        model = DiT(
            config.model, config.moe, channels=config.encoders.image.channels, text_features=config.encoders.text.width
        )
    apply_tensor_parallel(model, mesh=mesh)
    fp8 = Fp8.of(config.train)
    if fp8 is not None:
        apply_fp8(model, fp8, mesh=mesh)
    apply_expert_parallel(model, mesh=mesh, overlap_chunks=config.parallel.overlap_chunks)
    kinds = {"sparse" if isinstance(block.feed_forward, MoE) else "dense": block for block in model.blocks}
    for block in kinds.values():
        block.to_empty(device=device.kind)
        block.to(dtype)
        if isinstance(block.feed_forward, MoE):
            block.feed_forward.router.float()
        fill(block)
    if config.parallel.compile:
        with device.compiling():
            apply_compile(model)
    return Part(config=config, mesh=mesh, blocks=kinds)


def fill(module: nn.Module) -> None:
    """Random weights and reset buffers, on the module's device: 100 billion values through a CPU would take the hour."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=p.shape[-2] ** -0.5 if p.dim() > 1 else 0.02)
        for inner in module.modules():
            if isinstance(inner, MoE) and any(True for _ in inner.router.buffers()):
                inner.router.reset_buffers()


def tokens(c: RunConfig, device: Device, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """(B, S, D) of one microbatch, with a gradient."""
    shape = (c.train.microbatch, c.tokens_per_image, c.model.width)
    return torch.randn(shape, device=device.kind, dtype=dtype).requires_grad_()
