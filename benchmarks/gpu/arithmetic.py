"""Whether the device computes what it should: the layer against Algorithm 1, bf16 against fp32, every kernel against its twin,
8-bit products against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ecdit_train.config.schema import Recipe
from ecdit_train.kernels import adaln, draws, gelu, language, rows
from ecdit_train.keyed import Purpose
from ecdit_train.model.dispatchers.deterministic import DeterministicDispatcher
from ecdit_train.model.dispatchers.index_add import IndexAddDispatcher
from ecdit_train.model.dispatchers.triton import TritonDispatcher
from ecdit_train.model.fp8 import Backend, Fp8Product
from ecdit_train.model.moe import MoE

from ..layers import Algorithm1, copy_weights, expert_choice
from .device import Device
from .rank import check_products, fill, presets, with_words
from .record import Findings, Skipped

PRODUCTS: tuple[tuple[Backend, Recipe], ...] = (
    *(("scaled_mm", "current"), ("scaled_mm", "delayed")),
    *(("transformer_engine", "current"), ("transformer_engine", "delayed"), ("transformer_engine", "mxfp8")),
)
DISPATCHERS = {"index_add": IndexAddDispatcher, "deterministic": DeterministicDispatcher, "triton": TritonDispatcher}


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm().clamp(min=1e-30)).detach())


def layer_of(device: Device, *, width: int, dtype: torch.dtype) -> MoE:
    torch.manual_seed(0)
    made = expert_choice(width, hidden=4 * width, experts=8, capacity_factor=2).to(device.kind, dtype)
    fill(made)
    return made


def parity(device: Device, found: Findings) -> None:
    """Values and every gradient of the layer in fp64, with each dispatcher, against the paper's Algorithm 1."""
    for name, dispatcher in DISPATCHERS.items():
        ours = layer_of(device, width=64, dtype=torch.float64)
        ours.dispatcher = dispatcher()
        literal = Algorithm1(64, hidden=256, experts=8, capacity=64).to(device.kind, torch.float64)
        copy_weights(ours, literal)
        x = torch.randn(4, 256, 64, dtype=torch.float64, device=device.kind)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a, group_tokens=256)[0], literal(b)
        weight = torch.randn_like(y)
        (y * weight).sum().backward()
        (z * weight).sum().backward()
        up, down = (torch.stack([getattr(e, n).weight.grad.T for e in literal.experts]) for n in ("up", "down"))
        pairs = [(y, z), (a.grad, b.grad), (ours.router.weight.grad, literal.weight.grad)]
        pairs += [(ours.experts.up.grad, up), (ours.experts.down.grad, down)]
        found.at_most(f"{name} against Algorithm 1, fp64", max(distance(p, q) for p, q in pairs), 1e-9)


def bf16(device: Device, found: Findings) -> None:
    """The layer in bf16 against fp32 with the same bf16-rounded weights and tokens: the same choices, near results."""
    for name, dispatcher in DISPATCHERS.items():
        layer = layer_of(device, width=256, dtype=torch.bfloat16)
        layer.router.float()
        layer.dispatcher = dispatcher()
        x = torch.randn(4, 256, 256, device=device.kind, dtype=torch.bfloat16)
        low, chosen = layer(x, group_tokens=256)
        layer.float()
        high, same = layer(x.float(), group_tokens=256)
        pairs = zip(chosen.index_EGC.flatten(0, 1).tolist(), same.index_EGC.flatten(0, 1).tolist(), strict=True)
        found.at_most(f"{name}: experts that chose otherwise", sum(set(p) != set(q) for p, q in pairs), 0)
        found.at_most(f"{name}: bf16 against fp32", distance(low.float(), high), 2e-2)


def fp8(device: Device, found: Findings) -> None:
    """8-bit products of a stack of experts with an odd number of rows, forward and backward, against the same arithmetic in plain
    torch; and whether inf comes out as what it is."""
    e, R, K, O = device.choose(cuda=(4, 1001, 1024, 4096), cpu=(2, 21, 64, 48))
    shapes = ((e, R, K), (e, K, O), (e, R, O))
    x, w, dy = (torch.randn(shape, device=device.kind, dtype=torch.bfloat16) for shape in shapes)
    wrong = x.index_fill(1, torch.tensor([3], device=device.kind), torch.inf)
    for backend, recipe in PRODUCTS:
        name = f"{backend}, {recipe}"
        with found.part(name):
            words = ("train.precision=fp8", f"train.fp8_backend={backend}", f"train.fp8_recipe={recipe}")
            if device.cuda or backend != "scaled_mm":  # which a CPU has, only slowly
                check_products(with_words(presets(device)[0], words), device)
            ours, plain = (Fp8Product(recipe, stack=e, backend=by).to(device.kind) for by in (backend, "emulated"))
            made = []
            for product in (ours, plain):
                if recipe == "delayed":
                    product.amax.fill_(8.0)  # the largest of steps before this one
                a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
                y = product(a, b)
                y.backward(dy)
                made.append([t.float() for t in (y, a.grad, b.grad)])
            worst = max(distance(p, q) for p, q in zip(*made, strict=True))
            found.at_most(f"{name}: against plain torch", worst, 2e-3)
            hidden = ours(wrong, w.clone().requires_grad_()).isfinite().flatten(1).all(1).sum()
            found.at_most(f"{name}: experts that hid inf", float(hidden), 0)


def kernels(device: Device, found: Findings) -> None:
    """Each Triton kernel against its twin on the same device: equal results, and how much faster it is, at shapes of a 3XL rank."""
    if not language.launches(torch.device(device.kind)):
        raise Skipped("Triton is not installed, or does not interpret (TRITON_INTERPRET=1)")
    N, R, D = device.choose(cuda=(8192, 16384, 2304), cpu=(32, 64, 48))
    for dtype in (torch.bfloat16, torch.float32):
        for name, (kernel, twin, moved) in cases(device, N=N, R=R, D=D, dtype=dtype).items():
            one, two = kernel(), twin()
            pairs = [(a.double(), b.double()) for a, b in zip(one, two, strict=True)]
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            found.at_most(
                f"{label}: kernel against twin",
                max(distance(a, b) for a, b in pairs),
                2e-6 if dtype == torch.float32 else 6e-3,
            )
            seconds = device.seconds(
                {"kernel": kernel, "twin": twin},
                rounds=device.choose(cuda=10, cpu=1),
                calls=device.choose(cuda=10, cpu=1),
            )
            speed = {"twin / kernel": seconds["twin"] / seconds["kernel"], "GB/s": moved / seconds["kernel"] / 1e9}
            found.values[label] = speed
            if device.cuda:
                found.at_least(f"{label}: twin / kernel in time", speed["twin / kernel"], 1.0)


def attention(device: Device, found: Findings) -> None:
    """Which of torch's attention kernels takes the shapes of a 3XL rank: any but the one that writes its weights out."""
    images, S, L, heads, kv_heads = device.choose(cuda=(64, 128, 128, 36, 6), cpu=(2, 8, 4, 4, 2))
    q, k, text = (
        torch.randn(images, h, n, 64, device=device.kind, dtype=torch.bfloat16)
        for h, n in ((heads, S), (kv_heads, S), (heads, L))
    )
    mask = torch.ones(images, 1, 1, L, dtype=torch.bool, device=device.kind)
    for name, given in {"self": (q, k, k, None), "text": (q, text, text, mask)}.items():
        gqa = q.shape[1] != given[1].shape[1]
        chosen = SDPBackend(torch._fused_sdp_choice(*given, enable_gqa=gqa)).name
        found.values[name] = chosen
        if device.cuda:
            found.at_most(f"attention, {name}: {chosen}", int(chosen in ("MATH", "ERROR")), 0)


Call = Callable[[], tuple[Tensor, ...]]


def cases(device: Device, *, N: int, R: int, D: int, dtype: torch.dtype) -> dict[str, tuple[Call, Call, int]]:
    """Kernel, twin, and the bytes that a perfect kernel moves."""
    torch.manual_seed(0)
    at = {"device": device.kind, "dtype": dtype}
    x, y, h, dh = (
        torch.randn(N, D, **at),
        torch.randn(R, D, **at),
        torch.randn(R, 4 * D, **at),
        torch.randn(R, 4 * D, **at),
    )
    index, gate = torch.randint(N, (R,), device=device.kind), torch.rand(R, device=device.kind)
    lists = rows.list_rows(index, num_tokens=N)
    images = x.view(-1, N // 8, D)
    shift, scale = torch.randn(2, 8, D, **at).unbind(0)
    b, position = x.element_size(), torch.arange(8, device=device.kind)

    def pair(
        kernel: Callable[..., object], twin: Callable[..., object], moved: int, *given: object, **named: object
    ) -> tuple[Call, Call, int]:
        def tuples(function: Callable[..., object]) -> Call:
            def call() -> tuple[Tensor, ...]:
                out = function(*given, **named)
                return out if isinstance(out, tuple) else (out,)  # type: ignore[return-value]

            return call

        return tuples(kernel), tuples(twin), moved

    normed = adaln.norm_modulate_twin(images, shift_BD=shift, scale_BD=scale)
    made = {
        "gather": pair(rows.gather_rows, rows.gather_rows_twin, 2 * R * D * b, x, index),
        "weighted sum": pair(rows.sum_rows, rows.sum_rows_twin, (R + N) * D * b, y, lists, gate_R=gate),
        "its backward": pair(rows.weigh_backward, rows.weigh_backward_twin, 3 * R * D * b, x, y, index, gate_R=gate),
        "gelu": pair(gelu.gelu_rows, gelu.gelu_rows_twin, 8 * R * D * b, h),
        "its gradient": pair(
            gelu.gelu_backward_rows, gelu.gelu_backward_rows_twin, 16 * R * D * b, h, dh, gate.to(h.dtype)
        ),
        "norm and modulate": pair(
            adaln.norm_modulate, adaln.norm_modulate_twin, 3 * N * D * b, images, shift_BD=shift, scale_BD=scale
        ),
        "their backward": pair(
            adaln.norm_modulate_backward, adaln.norm_modulate_backward_twin, 4 * N * D * b, images, scale, *normed
        ),
    }
    if dtype == torch.float32:
        made["draws"] = pair(draws.normal, draws.normal_twin, 8 * N * 4, (7, int(Purpose.NOISE)), position, num=N)
    return made
