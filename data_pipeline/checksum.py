"""zlib's crc32, by Intel's ISA-L where it is installed: the same sum, several times as fast where zlib is the plain one."""

from __future__ import annotations

import zlib
from collections.abc import Callable

try:
    from isal.isal_zlib import crc32 as _fast
except ImportError:
    _fast = zlib.crc32

crc32: Callable[..., int] = _fast
"""(bytes, the sum of what came before them = 0) -> the sum"""
