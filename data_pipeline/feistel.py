"""A permutation of any [0, n) without a table: a keyed 64-bit Feistel network with cycle-walking.

A Feistel network permutes [0, 4^h). For n that is no power of four, take the smallest 4^h >= n and walk: apply the
network again until the value is below n. Less than four rounds are expected, and the result is a permutation of
[0, n) because the walk follows one cycle of a permutation. All functions are vectorised and pure; one billion
indices need no memory beyond the ones asked for.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 key(s) from integers, broadcast together: `key(seed, epoch, lane, window)`. At least one-dimensional."""
    mixed = np.zeros(1, np.uint64)
    for part in parts:
        mixed = _mix(mixed + _GOLDEN + np.atleast_1d(np.asarray(part)).astype(np.uint64))
    return mixed


def permute(index: np.ndarray, *, size: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Image of every index under the permutation of [0, size) that `key` names.

    Args:
        index: int (K,), each within [0, size).
        size: scalar or (K,), 1 to 2^53; every index may live in a domain of its own.
        key: uint64, broadcast to (K,).

    Returns:
        int64 (K,), each within [0, size).
    """
    x = np.asarray(index).astype(np.uint64)
    size_K = np.broadcast_to(np.asarray(size, np.uint64), x.shape)
    key_K = np.broadcast_to(key, x.shape)
    # frexp's exponent is the bit length, exact below 2^53.
    bits = np.frexp((size_K - np.uint64(1)).astype(np.float64))[1]
    half_K = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    active = np.arange(len(x))
    while active.size:
        walked = _network(x[active], half_K[active], key_K[active])
        x[active] = walked
        active = active[walked >= size_K[active]]
    return x.astype(np.int64)


def _network(x: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for number in range(_ROUNDS):
        round_key = key + np.array(number + 1, np.uint64) * np.array([_GOLDEN])
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
