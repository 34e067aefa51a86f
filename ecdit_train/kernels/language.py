"""Where Triton comes from, and whether a tensor's work goes to a kernel. The only importer of triton.

Triton comes with torch's CUDA wheels for Linux (2.13 brings 3.7.1) and with the extra `kernels`. Without it every
function of this room is its twin, and `require` is the one place that says no.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ecdit_train.errors import ConfigError, Problem

HERE = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed; not whether a device for it is there."""

if HERE:
    import triton
    import triton.language as tl
    from triton import jit, next_power_of_2

    constexpr = tl.constexpr
    INTERPRETED: bool = triton.knobs.runtime.interpret
    """Whether kernels were defined for Triton's interpreter, which runs them on CPU tensors, program by program."""
else:
    tl = constexpr = None  # type: ignore[assignment]
    INTERPRETED = False

    def jit(function):  # type: ignore[no-untyped-def, no-redef]
        """Kernels may be defined; nothing launches them."""
        return function

    def next_power_of_2(n: int) -> int:
        return 1 << max(n - 1, 0).bit_length()


TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""What kernels are written for: they compute in fp32. fp64 is the references' type, and the twins'."""


def launches(device: torch.device) -> bool:
    """Whether kernels run there."""
    return HERE and (device.type == "cuda" or (INTERPRETED and device.type == "cpu"))


def runs(x: Tensor) -> bool:
    """Whether a kernel takes `x`; if not, the twin does."""
    return x.dtype in TYPES and launches(x.device)


def require(*, field: str, value: str, nearest: str) -> None:
    """Raises ConfigError where `field` asks for Triton and it is not installed."""
    if not HERE:
        rule = "needs Triton, which torch's CUDA wheels for Linux and `pip install 'ecdit[kernels]'` bring"
        raise ConfigError(Problem(field=field, value=value, rule=rule, nearest=nearest))
