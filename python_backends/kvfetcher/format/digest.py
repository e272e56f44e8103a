"""The integer digest: did the decoder return the integers that the encoder saw?

Not cryptographic (SHA-256 in the chunk's table guards the bytes); made to run anywhere, also on a
GPU next to the restored values: a weighted sum modulo 2^64 whose terms are independent. A change of
one 32-bit word always changes it, because all weights are odd.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.format.pictures import MAX_VALUE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.format.pictures import Integers

BLOCK_WORDS = 1 << 14
"""32-bit words per block: its weights (128 KiB) stay in a core's L2 cache."""

MAX_BLOCKS = (MAX_VALUE_BYTES >> 2) // BLOCK_WORDS + 1
_MASK = (1 << 64) - 1


def integer_digest(values: Integers) -> int:
    """64-bit digest of integers, in C order of their little-endian bytes (docs/format.md, section 4).

    Args:
        values: any shape; C-contiguous ones are not copied.

    Example:
        >>> hex(integer_digest(np.arange(6, dtype=np.uint8)))
        '0x328717f2ec0f0fda'
        >>> hex(integer_digest(np.array([0, 1, 2, 3, 5, 4], np.uint8)))
        '0x28614bbbd46280cf'
    """
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    num_bytes = data.size
    whole = num_bytes // 4
    words = data[: whole * 4].view("<u4")
    weights = word_weights()
    total = num_bytes
    for index, start in enumerate(range(0, whole, BLOCK_WORDS)):
        block = words[start : start + BLOCK_WORDS]
        part = int(np.dot(block.astype(np.uint64), weights[: block.size]))
        total += part * _odd(~index & _MASK)
    if num_bytes % 4:
        tail = int.from_bytes(data[whole * 4 :].tobytes(), "little")
        total += tail * _odd(whole % BLOCK_WORDS) * _odd(~(whole // BLOCK_WORDS) & _MASK)
    return total & _MASK


def _odd(index: int) -> int:
    """SplitMix64's output function of `index`, made odd."""
    z = (index + 1) * 0x9E3779B97F4A7C15 & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return (z ^ (z >> 31)) | 1


@cache
def word_weights() -> NDArray[np.uint64]:
    """[BLOCK_WORDS] weight of each word within its block."""
    weights = np.array([_odd(index) for index in range(BLOCK_WORDS)], dtype=np.uint64)
    weights.flags.writeable = False
    return weights


@cache
def block_weights() -> NDArray[np.uint64]:
    """[MAX_BLOCKS] factor of each block: as many as the largest unit has."""
    weights = np.array([_odd(~index & _MASK) for index in range(MAX_BLOCKS)], dtype=np.uint64)
    weights.flags.writeable = False
    return weights
