"""What `ecdit_train.model.te_products` calls of Transformer Engine 2.20, on a CPU in plain torch: the same names and arguments, the
same layouts of numbers and scales, the same refusals. Whatever else is asked of it fails.

    with te_stand_in.used(blackwell=False):
        ...

A stand-in shows that layouts and scales are put together as the real one wants them; that the real one then computes the same it
cannot show. Names, arguments and refusals were read in the sources of 2.20.2 (Python and bindings).
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ecdit_train.model import te_products

FP8 = {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}
UNUSED = 0x7F
"""What lies in the unused parts of scales, which the real one leaves as memory was: 1.0, so that reading it shows."""


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8


class Device:
    """What the C++ side asks the GPU, and how often it was called."""

    def __init__(self, *, blackwell: bool, doubles: bool) -> None:
        self.blackwell = blackwell
        """Multiplies in every layout; Hopper sums along rows only."""
        self.types = {torch.float32, torch.bfloat16, torch.float16} | ({torch.float64} if doubles else set())
        self.calls: list[str] = []


device = Device(blackwell=False, doubles=False)


def check(true: object, why: str) -> None:
    if not true:
        raise RuntimeError(why)


def saturated(v: Tensor, fp8: torch.dtype) -> Tensor:
    """CUDA's cast: what is too large becomes the largest, and so does inf; NaN stays. As bytes."""
    most = torch.finfo(fp8).max
    return v.clamp(-most, most).to(fp8).view(torch.uint8)


class Float8TensorStorage:
    def __init__(
        self, *, data: Tensor | None, fp8_scale_inv: Tensor, fp8_dtype: DType, fake_dtype: torch.dtype | None = None,
        data_transpose: Tensor | None = None, quantizer: Any = None,
    ) -> None:  # fmt: skip
        self._data, self._transpose, self._scale_inv = data, data_transpose, fp8_scale_inv
        self._fp8_dtype, self._dtype, self._quantizer = DType(fp8_dtype), fake_dtype, quantizer

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        if device.blackwell:
            return  # one copy is read in both ways
        if columnwise_usage and self._transpose is None:
            check(self._data is not None, "FP8 data is required to generate FP8 data transpose")
            device.calls.append("transpose")
            self._transpose = self._data.t().contiguous()
        if rowwise_usage is False:
            self._data = None

    def numbers(self, way: str) -> Tensor:
        """Row by row as the matrix lies, in fp64."""
        data = self._data
        if way == "columnwise" and not device.blackwell:
            check(self._transpose is not None, "Input is missing column-wise usage")
            data = self._transpose.t()
            check(data.t().is_contiguous(), "a pointer and two sizes")
        else:
            check(data.is_contiguous(), "a pointer and two sizes")
        check(data.dtype == torch.uint8 and data.dim() == 2, "raw bytes of a matrix")
        check(all(size % 16 == 0 for size in data.shape), "Leading dimension requirement. Caller must pad.")
        scale = self._scale_inv
        check(scale.dtype == torch.float32 and scale.shape == (1,), "one fp32 scale")
        return data.contiguous().view(FP8[self._fp8_dtype]).double() * scale.double()


class Float8Tensor(Float8TensorStorage):
    """The real one is a subclass of torch.Tensor."""


class Quantizer:
    def __init__(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise_usage, self.columnwise_usage, self.internal = rowwise, columnwise, False

    def quantize(self, tensor: Tensor, *, out: Any = None, dtype: torch.dtype | None = None) -> Any:
        check(tensor.dtype in device.types, f"Invalid type for 8-bit casts: {tensor.dtype}")
        if out is not None:
            return self.update_quantized(tensor, out)
        check(self.internal, "a subclass of torch.Tensor is nothing that the stand-in has")
        return self.quantize_impl(tensor)

    def update_quantized(self, src: Tensor, dst: Any) -> Any:
        raise NotImplementedError

    def quantize_impl(self, tensor: Tensor) -> Any:
        raise NotImplementedError


class Float8Quantizer(Quantizer):
    def __init__(
        self, scale: Tensor, amax: Tensor, fp8_dtype: DType, *, rowwise: bool = True, columnwise: bool = True
    ) -> None:
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        self.scale, self.amax, self.dtype = scale, amax, DType(fp8_dtype)

    def create_tensor_from_data(
        self, data: Tensor, fake_dtype: torch.dtype = torch.float32, requires_grad: bool = False, internal: bool = False
    ) -> Float8Tensor:
        check(data.dtype == torch.uint8 and not internal and not requires_grad, "raw bytes")
        return Float8Tensor(data=data, fp8_scale_inv=1 / self.scale, fp8_dtype=self.dtype, fake_dtype=fake_dtype)

    def update_quantized(self, src: Tensor, dst: Any) -> Any:
        check(isinstance(dst, Float8Tensor), "Float8Quantizer can only update Float8Tensor")
        check(self.rowwise_usage and not self.columnwise_usage, "the stand-in turns nothing while it casts")
        check(self.scale.dtype == self.amax.dtype == torch.float32, "scale and amax in fp32")
        check(self.scale.numel() == self.amax.numel() == 1, "one scale and one amax")
        check(src.is_contiguous() and dst._data.is_contiguous() and dst._data.shape == src.shape, "in place")
        device.calls.append("cast")
        wide = src.to(torch.promote_types(src.dtype, torch.float32))
        # fmaxf takes the other of a number and NaN; the largest is added to what the buffer holds.
        self.amax.copy_(torch.maximum(self.amax, wide.abs().nan_to_num(0.0, posinf=torch.inf).max().float()))
        dst._data.copy_(saturated(wide * self.scale.to(wide.dtype), FP8[self.dtype]))
        dst._scale_inv.copy_(1 / self.scale)
        return dst


def up(size: int, unit: int) -> int:
    return size + -size % unit


def tile_shape(shape: tuple[int, int], way: str) -> tuple[int, int]:
    """Of the scales of a matrix, in whole tiles."""
    X, Y = shape
    return (up(X, 128), up(Y // 32, 4)) if way == "rowwise" else (up(X // 32, 4), up(Y, 128))


class MXFP8TensorStorage:
    def __init__(
        self, rowwise_data: Tensor | None, rowwise_scale_inv: Tensor | None, columnwise_data: Tensor | None,
        columnwise_scale_inv: Tensor | None, fp8_dtype: DType, quantizer: Any, with_gemm_swizzled_scales: bool,
        *, fake_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.found = {
            "rowwise_data": rowwise_data, "rowwise_scale_inv": rowwise_scale_inv, "columnwise_data": columnwise_data,
            "columnwise_scale_inv": columnwise_scale_inv, "fp8_dtype": DType(fp8_dtype), "quantizer": quantizer,
            "with_gemm_swizzled_scales": with_gemm_swizzled_scales, "fake_dtype": fake_dtype,
        }  # fmt: skip

    def get_metadata(self) -> dict[str, Any]:
        return self.found

    def numbers(self, way: str) -> Tensor:
        data, scale = self.found[f"{way}_data"], self.found[f"{way}_scale_inv"]
        check(data is not None, f"Input is missing {way} usage")
        check(data.dtype == scale.dtype == torch.uint8, "raw bytes")
        check(data.is_contiguous() and scale.is_contiguous(), "a pointer and two sizes")
        check(not self.found["with_gemm_swizzled_scales"], "scales are compact")
        (X, Y), kind = data.shape, FP8[self.found["fp8_dtype"]]
        check(X % 32 == 0 and Y % 32 == 0, "MXFP8 requires tensor dims that are divisible by 32")
        check(tuple(scale.shape) == tile_shape((X, Y), way), f"unexpected shape of scales {tuple(scale.shape)}")
        used = scale[:X, : Y // 32] if way == "rowwise" else scale[: X // 32, :Y]
        factor = torch.where(used == 255, torch.nan, torch.exp2(used.double() - 127))
        return data.view(kind).double() * factor.repeat_interleave(32, dim=1 if way == "rowwise" else 0)


class MXFP8Quantizer(Quantizer):
    def __init__(
        self, fp8_dtype: DType, *, rowwise: bool = True, columnwise: bool = True, with_2d_quantization: bool = False
    ) -> None:
        super().__init__(rowwise=rowwise, columnwise=columnwise)
        check(not with_2d_quantization, "not used")
        self.dtype = DType(fp8_dtype)

    def quantize_impl(self, tensor: Tensor) -> MXFP8TensorStorage:
        check(device.blackwell, "MXFP8 before Blackwell")
        check(tensor.dim() == 2, "the stand-in takes matrices")
        check(all(size % 32 == 0 for size in tensor.shape), "MXFP8 requires tensor dims that are divisible by 32")
        device.calls.append("cast of blocks")
        made: dict[str, Any] = {}
        for way, used in (("rowwise", self.rowwise_usage), ("columnwise", self.columnwise_usage)):
            made[f"{way}_data"], made[f"{way}_scale_inv"] = self.cast(tensor, way) if used else (None, None)
        return MXFP8TensorStorage(
            **made, fp8_dtype=self.dtype, quantizer=self, with_gemm_swizzled_scales=False, fake_dtype=tensor.dtype
        )

    def cast(self, tensor: Tensor, way: str) -> tuple[Tensor, Tensor]:
        fp8 = FP8[self.dtype]
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        blocks = (wide if way == "rowwise" else wide.t()).unflatten(1, (-1, 32))
        amax = blocks.abs().nan_to_num(0.0, posinf=torch.inf).amax(-1)
        ratio = amax.float() * (1 / torch.tensor(torch.finfo(fp8).max))
        part, exponent = torch.frexp(ratio)
        power = torch.where(part == 0.5, exponent - 1, exponent) + 127  # rounded up
        power = torch.where(ratio == 0, 0, torch.where(ratio.isinf(), 254, power)).clamp(0, 254)
        values = blocks * torch.exp2(127 - power.to(wide.dtype))[..., None]
        data, scale = saturated(values, fp8).flatten(1), power.to(torch.uint8)
        if way == "columnwise":
            data, scale = data.t(), scale.t()
        whole = torch.full(tile_shape(tuple(tensor.shape), way), UNUSED, dtype=torch.uint8)
        whole[: scale.shape[0], : scale.shape[1]] = scale
        return data.contiguous(), whole


def multiplied(A: Any, B: Any, *, layout: str, out: Tensor, use_split_accumulator: bool) -> None:
    """D = B A into `out`, as cuBLAS would: its matrices are the transposed ones."""
    check(layout in ("TN", "NN", "NT"), f"GEMM layout {layout} not supported.")
    check(type(A) is type(B) and isinstance(A, (Float8TensorStorage, MXFP8TensorStorage)), "two quantised matrices")
    check(use_split_accumulator, "sums are in fp32")
    kinds = [m._fp8_dtype if isinstance(m, Float8TensorStorage) else m.found["fp8_dtype"] for m in (A, B)]
    check(kinds != [DType.kFloat8E5M2] * 2, "E5M2 by E5M2 is no product of cuBLAS")
    turn_a, turn_b = layout[0] == "T", layout[1] == "T"
    a, b = A.numbers("rowwise" if turn_a else "columnwise"), B.numbers("columnwise" if turn_b else "rowwise")
    a, b = a.t() if turn_a else a, b.t() if turn_b else b
    check(out.is_contiguous(), "Output tensor is not contiguous.")
    check(out.dtype in device.types and tuple(out.shape) == (b.shape[0], a.shape[1]), "GEMM output has invalid dims")
    out.copy_(b @ a)


def general_gemm(
    A: Any, B: Any, out_dtype: torch.dtype | None = None, quantization_params: Any = None, gelu: bool = False,
    gelu_in: Any = None, alpha: float = 1.0, beta: float | None = None, accumulate: bool = False, layout: str = "TN",
    out: Tensor | None = None, bias: Any = None, use_split_accumulator: bool = False, grad: bool = False, ub: Any = None,
    ub_type: Any = None, extra_output: Any = None, bulk_overlap: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    check(not any((gelu, accumulate, grad, bulk_overlap)) and alpha == 1.0, "not used")
    check(all(x is None for x in (quantization_params, gelu_in, beta, bias, ub, ub_type, extra_output)), "not used")
    check(out is not None and out_dtype in (None, out.dtype), "GEMM output has invalid dtype")
    device.calls.append("product")
    multiplied(A, B, layout=layout, out=out, use_split_accumulator=use_split_accumulator)
    return out, None, None, None


def general_grouped_gemm(
    A: list[Any], B: list[Any], out: list[Tensor], quantization_params: list[Any], out_dtype: torch.dtype,
    layout: str = "TN", m_splits: list[int] | None = None, gelu: bool = False, grad: bool = False,
    accumulate: bool = False, bias: Any = None, use_bias: bool = False, use_split_accumulator: bool = False,
    D_dtype: Any = None, single_output: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    check(not any((gelu, grad, accumulate, use_bias, single_output)) and bias is D_dtype is None, "not used")
    check(m_splits == [o.shape[0] for o in out], "rows of each, a list of int on the C++ side")
    check(all(q is None for q in quantization_params), "not used")
    check(len(A) == len(B) == len(out) == len(quantization_params), "one of each")
    check(all(o.dtype == out_dtype for o in out), "one type")
    device.calls.append("grouped product")
    for a, b, o in zip(A, B, out, strict=True):
        multiplied(a, b, layout=layout, out=o, use_split_accumulator=use_split_accumulator)
    return out, bias, None


engine = SimpleNamespace(
    DType=DType,
    Float8Quantizer=Float8Quantizer,
    Float8TensorStorage=Float8TensorStorage,
    MXFP8Quantizer=MXFP8Quantizer,
    MXFP8TensorStorage=MXFP8TensorStorage,
    cpp_extensions=SimpleNamespace(general_gemm=general_gemm, general_grouped_gemm=general_grouped_gemm),
)


@contextlib.contextmanager
def used(*, blackwell: bool = False, doubles: bool = False) -> Iterator[Device]:
    """In place of the real one. `doubles`: takes fp64, too, which the real one does not, so that layouts can be compared in it."""
    global device
    before, device = device, Device(blackwell=blackwell, doubles=doubles)
    try:
        # Not in sys.modules: `import megatron.core` would take what it finds there for the whole of it.
        with mock.patch.object(te_products, "_engine", return_value=engine):
            yield device
    finally:
        device = before
