"""Restoring vectors from integers: the product with a transform's inverse, mostly in 8-bit integers.

Most components have a deviation of a few steps at most, so their integers are small and whatever is
wrong with their rows of the inverse is weighted little. Where the CPU multiplies 8-bit integers (VNNI:
4 times float32's speed) these rows are rounded to 8 bits with one scale per value; that adds under 1 %
to the power of the quantiser's own noise. The sum over them is exact, so it is the same anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvfetcher.codec.ladder.product import add_scaled_product_int8, multiply_add
from kvfetcher.codec.symbols import Corrections

if TYPE_CHECKING:
    from kvfetcher.format.pictures import Integers

F32 = NDArray[np.float32]

LEADING_STEPS = 4.0
"""Components with a larger deviation, in steps, keep float32 rows."""
MIN_TRAILING = 128
"""Fewer rows than these are not worth a second product."""

_LOW, _HIGH = -128, 127


class LowBits(NamedTuple):
    """Bits below the samples of the first w rows: an integer is ``high * 2**shift + low``."""

    shifts: NDArray[np.uint8]
    """[w]."""
    low: NDArray[np.uint8]
    """[w, T]."""

    @property
    def factors(self) -> F32:
        """[w, 1] what the high part is to be multiplied with."""
        return np.ldexp(np.float32(1), self.shifts[:, None])


class SplitInverse(NamedTuple):
    """Axes: m components, the first h of them leading; n values."""

    leading: F32
    """[h, n]."""
    trailing: NDArray[np.int8]
    """[m - h, n]; component ``h + i`` is ``trailing[i] * scale``."""
    scale: F32
    """[n]."""
    mean: F32
    """[n]."""

    @classmethod
    def split(cls, inverse: F32, mean: F32, *, num_leading: int) -> SplitInverse:
        """Split the inverse [m, n] in float32; the first ``num_leading`` rows stay as they are."""
        leading, rest = inverse[:num_leading], inverse[num_leading:]
        scale = scale_of_8_bits(np.abs(rest).max(axis=0, initial=0.0))
        trailing = np.rint(rest / scale).astype(np.int8)
        return cls(np.ascontiguousarray(leading), trailing, scale, mean)

    def restore(
        self,
        samples: Integers,
        neutral: int,
        step: np.float32,
        corrections: Corrections,
        low_bits: LowBits | None = None,
    ) -> F32:
        """Vectors [T, n] = mean + step * integers.T @ inverse.

        Args:
            samples: [m, T] as they lie in the pictures.
            neutral: the sample of integer 0.
            step: step of the quantiser.
            corrections: where an integer is not ``sample - neutral``.
            low_bits: low bits of the first rows, all of them leading; None = there are none.
        """
        count, num_tokens = len(self.leading), samples.shape[1]
        first, rest = slice(0, count), slice(count, len(samples))
        leading = np.subtract(samples[first], np.float32(neutral), dtype=np.float32)
        changed = corrections.of_rows(first, num_tokens)
        leading.reshape(-1)[changed.positions] += changed.amounts
        if low_bits is not None:
            wide = leading[: len(low_bits.low)]
            wide *= low_bits.factors
            wide += low_bits.low
        leading *= step
        vectors = multiply_add(leading.T, self.leading, self.mean)
        if count == len(samples):
            return vectors
        small, cut = _to_int8(samples[rest], neutral)
        scale = self.scale * step
        add_scaled_product_int8(vectors, small.T, self.trailing, scale)
        for missing in (cut, corrections.of_rows(rest, num_tokens)):
            self._add_sparse(vectors, missing, scale)
        return vectors

    def _add_sparse(self, vectors: F32, missing: Corrections, scale: F32) -> None:
        """Add what the 8-bit product of the trailing components left out."""
        if not missing.positions.size:
            return
        rows, tokens = np.divmod(missing.positions, len(vectors))
        used_rows, row_index = np.unique(rows, return_inverse=True)
        used_tokens, token_index = np.unique(tokens, return_inverse=True)
        amounts = np.zeros((len(used_tokens), len(used_rows)), np.float32)
        amounts[token_index, row_index] = missing.amounts
        inverse = self.trailing[used_rows].astype(np.float32)
        vectors[used_tokens] += multiply_add(amounts, inverse, np.zeros_like(scale)) * scale


def scale_of_8_bits(largest: Any) -> Any:
    """Of each value, by the largest magnitude in its column of the trailing rows (numpy or torch)."""
    return (largest + (largest == 0)) / _HIGH


def _to_int8(samples: Integers, neutral: int) -> tuple[NDArray[np.int8], Corrections]:
    """Samples as integers within 8 bits, and what that cut off."""
    if samples.dtype == np.uint8:
        return (samples ^ np.uint8(neutral)).view(np.int8), _NOTHING
    integers = samples.view(np.int16) - np.int16(neutral)
    small = np.clip(integers, _LOW, _HIGH).astype(np.int8)
    positions = np.flatnonzero(integers != small)
    amounts = integers.reshape(-1)[positions] - small.reshape(-1)[positions]
    return small, Corrections(positions, amounts.astype(np.float32))


_NOTHING = Corrections(np.zeros(0, np.int64), np.zeros(0, np.float32))
