"""8-bit casts and products by Transformer Engine (the extra `te`; docs/decisions/0023). The only importer of it.

Not its modules: its quantisers, given our scales, and its products. It has not run on a GPU yet. Tests run it through a stand-in
that takes the real one's arguments and nothing else (tests/te_stand_in.py).

A matrix lies row by row in memory, or turned (a transposed view of one that does). Transformer Engine multiplies D = B A, and a
letter for A, then for B, says which of them is turned against what it wants: "N" is summed over A's rows or B's columns.

    "rowwise"      summed over along a row as it lies
    "columnwise"   along a column: one scale for a matrix needs a turned copy before Blackwell, MXFP8 other numbers and scales

Legend: e matrices of a stack, R rows, K width that is summed over, O width of the result; X, Y a matrix as it lies.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WRITTEN_FOR = "2.20"
"""Its release, without the last number: neither its quantisers nor its products are promised to stay."""
INSTALL = "pip install --no-build-isolation 'ecdit[te]'"
UNIT, BLOCK = 16, 32
"""Both sizes of a matrix are multiples of it: per tensor, and with blocks."""
SCALE_ROWS, SCALE_COLUMNS = 128, 4
"""Scales of blocks lie in whole tiles of so many rows of the matrix, and blocks."""
PRODUCT = "ecdit::te_product"
INF, NAN = 254, 255
"""Two scales as E8M0: what a block with inf gets, which no finite number of bf16 or fp32 reaches, and what it should get."""


def missing() -> str | None:
    """What keeps Transformer Engine from being used here, or None. Imports nothing of it: where there is no CUDA that fails."""
    try:
        version = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return f"is not installed here ({INSTALL})"
    if not version.startswith(f"{WRITTEN_FOR}."):
        return f"is {version} here; what calls it is written for {WRITTEN_FOR}"
    spec = importlib.util.find_spec("transformer_engine")
    for home in map(Path, (spec and spec.submodule_search_locations) or ()):
        if any(any(place.glob("transformer_engine_torch*.so")) for place in (home.parent, home, home / "wheel_lib")):
            return None
    return f"is installed here without its part for torch ({INSTALL})"


@functools.cache
def _engine() -> Any:
    import transformer_engine.pytorch as engine
    import transformer_engine.pytorch.cpp_extensions  # noqa: F401 - an attribute of `engine` from here on

    return engine


def cast(t_eRK: Tensor, scale_e11: Tensor, fp8: torch.dtype) -> tuple[Tensor, Tensor]:
    """t / scale in 8 bits, lying as t does, and the scales: NaN for a matrix with inf inside, which the cast turns into the largest
    number. One pass over each matrix, which saturates, and keeps NaN."""
    engine, (rows, turned) = _engine(), _as_it_lies(t_eRK)
    scale_e = scale_e11.flatten()
    inverse, amax = scale_e.reciprocal(), torch.zeros_like(scale_e)
    data = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    for n in range(rows.shape[0]):
        quantizer = engine.Float8Quantizer(
            scale=inverse[n : n + 1], amax=amax[n : n + 1], fp8_dtype=_name(fp8), rowwise=True, columnwise=False
        )
        quantizer.quantize(rows[n], out=quantizer.create_tensor_from_data(data[n], fake_dtype=rows.dtype))
    scale_e = torch.where(amax.isfinite(), scale_e, torch.nan)
    return _turned(data.view(fp8), turned), scale_e[:, None, None]


def cast_blocks(t_eRK: Tensor, *, along: int) -> tuple[Tensor, Tensor]:
    """E4M3 with a scale for every 32 numbers along dim 1 or 2, and these scales: E8M0 as Transformer Engine lays them out, turned
    where the numbers are; NaN for a block with inf inside, and NaN stays in its place. One pass for a whole stack."""
    rows, turned = _as_it_lies(t_eRK)
    (e, X, Y), filled = rows.shape, _filled(rows, BLOCK)
    way = _way(turned, along)
    quantizer = _engine().MXFP8Quantizer(
        fp8_dtype=_name(torch.float8_e4m3fn), rowwise=way == "rowwise", columnwise=way == "columnwise"
    )
    quantizer.internal = True  # a plain record, no subclass of torch.Tensor
    # Sizes are whole blocks, so none lies across two matrices.
    made = quantizer.quantize(filled.flatten(0, 1)).get_metadata()
    height, tile = (filled.shape[1], SCALE_ROWS) if way == "rowwise" else (filled.shape[1] // BLOCK, SCALE_COLUMNS)
    scale = made[f"{way}_scale_inv"][: e * height].unflatten(0, (e, height))
    scale = nn.functional.pad(scale.masked_fill(scale == INF, NAN), (0, 0, 0, -height % tile))
    values = made[f"{way}_data"].view(torch.float8_e4m3fn).unflatten(0, (e, -1))[:, :X, :Y]
    return _turned(values, turned), _turned(scale, turned)


def product(a_eRK: Tensor, a_scale: Tensor, b_eKO: Tensor, b_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(e, R, O) of type `dtype`, sums in fp32; of what `cast`, or `cast_blocks` along K, made. One call for the whole stack."""
    return _product(a_eRK, a_scale, b_eKO, b_scale, dtype)


@torch.library.custom_op(PRODUCT, mutates_args=())
def _product(a_eRK: Tensor, a_scale: Tensor, b_eKO: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """An op of torch's, so that selective checkpointing sees it and `parallel.keep` can keep it: Transformer Engine's is none."""
    products = _engine().cpp_extensions
    (e, R, _), O = a_eRK.shape, b_eKO.shape[2]
    if _is_turned(a_eRK) and _is_turned(b_eKO):  # the one pair of letters that it does not know
        a_eRK, a_scale = _bytes(a_eRK).contiguous().view(a_eRK.dtype), a_scale.contiguous()
    left, right = _operands(b_eKO, b_scale, along=1, dtype=dtype), _operands(a_eRK, a_scale, along=2, dtype=dtype)
    unit = _unit(a_scale)
    y_eRO = a_eRK.new_empty(e, R + -R % unit, O + -O % unit, dtype=dtype)
    layout = "".join("T" if _is_turned(values) else "N" for values in (b_eKO, a_eRK))
    # Split: partial sums are added up in fp32, which Hopper's tensor cores by themselves do not.
    how = {"out_dtype": dtype, "layout": layout, "use_split_accumulator": True}
    if e == 1:
        products.general_gemm(left[0], right[0], out=y_eRO[0], **how)
    else:
        products.general_grouped_gemm(
            left, right, list(y_eRO), quantization_params=[None] * e, m_splits=[y_eRO.shape[1]] * e, **how
        )
    return y_eRO[:, :R, :O].contiguous()


def _operands(values: Tensor, scale: Tensor, *, along: int, dtype: torch.dtype) -> list[Any]:
    """Each matrix of the stack as Transformer Engine's own record of one; `along`: the dim that is summed over."""
    engine, (rows, turned) = _engine(), _as_it_lies(_bytes(values))
    data, way, kind = _filled(rows, _unit(scale)), _way(turned, along), _name(values.dtype)
    if scale.dtype == torch.uint8:
        other = {"rowwise": "columnwise", "columnwise": "rowwise"}[way]
        same = {f"{other}_data": None, f"{other}_scale_inv": None, "fp8_dtype": kind, "quantizer": None}
        same |= {"with_gemm_swizzled_scales": False, "fake_dtype": dtype}
        scales = _as_it_lies(scale)[0]
        return [
            engine.MXFP8TensorStorage(**{f"{way}_data": data[n], f"{way}_scale_inv": scales[n]}, **same)
            for n in range(data.shape[0])
        ]
    scale_e1 = scale.reshape(-1, 1)
    made = [
        engine.Float8TensorStorage(data=data[n], fp8_scale_inv=scale_e1[n], fp8_dtype=kind, fake_dtype=dtype)
        for n in range(data.shape[0])
    ]
    for one in made if way == "columnwise" else ():
        one.update_usage(columnwise_usage=True)  # a turned copy where the device needs one
    return made


def _way(turned: bool, along: int) -> str:
    """How a matrix is read that is summed along this dim of it, dim 2 being its columns."""
    return "rowwise" if (along == 2) != turned else "columnwise"


def _unit(scale: Tensor) -> int:
    return BLOCK if scale.dtype == torch.uint8 else UNIT


def _name(fp8: torch.dtype) -> Any:
    names = _engine().DType
    return names.kFloat8E4M3 if fp8 == torch.float8_e4m3fn else names.kFloat8E5M2


def _is_turned(t: Tensor) -> bool:
    return t.stride(2) != 1 and t.stride(1) == 1


def _turned(t: Tensor, yes: bool) -> Tensor:
    return t.transpose(1, 2) if yes else t


def _as_it_lies(t: Tensor) -> tuple[Tensor, bool]:
    """(e, X, Y) row by row in memory, and whether that is turned. No copy where either it or its transpose is dense."""
    turned = _is_turned(t)
    return _turned(t, turned).contiguous(), turned


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


def _filled(t_eXY: Tensor, unit: int) -> Tensor:
    """Zeros after the last rows and columns, up to whole units."""
    X, Y = t_eXY.shape[1:]
    return nn.functional.pad(t_eXY, (0, -Y % unit, 0, -X % unit)) if X % unit or Y % unit else t_eXY
