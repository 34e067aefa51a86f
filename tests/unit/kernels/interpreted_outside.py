"""What `benchmarks.outside_products` counts, against counting by hand (through Triton's interpreter: kernels
are what is counted)."""

from __future__ import annotations

import pytest

from benchmarks import outside_products as counted


@pytest.fixture(scope="module")
def pieces():
    return counted.pieces()


def of(piece):
    return counted.moved(piece.plain, *piece.leaves), piece.fused and counted.moved(piece.fused, *piece.leaves)


def test_gather(pieces):
    """2 bytes a value, f_c = 2 rows: 2 * 4 forward; backward writes zeros, copies them, reads rows and reads and writes targets, or
    reads rows and writes tokens. Indices are half a percent of it."""
    plain, fused = of(pieces["gather"])
    assert plain == pytest.approx(8 + 2 + 4 + 12, abs=0.2)
    assert fused == pytest.approx(8 + 4 + 2, abs=0.6)


def test_gate_and_sum(pieces):
    plain, fused = of(pieces["gate and sum"])
    assert fused == pytest.approx((4 + 2) + (4 + 4 + 4), abs=0.8), (
        "rows in, tokens out; gradient and rows in, gradient of rows out"
    )
    assert plain > 2.5 * fused


def test_norm_and_modulation(pieces):
    plain, fused = of(pieces["norm and modulation"])
    assert fused == pytest.approx((2 + 2) + (2 + 2 + 2) + 1, abs=0.5), "partial sums in fp32 for every 16 tokens: 1"
    assert plain > 2.5 * fused


def test_what_a_lean_layer_makes_again():
    found = counted.lean_gelu()
    assert found["fused"] == pytest.approx(4 * 8 * 2, abs=0.1), (
        "h and da in, a and dh out, 4 f_c values of 2 bytes each"
    )
    assert found["plain"] > 2 * found["fused"]
