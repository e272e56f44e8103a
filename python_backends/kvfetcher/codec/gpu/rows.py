"""Where a unit's integers lie while a GPU restores it, and what of them needs more than that.

Those of leading rows (`transform.inverse`) are float16 [rows, T]: one, or two where they may pass 2048,
``high * 2**HIGH_BITS + low``. Those of trailing rows are 8-bit integers [T, columns]: tensor cores take
8-bit operands only with what is summed over side by side. A trailing integer beyond 8 bits is an escape,
and the rest of it a few more coefficients in float16 (`Extra`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvfetcher.codec.base import LeftToCpuError
from kvfetcher.codec.ladder.low_bits import MAX_SHIFT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HIGH_BITS = 10
"""The high part of an integer counts in 2**10: up to 2**21 float16 holds it and the rest exactly, and up
to 2**25 both have 11 bits, as the inverse transform has."""
EXACT_HALF = 2048
"""Integers up to this are exact in float16."""
TILE_ROWS = 32
"""Rows that one program unpacks: 32 bytes of a token where they are trailing."""
RANK8 = 128
"""Number of trailing coefficients multiplied at one time; columns are padded to a multiple."""
RANK_EXTRA = 16
"""Extra ones."""
EXTRA_FACTOR = 256
"""What some of them count: so they are a float16 up to 2**24."""

_BITS8 = -128, 127
# Larger integers are left to the CPU: encoders keep such tokens exact.
_MAX_INTEGER = 1 << 25
# In a trailing row. It is twice what encoders let pass.
_MAX_EXTRA = 1 << 24
_NOWHERE = -1


class Part(NamedTuple):
    """The rows of one transform among those of a unit's pictures, and where their integers go."""

    rows: slice
    num_leading: int
    """The first rows, which are float16; the others are trailing."""
    first_leading: int
    """Their first row among all leading ones."""
    first_trailing: int
    """The others' first column, a multiple of RANK8."""

    @property
    def num_trailing(self) -> int:
        """Without padding."""
        return self.rows.stop - self.rows.start - self.num_leading

    @property
    def num_columns(self) -> int:
        """Number of columns of the trailing rows, with padding."""
        return padded_trailing(self.num_trailing)


class RowTables(NamedTuple):
    """A unit's rows as the kernels take them (`gpu_kernels.unpack_rows`, `put_escapes`)."""

    low_bits: NDArray[np.uint8]
    """[rows] number of them."""
    lines: NDArray[np.int32]
    """[rows, MAX_SHIFT] line of each low bit: transform after transform, bit after bit."""
    tiles: NDArray[np.int32]
    """[tiles, 4] first row, the one behind the last, first leading row, first column; -1 = none."""
    places: NDArray[np.int32]
    """[rows] leading row, or -1 - column."""


class Extra(NamedTuple):
    """What some trailing integers of a transform are beyond 8 bits."""

    columns: NDArray[np.int32]
    """[k] twice the trailing row, and 1 more where amounts are to be multiplied by EXTRA_FACTOR; k is a
    multiple of RANK_EXTRA, the last ones may stand for nothing."""
    amounts: NDArray[np.float16]
    """[k, T] to be added to them; a row may come thrice."""


class LargeEscapes(NamedTuple):
    """What a unit's escapes need beside their places, for each of its transforms."""

    num_high: Sequence[int]
    """First leading rows that need two float16."""
    extra: Sequence[Extra]
    """Empty = nothing."""


class RowPlan(NamedTuple):
    """The rows of a unit's pictures, the same in all units of its kind."""

    parts: Sequence[Part]
    """Each transform's."""
    shifts: Sequence[NDArray[np.uint8]]
    """Low bits of each transform's first rows; others have none."""
    num_high: Sequence[int]
    """First rows of each transform whose samples with their low bits are beyond one float16."""
    tables: RowTables
    half: int
    """Samples without low bits are from -half to half - 1."""

    @property
    def num_leading(self) -> int:
        return sum(part.num_leading for part in self.parts)

    @property
    def num_trailing(self) -> int:
        """Columns, with padding."""
        return sum(part.num_columns for part in self.parts)

    def large_escapes(
        self, places: NDArray[np.int64], values: NDArray[np.int32], num_tokens: int
    ) -> LargeEscapes:
        """Those that their rows' kind of integer does not hold.

        Args:
            places: places of the unit's escapes, ``row * num_tokens + token``.
            values: of them, without low bits.
            num_tokens: the unit's.

        Raises:
            LeftToCpuError: an integer is beyond what a GPU adds up exactly.
        """
        # Packed units have thousands of escapes, of which few are beyond what samples can be.
        large = np.flatnonzero((values >= self.half) | (values < -self.half))
        if not len(large):
            return LargeEscapes(self.num_high, ())
        rows, tokens = np.divmod(places[large], num_tokens)
        sizes = values[large].astype(np.int64)
        num_high, extra = [], []
        for part, wide, least in zip(self.parts, self.shifts, self.num_high, strict=True):
            row = rows - part.rows.start
            leading = (row >= 0) & (row < part.num_leading)
            num_high.append(max(least, _num_high(row[leading], sizes[leading], wide)))
            row -= part.num_leading
            trailing = (row >= 0) & (row < part.num_trailing)
            extra.append(_extra(row[trailing], tokens[trailing], sizes[trailing], num_tokens))
        has_extra = any(len(one.columns) for one in extra)
        return LargeEscapes(num_high, extra if has_extra else ())


def plan_rows(
    num_rows: int,
    rows_of: Sequence[slice],
    num_leading: Sequence[int],
    shifts: Sequence[NDArray[np.uint8]],
    bit_depth: int,
) -> RowPlan:
    """Rows of a unit.

    Args:
        num_rows: number of rows of its pictures, or packed.
        rows_of: each transform, rising; there may be rows between them that belong to none.
        num_leading: of each transform.
        shifts: low bits of each transform's first rows, which are leading.
        bit_depth: bit depth of the pictures; 8 where any row is trailing.
    """
    low_bits = np.zeros(num_rows, np.uint8)
    lines = np.zeros((num_rows, MAX_SHIFT), np.int32)
    places = np.zeros(num_rows, np.int32)
    half = 1 << (bit_depth - 1)
    parts: list[Part] = []
    num_high: list[int] = []
    tiles: list[tuple[int, int, int, int]] = []
    line = leading = column = end = 0
    for rows, count, wide in zip(rows_of, num_leading, shifts, strict=True):
        low_bits[rows.start : rows.start + len(wide)] = wide
        for bit in range(int(wide.max(initial=0))):
            has_bit = int(np.count_nonzero(wide > bit))
            lines[rows.start : rows.start + has_bit, bit] = np.arange(line, line + has_bit)
            line += has_bit
        num_high.append(int(np.count_nonzero(half << wide.astype(np.int64) > EXACT_HALF)))
        middle = rows.start + count
        places[rows.start : middle] = leading + np.arange(count)
        places[middle : rows.stop] = -1 - column - np.arange(rows.stop - middle)
        tiles += _tiles(end, rows.start)
        tiles += _tiles(rows.start, middle, leading=leading)
        tiles += _tiles(middle, rows.stop, column=column)
        part = Part(rows, count, leading, column)
        parts.append(part)
        leading, column, end = leading + count, column + part.num_columns, rows.stop
    tiles += _tiles(end, num_rows)
    tables = RowTables(low_bits, lines, np.array(tiles, np.int32), places)
    return RowPlan(parts, shifts, num_high, tables, half)


def plan_leading_rows(num_rows: int, bit_depth: int) -> RowPlan:
    """Rows without low bits or trailing ones."""
    everything = [slice(0, num_rows)]
    return plan_rows(num_rows, everything, [num_rows], [np.empty(0, np.uint8)], bit_depth)


def padded_trailing(num_trailing: int) -> int:
    """Number of columns of the trailing rows."""
    return -(-num_trailing // RANK8) * RANK8


def _tiles(
    start: int, stop: int, *, leading: int = _NOWHERE, column: int = _NOWHERE
) -> list[tuple[int, int, int, int]]:
    """`RowTables.tiles` of rows that go to these leading rows or columns, or nowhere."""
    return [
        (
            first,
            min(first + TILE_ROWS, stop),
            leading if leading == _NOWHERE else leading + first - start,
            column if column == _NOWHERE else column + first - start,
        )
        for first in range(start, stop, TILE_ROWS)
    ]


def _num_high(rows: NDArray[np.int64], sizes: NDArray[np.int64], wide: NDArray[np.uint8]) -> int:
    """How many first leading rows of a transform hold escapes that one float16 does not.

    Args:
        rows: rows of large escapes, among the transform's.
        sizes: of them.
        wide: low bits of the transform's first rows.
    """
    shifts = np.zeros(max(len(wide), int(rows.max(initial=-1)) + 1), np.int64)
    shifts[: len(wide)] = wide
    whole = (np.abs(sizes) + 1) << shifts[rows]
    if np.any(whole > _MAX_INTEGER):
        raise LeftToCpuError(f"an integer of the unit is beyond {_MAX_INTEGER}")
    return 1 + int(rows[whole > EXACT_HALF].max(initial=-1))


def _extra(
    rows: NDArray[np.int64],
    tokens: NDArray[np.int64],
    sizes: NDArray[np.int64],
    num_tokens: int,
) -> Extra:
    """What large escapes of a transform are beyond 8 bits.

    Args:
        rows: of them, among the transform's trailing ones.
        tokens: of them.
        sizes: of them.
        num_tokens: the unit's.
    """
    amounts = sizes - np.clip(sizes, *_BITS8)
    if np.any(np.abs(amounts) > _MAX_EXTRA):
        raise LeftToCpuError(f"a trailing integer of the unit is beyond {_MAX_EXTRA}")
    # Below 2048, a multiple of that below 2**15, one of 2**16: each is exact as a float16, the last
    # divided by EXTRA_FACTOR.
    low = (amounts + (1 << 10)) % (1 << 11) - (1 << 10)
    middle = (amounts - low + (1 << 15)) % (1 << 16) - (1 << 15)
    high = (amounts - low - middle) // EXTRA_FACTOR
    kinds = [(a, scaled) for a, scaled in ((low, 0), (middle, 0), (high, 1)) if np.any(a)]
    used, slot = np.unique(rows, return_inverse=True)
    count = -(-len(kinds) * len(used) // RANK_EXTRA) * RANK_EXTRA
    extra = Extra(np.zeros(count, np.int32), np.zeros((count, num_tokens), np.float16))
    for number, (parts, scaled) in enumerate(kinds):
        first = number * len(used)
        extra.columns[first : first + len(used)] = 2 * used + scaled
        extra.amounts[first + slot, tokens] = parts
    return extra
