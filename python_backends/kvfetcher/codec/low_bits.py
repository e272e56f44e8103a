"""The low bits of wide rows, packed beside the video: what is uniform costs there what it is worth.

H.265's residual coding spends 15 % more than the entropy on rows of 7 bits a sample and 5 % on rows of
2 (x265, lossless). The low bits of such a wide row are as good as uniform, so the picture gets
the rest only. How many they are follows from the calibration and the step; no side data says it.
Measured on real symbols of SmolLM2-135M at `near`: 1.050 times the order-0 entropy instead of 1.113,
with 8-bit pictures instead of 12 (keeping 1 bit more in the pictures 1.061, 1 less 1.048).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.errors import FormatError
from kvfetcher.transform.inverse import LowBits

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

LOW_BITS = 24
"""Section kind."""
MAX_SHIFT = 8
"""So that the low bits of an integer fit into a byte."""

# A row keeps its whole integers up to a deviation of 4 steps: those are the rows that a reader may
# multiply in 8 bits (`inverse.LEADING_STEPS`), so only rows in float32 ever have low bits.
_LIMITS = 2.0 ** np.arange(2, 2 + MAX_SHIFT)


def row_shifts(sigma: NDArray[np.float32], step: float) -> NDArray[np.uint8]:
    """Low bits of each row that has any: as many j of 1 to 8 as ``sigma > step * 2**(j + 1)``.

    Args:
        sigma: [m] deviations of a transform's coded components, descending.
        step: of the quantiser; a binary32 number.
    """
    found = np.searchsorted(_LIMITS * float(step), sigma.astype(np.float64), side="left")
    return found[found > 0].astype(np.uint8)


def cut(integers: NDArray[np.int32], shifts: NDArray[np.uint8]) -> bytes:
    """Take the low bits out of the first rows of one transform's integers [m, T], in place.

    Returns:
        The packed bits: bit 0 of every row that has low bits, then bit 1 of those that have two, ...
    """
    wide = integers[: len(shifts)]
    low = wide.astype(np.uint8)  # modulo 256; what is above a row's shift is not looked at
    wide >>= shifts[:, None]
    planes = (low[:count] >> np.uint8(bit) for bit, count in enumerate(_counts(shifts)))
    return b"".join(
        np.packbits(plane & np.uint8(1), axis=1, bitorder="little").tobytes() for plane in planes
    )


def packed_bytes(shifts: Iterable[NDArray[np.uint8]], num_tokens: int) -> int:
    """Bytes of the section, from the shifts of every transform."""
    return sum(int(s.sum(dtype=np.int64)) for s in shifts) * (-(-num_tokens // 8))


def unpack(
    data: bytes | memoryview, shifts: Sequence[NDArray[np.uint8]], num_tokens: int
) -> list[LowBits]:
    """The low bits of each transform; inverse of `cut`.

    Raises:
        FormatError: a bit behind a row's last token is set.
    """
    row_bytes = -(-num_tokens // 8)
    packed = np.frombuffer(data, np.uint8).reshape(-1, row_bytes)
    if num_tokens % 8 and np.any(packed[:, -1] >> (num_tokens % 8)):
        raise FormatError("unused bits of the unit's low bits must be 0")
    found, at = [], 0
    for of_rows in shifts:
        low = np.zeros((len(of_rows), num_tokens), np.uint8)
        for bit, count in enumerate(_counts(of_rows)):
            plane = np.unpackbits(
                packed[at : at + count], axis=1, count=num_tokens, bitorder="little"
            )
            low[:count] |= plane << np.uint8(bit)
            at += count
        found.append(LowBits(of_rows, low))
    return found


def _counts(shifts: NDArray[np.uint8]) -> list[int]:
    """Rows that have more than 0, 1, 2, ... low bits; they are the first ones."""
    most = int(shifts.max(initial=0))
    return [int(np.count_nonzero(shifts > bit)) for bit in range(most)]
