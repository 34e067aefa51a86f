"""Products by Transformer Engine, through a stand-in with its names, arguments and layouts, against the same in plain torch.

Both round alike and add up exact products, so on either kind of GPU only the order of sums could differ.
"""

import ast
import re
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import te_stand_in
import torch
from torch.utils.checkpoint import checkpoint

from ecdit_train.model import te_products
from ecdit_train.model.fp8 import E4M3, Fp8Product, quantise
from ecdit_train.parallel.activation import contexts
from ecdit_train.parallel.recompute import PRODUCTS

SHAPES = [(3, 32, 64, 96), (2, 5, 64, 48), (4, 1, 32, 64), (1, 33, 16, 16), (5, 160, 128, 256), (2, 0, 64, 48)]
"""e, R, K, O: rows in whole units, fewer, one, one matrix, blocks in more than one tile of scales, no rows."""
WAYS = [("current", False), ("delayed", False), ("current", True), ("delayed", True), ("mxfp8", True)]
"""Recipe, and whether the GPU is a Blackwell."""


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(recipe, backend, stack=1, past=0.0):
    made = Fp8Product(recipe, stack=stack, backend=backend)
    if recipe == "delayed":
        made.reset_buffers()
        made.amax += past
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("past", [0.0, 2.0], ids=["first", "later"])
@pytest.mark.parametrize(("recipe", "blackwell"), WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stack_is_that_of_plain_torch(shape, recipe, blackwell, past, dtype):
    """Values and gradients; `later`: scales come from memory, and what is larger saturates."""
    (e, R, K, O), got = shape, []
    for backend in ("emulated", "transformer_engine"):
        with te_stand_in.used(blackwell=blackwell) as device:
            x, w = random(e, R, K, dtype=dtype).requires_grad_(), random(e, K, O, seed=1, dtype=dtype).requires_grad_()
            made = product(recipe, backend, stack=e, past=past)
            y = made(x, w)
            y.backward(random(e, R, O, seed=2, dtype=dtype))
            got.append((y, x.grad, w.grad, *made.seen.values()))
    for one, other in zip(*got, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-6 if dtype == torch.float32 else 0, atol=1e-5)
    if R:
        assert device.calls.count("product" if e == 1 else "grouped product") == 3
        assert device.calls.count("cast of blocks" if recipe == "mxfp8" else "cast") == (
            6 if recipe == "mxfp8" else 4 * e
        )
        assert ("transpose" in device.calls) == (not blackwell)


@pytest.mark.parametrize(("recipe", "blackwell"), WAYS)
def test_a_linear_layer_is_that_of_plain_torch(recipe, blackwell):
    """Its weight lies turned, and so may a gradient."""
    got = []
    for backend in ("emulated", "transformer_engine"):
        with te_stand_in.used(blackwell=blackwell):
            x, w = random(2, 24, 64).requires_grad_(), random(48, 64, seed=1).requires_grad_()
            y = product(recipe, backend).linear(x, w)
            y.backward(random(48, 24, 2, seed=2).permute(2, 1, 0))
            got.append((y, x.grad, w.grad))
    for one, other in zip(*got, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


def test_both_ways_of_lying():
    """Every pair of layouts, of which Transformer Engine itself knows three."""
    a, b = random(2, 48, 64, dtype=torch.float32), random(2, 64, 32, seed=1, dtype=torch.float32)
    one = torch.ones(2, 1, 1)
    want = torch.bmm(quantise(a, one, E4M3).wide(torch.float32), quantise(b, one, E4M3).wide(torch.float32))

    def turned(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    for blackwell in (False, True):
        for left in (a, turned(a)):
            for right in (b, turned(b)):
                with te_stand_in.used(blackwell=blackwell):
                    got = te_products.product(
                        *te_products.cast(left, one, E4M3), *te_products.cast(right, one, E4M3), dtype=torch.float32
                    )
                    torch.testing.assert_close(got, want)
                    if blackwell:
                        blocks = te_products.cast_blocks(left, along=2), te_products.cast_blocks(right, along=1)
                        got = te_products.product(*blocks[0], *blocks[1], dtype=torch.float32)
                        assert 0 < (got - a @ b).norm() / (a @ b).norm() < 0.06


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("recipe", "blackwell"), WAYS)
def test_what_is_not_finite_is_seen(recipe, blackwell, bad):
    """The casts turn inf into 448 (E5M2: 57344), at a scale that is remembered, and a block's scale into 2^127."""
    with te_stand_in.used(blackwell=blackwell):
        for where in ("x", "w", "dy"):
            t = {"x": random(2, 32, 64), "w": random(2, 64, 48, seed=1), "dy": random(2, 32, 48, seed=2)}
            t[where][1, 3, 5] = bad
            x, w = t["x"].requires_grad_(), t["w"].requires_grad_()
            y = product(recipe, "transformer_engine", stack=2, past=4.0)(x, w)
            y.backward(t["dy"])
            seen = {"x": (y, w.grad), "w": (y, x.grad), "dy": (x.grad, w.grad)}[where]
            assert not any(v[1].isfinite().all() for v in seen), f"{bad} in {where}"
            assert y[0].isfinite().all(), "the other expert"


def test_a_saturated_block_would_have_hidden_it():
    """That the guard is what sees inf: without it a product with small numbers is finite."""
    x, w = random(1, 32, 64), 1e-30 * random(1, 64, 32, seed=1)
    x[0, 3, 5] = torch.inf
    with te_stand_in.used(blackwell=True), pytest.MonkeyPatch.context() as patch:
        how = product("mxfp8", "transformer_engine")
        assert not how(x, w.requires_grad_()).isfinite().all()
        patch.setattr(te_products, "NAN", te_products.INF)
        assert how(x, w.requires_grad_()).isfinite().all()


def test_a_wrong_layout_of_scales_is_found(monkeypatch):
    """Scales of the second expert's blocks begin in a tile of their own."""
    x, w = random(2, 32, 64), random(2, 64, 48, seed=1).requires_grad_()
    monkeypatch.setattr(te_products, "SCALE_ROWS", 4)
    with te_stand_in.used(blackwell=True), pytest.raises(RuntimeError, match="shape of scales"):
        product("mxfp8", "transformer_engine", stack=2)(x, w)


def test_remembers_what_the_emulation_remembers():
    seen = []
    for backend in ("emulated", "transformer_engine"):
        with te_stand_in.used():
            made, x = product("delayed", backend, past=1.0), random(32, 64).requires_grad_()
            for k in (1, 3):
                made.linear(k * x, random(48, 64, seed=1).requires_grad_()).sum().backward()
            seen.append(made.seen)
    assert seen[0] == seen[1]
    assert seen[1]["x"] > 2.0, "of what came, not of what the scale could hold"


def test_imported_at_the_first_product_and_from_where_it_says(monkeypatch):
    """Names of the package that hold what is called; nothing of it is imported before."""
    te_products._engine.cache_clear()
    for name in ("", ".pytorch", ".pytorch.cpp_extensions"):
        module = types.ModuleType(f"transformer_engine{name}")
        module.__path__, module.__spec__ = [], ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    engine = sys.modules["transformer_engine.pytorch"]
    for name, value in vars(te_stand_in.engine).items():
        if name != "cpp_extensions":
            setattr(engine, name, value)
    engine.cpp_extensions = sys.modules["transformer_engine.pytorch.cpp_extensions"]
    vars(engine.cpp_extensions).update(vars(te_stand_in.engine.cpp_extensions))
    x, w = random(32, 64), random(48, 64, seed=1).requires_grad_()
    try:
        assert product("current", "transformer_engine").linear(x, w).isfinite().all()
        assert te_products._engine() is engine
    finally:
        te_products._engine.cache_clear()


def installed(folder: Path, version: str, *files: str) -> Path:
    (folder / f"transformer_engine-{version}.dist-info").mkdir(parents=True)
    (folder / f"transformer_engine-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n"
    )
    for file in ("transformer_engine/__init__.py", *files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("raise RuntimeError('imported')\n")
    return folder


@pytest.mark.parametrize(
    ("version", "files", "said"),
    [
        (None, (), r"not installed here \(pip install --no-build-isolation 'ecdit\[te\]'\)"),
        ("2.19.0", ("transformer_engine_torch.abi3.so",), r"is 2\.19\.0 here; what calls it is written for 2\.20"),
        ("2.20.2", (), "without its part for torch"),
        ("2.20.2", ("transformer_engine_torch.cpython.so",), None),
        ("2.20.0+built", ("transformer_engine/wheel_lib/transformer_engine_torch.so",), None),
    ],
)
def test_what_is_missing_is_said_without_importing_it(version, files, said, tmp_path, monkeypatch):
    """Importing what `installed` makes would raise."""
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    if version is None:
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    else:
        monkeypatch.syspath_prepend(installed(tmp_path, version, *files))
    missing = te_products.missing()
    assert missing is None if said is None else re.search(said, missing)


def test_the_release_is_the_one_that_is_declared():
    declared = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    (version,) = re.findall(r'"transformer-engine\[pytorch,core-cu13\]==([\d.]+)"', declared)
    assert version.startswith(f"{te_products.WRITTEN_FOR}.")


def test_nothing_but_the_one_function_imports_it():
    """`import megatron.core` fails where Transformer Engine is there and CUDA is not: no module of ours may hasten that."""
    (function,) = [
        node for node in ast.walk(ast.parse(Path(te_products.__file__).read_text()))
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(n, ast.Import) and n.names[0].name.startswith("transformer_engine") for n in node.body)
    ]  # fmt: skip
    assert function.name == "_engine"


def test_selective_checkpointing_keeps_its_products():
    """Its calls are no ops of torch's; ours around them is one."""
    calls = []
    for kept in (frozenset(), PRODUCTS):
        with te_stand_in.used(blackwell=False) as device:
            product = Fp8Product("current", backend="transformer_engine")
            x, w = (torch.randn(1, *shape, requires_grad=True) for shape in ((64, 32), (32, 48)))
            y = checkpoint(lambda a, b, product=product: product(a, b).tanh(), x, w, use_reentrant=False,
                           context_fn=lambda kept=kept: contexts(kept))  # fmt: skip
            y.sum().backward()
            calls.append(device.calls.count("product"))
    assert calls == [4, 3]
