"""The low bits of wide rows, packed beside the video: what is uniform costs there what it is worth.

H.265's residual coding spends 15 % more than the entropy on rows of 7 bits a sample and 5 % on rows of
2 (x265, lossless). The low bits of such a wide row are as good as uniform, so the picture gets
the rest only. How many they are follows from the calibration and the step; no side data says it.
Measured on real symbols of SmolLM2-135M at `near`: 1.050 times the order-0 entropy instead of 1.113,
with 8-bit pictures instead of 12 (keeping 1 bit more in the pictures 1.061, 1 less 1.048).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvfetcher.codec.ladder.inverse import LowBits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

MAX_SHIFT = 8
"""Largest number of low bits; they fit into a byte."""

# A row keeps its whole integers up to a deviation of 4 steps: those are the rows that a reader may
# multiply in 8 bits (`inverse.LEADING_STEPS`), so only rows in float32 ever have low bits.
_LIMITS = 2.0 ** np.arange(2, 2 + MAX_SHIFT)


class PackedLowBits(NamedTuple):
    """The low bits of one transform as they are stored."""

    shifts: NDArray[np.uint8]
    """[w] low bits of each row that has any; the first rows of the transform, descending."""
    planes: NDArray[np.uint8]
    """[sum of shifts, ceil(T / 8)]: bit 0 of every row, then bit 1 of those that have two, ..."""

    @property
    def counts(self) -> list[int]:
        """Rows that have more than 0, 1, 2, ... low bits."""
        most = int(self.shifts.max(initial=0))
        return [int(np.count_nonzero(self.shifts > bit)) for bit in range(most)]

    def unpack(self, num_tokens: int) -> LowBits:
        """Bytes of low bits; inverse of `cut`."""
        low = np.zeros((len(self.shifts), num_tokens), np.uint8)
        at = 0
        for bit, count in enumerate(self.counts):
            packed = self.planes[at : at + count]
            plane = np.unpackbits(packed, axis=1, count=num_tokens, bitorder="little")
            low[:count] |= plane << np.uint8(bit)
            at += count
        return LowBits(self.shifts, low)


def row_shifts(sigma: NDArray[np.float32], step: float) -> NDArray[np.uint8]:
    """Low bits of each row that has any: as many j of 1 to 8 as ``sigma > step * 2**(j + 1)``.

    Args:
        sigma: [m] deviations of a transform's coded components, descending.
        step: step of the quantiser; a binary32 number.
    """
    found = np.searchsorted(_LIMITS * float(step), sigma.astype(np.float64), side="left")
    return found[found > 0].astype(np.uint8)


def cut(integers: NDArray[np.int32], shifts: NDArray[np.uint8]) -> bytes:
    """Take the low bits out of the first rows of one transform's integers [m, T], in place.

    Returns:
        The bytes of `PackedLowBits.planes`.
    """
    wide = integers[: len(shifts)]
    low = wide.astype(np.uint8)  # modulo 256; what is above a row's shift is not looked at
    wide >>= shifts[:, None]
    counts = PackedLowBits(shifts, low).counts
    planes = (low[:count] >> np.uint8(bit) for bit, count in enumerate(counts))
    return b"".join(
        np.packbits(plane & np.uint8(1), axis=1, bitorder="little").tobytes() for plane in planes
    )


def packed_bytes(shifts: Iterable[NDArray[np.uint8]], num_tokens: int) -> int:
    """Bytes of the section, from the shifts of every transform."""
    return sum(int(s.sum(dtype=np.int64)) for s in shifts) * (-(-num_tokens // 8))


def split(
    planes: NDArray[np.uint8], shifts: Sequence[NDArray[np.uint8]]
) -> Iterator[PackedLowBits]:
    """The low bits of each transform out of the section's lines; views of them."""
    at = 0
    for of_rows in shifts:
        stop = at + int(of_rows.sum(dtype=np.int64))
        yield PackedLowBits(of_rows, planes[at:stop])
        at = stop
