"""Which layers multiply in 8 bits, what that changes in a network, and what it must not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import te_stand_in
import torch
from torch import nn

from ecdit_train.config.compose import compose
from ecdit_train.errors import ConfigError
from ecdit_train.model import te_products
from ecdit_train.model.dit import DiT
from ecdit_train.model.embed import Text
from ecdit_train.model.fp8 import Fp8Product
from ecdit_train.model.init import reset_buffers
from ecdit_train.model.moe import MoE
from ecdit_train.parallel.low_precision import Fp8, apply_fp8, check_device
from ecdit_train.parallel.mesh import make_mesh

RECIPES = ("current", "delayed", "mxfp8")
CONFIG = compose(
    ["experiment=shapes_tiny", "model.layers=4", "model.width=64", "model.heads=1", "model.text_width=64",
     "model.text_refiner_layers=1", "encoders.text.width=32", "moe.num_experts=4", "moe.shared_experts=1"],
    local=False)  # fmt: skip
MESH = make_mesh(CONFIG.parallel, device_type="cpu", world=1)


def network(fp8: Fp8 | None = None, *, dtype: torch.dtype = torch.float32) -> DiT:
    """Random weights everywhere: nothing that starts at zero may hide a wrong gradient."""
    model = DiT(CONFIG.model, CONFIG.moe, channels=4, text_features=32)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = torch.randn(p.shape, generator=g) / (p.shape[-2] if "experts" in name else p.shape[-1]) ** 0.5
            p.copy_(1 + 0.1 * value if "norm" in name and name.endswith("weight") else value)
    model.to(dtype)
    if fp8 is not None:
        apply_fp8(model, fp8, mesh=MESH)
        reset_buffers(model)
    return model


def loss_and_gradients(model: DiT) -> tuple[float, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(2)
    text = Text(features_BLX=torch.randn(8, 8, 32, generator=g), mask_BL=torch.ones(8, 8, dtype=torch.bool),
                drop_B=torch.arange(8) == 3)  # fmt: skip
    latents, t_B = torch.randn(8, 4, 8, 8, generator=g), torch.rand(8, generator=g)
    out = model(latents, t_B=t_B, text=text, keep_BK=None, group_tokens=32).patches_BKP
    loss = (out.float() - torch.randn(out.shape, generator=g)).square().mean()
    loss.backward()
    return loss.item(), {name: p.grad.float() for name, p in model.named_parameters()}


def test_where_it_is_applied() -> None:
    """Attention's four projections twice, the feed-forward's two in every block (shared experts where it is sparse), both
    matrices of the experts; nothing else."""
    model = network(Fp8(recipe="current", backend="emulated"))
    found = {name for name, m in model.named_modules() if isinstance(m, Fp8Product)}
    attention = {f"blocks.{n}.{a}_attention.{p}.fp8" for n in range(4) for a in ("self", "cross")
                 for p in ("query", "key", "value", "out")}  # fmt: skip
    dense = {f"blocks.{n}.feed_forward.{p}.fp8" for n in (0, 2) for p in ("up", "down")}
    shared = {f"blocks.{n}.feed_forward.shared.{p}.fp8" for n in (1, 3) for p in ("up", "down")}
    experts = {f"blocks.{n}.feed_forward.experts.fp8.{i}" for n in (1, 3) for i in (0, 1)}
    assert found == attention | dense | shared | experts


@pytest.mark.parametrize("recipe", RECIPES)
def test_near_full_precision(recipe) -> None:
    """Loss within 1 %, the whole gradient within 15 % and in its direction: 8 bits cost 2 to 5 % in each of a dozen products
    behind each other, and a few tokens go to other experts."""
    want, truth = loss_and_gradients(network())
    got, mine = loss_and_gradients(network(Fp8(recipe=recipe, backend="emulated")))
    a, b = (torch.cat([g[name].flatten() for name in truth]) for g in (mine, truth))
    print(recipe, got, want, ((a - b).norm() / b.norm()).item())
    assert abs(got - want) < 1e-2 * want
    assert got != want
    assert (a - b).norm() < 0.15 * b.norm()
    assert torch.cosine_similarity(a, b, dim=0) > 0.985


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tokens_are_chosen(dtype) -> None:
    """Of equal inputs: routers have no part in it, whose products stay in fp32."""
    x = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    tables = []
    for fp8 in (None, Fp8(recipe="current", backend="emulated")):
        layer = network(fp8, dtype=dtype).blocks[1].feed_forward
        assert isinstance(layer, MoE)
        tables.append(layer(x, group_tokens=32))
    (y, bf16), (z, eight) = tables
    assert torch.equal(bf16.index_EGC, eight.index_EGC)
    assert torch.equal(bf16.gate_EGC, eight.gate_EGC)
    assert not torch.equal(y, z)


def test_a_device_without_8_bit_units_is_refused(monkeypatch) -> None:
    train = replace(CONFIG.train, precision="fp8", fp8_recipe="current", fp8_backend="scaled_mm")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ConfigError, match=r"A100 has 8\.0.*precision=bf16"):
        check_device(train, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"needs a GPU.*emulated"):
        check_device(train, torch.device("cpu"))
    check_device(replace(train, fp8_backend="emulated"), torch.device("cpu"))
    check_device(replace(train, fp8_backend="emulated"), torch.device("cuda"))
    check_device(replace(train, precision="bf16"), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(train, torch.device("cuda"))


@pytest.mark.parametrize(
    ("recipe", "device", "capability", "missing", "said"),
    [
        ("current", "cpu", (0, 0), None, r"fp8_backend = 'transformer_engine': needs a GPU.*valid: emulated"),
        ("current", "cuda", (8, 0), None, r"8\.9 or more; some GPU has 8\.0.*valid: train.precision=bf16"),
        ("current", "cuda", (9, 0), "is absent", r"Transformer Engine is absent.*valid: scaled_mm"),
        ("mxfp8", "cuda", (10, 0), "is absent", r"Transformer Engine is absent.*valid: emulated"),
        ("mxfp8", "cuda", (9, 0), None, r"fp8_recipe = 'mxfp8'.*10\.0 or more.*some GPU has 9\.0.*valid: current"),
        ("mxfp8", "cuda", (12, 0), None, r"below 12\.0; some GPU has 12\.0.*valid: current"),
        ("mxfp8", "cuda", (10, 3), None, None),
        ("delayed", "cuda", (8, 9), None, None),
    ],
)
def test_without_transformer_engine_or_its_gpu(recipe, device, capability, missing, said, monkeypatch) -> None:
    train = replace(CONFIG.train, precision="fp8", fp8_recipe=recipe, fp8_backend="transformer_engine")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(te_products, "missing", lambda: missing)
    if said is None:
        check_device(train, torch.device(device))
        return
    with pytest.raises(ConfigError, match=said) as raised:
        check_device(train, torch.device(device))
    assert len(raised.value.problems) == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_network_by_transformer_engine(recipe) -> None:
    """Every layer that multiplies in 8 bits, as the emulation does: loss and gradients to the order of sums."""
    want, truth = loss_and_gradients(network(Fp8(recipe=recipe, backend="emulated"), dtype=torch.bfloat16))
    with te_stand_in.used(blackwell=recipe == "mxfp8") as device:
        model = network(Fp8(recipe=recipe, backend="transformer_engine"), dtype=torch.bfloat16)
        got, mine = loss_and_gradients(model)
    assert {"product", "grouped product"} <= set(device.calls)
    assert got == pytest.approx(want, rel=1e-5)
    for name, gradient in truth.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())


def test_weights_keep_their_names() -> None:
    """Checkpoints of another precision can be read."""
    plain, eight = network(), network(Fp8(recipe="current", backend="emulated"))
    assert list(plain.state_dict()) == list(eight.state_dict())
    assert all(
        isinstance(m, nn.Linear) for n, m in eight.named_modules() if n.endswith(("query", "down")) and "text." not in n
    )
