"""What only a GPU can show: `make gpu-check`. Skips with a reason, and writes nothing, where there is none.

    python -m benchmarks.gpu_check [--device cpu]

1. parity      the layer equals Algorithm 1 in fp64 on the device: values and every gradient, both combines
2. bf16        the layer in bf16 stays within a bound of fp32
3. fullgraph   the local layer compiles to one graph
4. no sync     a training step never waits for the device (reading its loss and norm, the one wait, comes after)
5. throughput  the layer's TFLOP/s against torch.bmm alone at the same shapes (bar: 0.85), and against Algorithm 1 (bar: 1.5)

With `--device cpu` every check that means anything there runs on small shapes; the tests use it to keep this file honest.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecdit_train.config.compose import compose
from ecdit_train.diffusion.flow import Flow
from ecdit_train.diffusion.microbatch import Microbatch
from ecdit_train.model.fp8 import Fp8Product
from ecdit_train.observe.metrics import MetricWindow
from ecdit_train.observe.routing_scalars import routing_sums, weight_sums
from ecdit_train.observe.timesteps import loss_sums
from ecdit_train.parallel import runtime
from ecdit_train.parallel.context import spread
from ecdit_train.parallel.low_precision import CAPABILITY
from ecdit_train.train.state import TrainState
from ecdit_train.train.step import forward_backward, update_buffers

from .layers import Algorithm1, copy_weights, expert_choice, fill
from .timing import Bar, report

SHAPES = {"XL": (1152, 8), "XXL": (1536, 16), "3XL": (2304, 32), "M": (3072, 64)}
"""Width and experts of the layers timed; 8192 tokens, routing groups of 1024, f_c = 2, as on one of 64 GPUs."""


def parity(device: str) -> float:
    """Largest relative difference from Algorithm 1 in fp64 over values and all gradients."""
    worst = 0.0
    for deterministic in (False, True):
        ours = (
            expert_choice(64, hidden=256, experts=8, capacity_factor=2, deterministic=deterministic).double().to(device)
        )
        literal = Algorithm1(64, hidden=256, experts=8, capacity=64).double().to(device)
        fill_on(ours, seed=0)
        copy_weights(ours, literal)
        x = torch.randn(4, 256, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a, group_tokens=256)[0], literal(b)
        y.square().sum().backward()
        z.square().sum().backward()
        up = torch.stack([e.up.weight.grad.T for e in literal.experts])
        down = torch.stack([e.down.weight.grad.T for e in literal.experts])
        pairs = [
            (y, z),
            (a.grad, b.grad),
            (ours.router.weight.grad, literal.weight.grad),
            (ours.experts.up.grad, up),
            (ours.experts.down.grad, down),
        ]
        worst = max([worst, *(distance(p, q) for p, q in pairs)])
    return worst


def bf16_distance(device: str) -> float:
    """Relative difference of a bf16 layer's output from fp32, same bf16-rounded weights and inputs, same choices."""
    layer = expert_choice(256, hidden=1024, experts=8, capacity_factor=2).to(device)
    fill_on(layer, seed=0)
    layer.to(torch.bfloat16)
    x = torch.randn(4, 256, 256, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    low, chosen = layer(x, group_tokens=256)
    layer.float()
    high, same = layer(x.float(), group_tokens=256)
    shared = [
        set(p.tolist()) == set(q.tolist())
        for p, q in zip(chosen.index_EGC.flatten(0, 1), same.index_EGC.flatten(0, 1), strict=True)
    ]
    assert all(shared), "routing must not depend on the compute precision"
    return distance(low.float(), high)


def fp8(device: str) -> dict[str, float]:
    """A product of four experts and its gradients by torch's 8-bit kernels against the emulation, the largest relative difference;
    and the norm of a step in fp8 that waits for nothing. Empty on a GPU without 8-bit tensor cores."""
    if device == "cuda" and torch.cuda.get_device_capability() < CAPABILITY:
        return {}
    R, K, O = (512, 256, 1024) if device == "cuda" else (32, 32, 48)
    found = []
    for backend in ("scaled_mm", "emulated"):
        g = torch.Generator().manual_seed(2)
        x, w, dy = (torch.randn(4, *s, generator=g).to(device, torch.bfloat16) for s in ((R, K), (K, O), (R, O)))
        x, w = x.requires_grad_(), w.requires_grad_()
        y = Fp8Product("current", stack=4, backend=backend)(x, w)
        y.backward(dy)
        found.append([t.float() for t in (y, x.grad, w.grad)])
    worst = max(distance(a, b) for a, b in zip(*found, strict=True))
    return {"fp8_backends": worst, "step_norm_fp8": step_without_sync(device, precision="fp8")}


def one_graph(device: str, *, backend: str) -> float:
    """The layer compiled with fullgraph=True; returns the relative difference from eager."""
    layer = expert_choice(128, hidden=512, experts=8, capacity_factor=2).to(device)
    fill_on(layer, seed=0)
    x = torch.randn(4, 256, 128, generator=torch.Generator().manual_seed(1)).to(device)
    compiled = torch.compile(lambda z: layer(z, group_tokens=256)[0], fullgraph=True, backend=backend)
    return distance(compiled(x), layer(x, group_tokens=256)[0])


def step_without_sync(device: str, *, precision: str) -> float:
    """A step of the demo's network (to the moving average), with all that is gathered for a record, under
    `set_sync_debug_mode("error")`; returns the norm."""
    backend = "scaled_mm" if device == "cuda" else "emulated"
    c = compose(["experiment=shapes_tiny", f"train.precision={precision}", f"train.fp8_backend={backend}"])
    parallel = spread(c, runtime.start(device, env={}))
    B, channels = c.train.microbatch, c.encoders.image.channels
    micro = Microbatch(
        position_B=torch.arange(B, device=device),
        latents_BCHW=torch.randn(B, channels, c.latent_side, c.latent_side, device=device),
        features_BLX=torch.randn(B, c.encoders.text.max_tokens, c.encoders.text.width, device=device),
        mask_BL=torch.ones(B, c.encoders.text.max_tokens, dtype=torch.bool, device=device),
    )
    flow = Flow(config=c.diffusion, seed=0, patch=c.model.patch, num_kept=c.tokens_per_image)
    state = TrainState.fresh(parallel.model, c.optim)

    window = MetricWindow(device=device, images_per_step=B, tokens_per_step=B * c.tokens_per_image)

    def step() -> Tensor:
        done = forward_backward(parallel.model, [micro], flow=flow, group_tokens=c.group_tokens, parallel=parallel)
        for seen in done.seen:
            window.add_sums(loss_sums(seen.error_B, t_B=seen.t_B))
            window.add_sums(routing_sums(seen.assignments, layers=c.sparse_layers, t_B=seen.t_B))
        window.add_sums(weight_sums(parallel.model.routers, layers=c.sparse_layers))
        norm = parallel.clip(max_norm=1.0)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        update_buffers(parallel, done.assignments)
        if state.ema is not None:
            state.ema.update(0)
        return norm

    step()  # allocations and library handles of a first step may sync
    with forbidden_sync(device):
        norm = step()
    return float(norm)


@contextlib.contextmanager
def forbidden_sync(device: str) -> Iterator[None]:
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def seconds(work: Callable[[], None], *, device: str, repeat: int) -> float:
    """Median seconds of one call."""
    times = []
    for _ in range(repeat):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def throughput(
    device: str, *, width: int, experts: int, tokens: int, group_tokens: int, repeat: int = 10
) -> dict[str, float]:
    """Forward and backward of the layer in bf16 against its batched products alone and against Algorithm 1, interleaved."""
    hidden, rows = 4 * width, 2 * tokens
    layer = expert_choice(width, hidden=hidden, experts=experts, capacity_factor=2).to(device, torch.bfloat16)
    literal = Algorithm1(width, hidden=hidden, experts=experts, capacity=group_tokens * 2 // experts).to(
        device, torch.bfloat16
    )
    for module in (layer, literal):
        fill_on(module, seed=0)
    x = torch.randn(
        tokens // group_tokens, group_tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True
    )
    dispatched = torch.randn(experts, rows // experts, width, device=device, dtype=torch.bfloat16, requires_grad=True)

    def products() -> Tensor:
        return torch.bmm(F.gelu(torch.bmm(dispatched, layer.experts.up), approximate="tanh"), layer.experts.down)

    works = {
        "layer": lambda: layer(x, group_tokens=group_tokens)[0].sum().backward(),
        "bmm": lambda: products().sum().backward(),
        "algorithm1": lambda: literal(x).sum().backward(),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeat):
        for name, work in works.items():
            times[name].append(seconds(work, device=device, repeat=1))
    median = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    flops = 3 * 2 * 2 * rows * width * hidden
    return {
        "layer_tflops": flops / median["layer"] / 1e12,
        "bmm_tflops": flops / median["bmm"] / 1e12,
        "bmm / layer": median["bmm"] / median["layer"],
        "algorithm1 / layer": median["algorithm1"] / median["layer"],
    }


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def fill_on(module: nn.Module, *, seed: int) -> None:
    """`fill` draws on the CPU; weights keep their device and type."""
    device, dtype = next(module.parameters()).device, next(module.parameters()).dtype
    fill(module.cpu().float() if dtype != torch.float64 else module.cpu(), seed=seed)
    module.to(device, dtype)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args(arguments).device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu-check skipped: torch sees no CUDA device here")
        return 0
    cuda = device == "cuda"
    results: dict[str, float] = {
        "parity_fp64": parity(device),
        "bf16": bf16_distance(device),
        "fullgraph": one_graph(device, backend="inductor" if cuda else "aot_eager"),
        "step_norm_fp32": step_without_sync(device, precision="fp32"),
        "step_norm_bf16": step_without_sync(device, precision="bf16"),
        **fp8(device),
    }
    bars = [
        Bar(name="parity with Algorithm 1, fp64", value=results["parity_fp64"], limit=1e-9, at_least=False),
        Bar(name="bf16 against fp32", value=results["bf16"], limit=2e-2, at_least=False),
        Bar(name="fp8 of torch against emulated", value=results.get("fp8_backends", 0.0), limit=5e-3, at_least=False),
        Bar(name="fullgraph against eager", value=results["fullgraph"], limit=1e-4, at_least=False),
    ]
    shapes = (
        {
            name: throughput(device, width=w, experts=e, tokens=8192, group_tokens=1024)
            for name, (w, e) in SHAPES.items()
        }
        if cuda
        else {"small": throughput(device, width=64, experts=8, tokens=512, group_tokens=256, repeat=3)}
    )
    for name, row in shapes.items():
        print(name, {k: round(v, 3) for k, v in row.items()})
        if cuda:
            bars.append(Bar(name=f"{name}: layer / bmm TFLOP/s", value=row["bmm / layer"], limit=0.85, at_least=True))
            bars.append(
                Bar(name=f"{name}: Algorithm 1 / layer", value=row["algorithm1 / layer"], limit=1.5, at_least=True)
            )
    if not cuda:
        for bar in bars:
            print(bar)
        return int(not all(bar.passed for bar in bars))
    return report(
        "gpu_check",
        settings={"device": torch.cuda.get_device_name(), "tokens": 8192, "group_tokens": 1024, "capacity_factor": 2},
        ratios={**results, **shapes},
        bars=bars,
    )


if __name__ == "__main__":
    sys.exit(main())
