"""Rows of small integers packed side by side, each row at a width of its own: what needs no decoder.

For links that are faster than the decoders. Larger than the same rows as H.265 (SmolLM2-135M: 28 % at
`balanced`, 35 % at `compact`; tests/benchmarks/results/frame_sizes_packed.json), but a GPU unpacks them
while it restores, so that units in this form and units in pictures use link and decoders together. A
row's width is what makes its bits and its escapes take least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvfetcher.errors import FormatError
from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import Unit, packed_section, raw_section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.format.unit import Section

NEUTRAL = 128
"""The sample of integer 0."""
MAX_WIDTH = 8

# Position and integer of an escape, four bytes each before zstd.
_ESCAPE_BITS = 48
# Bits that an integer of -129 to 128 needs; the ends stand for all that is beyond 8 bits.
_NEEDED = np.array(
    [0 if h == 0 else 1 + max(h, -1 - h).bit_length() for h in range(-NEUTRAL - 1, NEUTRAL + 1)],
    np.uint8,
)


class PackedRows(NamedTuple):
    """Rows as they are stored: integer h of width w is the code ``h + 2**(w - 1)``, of width 0 it is 0."""

    widths: NDArray[np.uint8]
    """[N] bits of each row's codes, 0 to 8."""
    lines: NDArray[np.uint8]
    """[sum of widths, ceil(T / 8)]: bit 0 of row 0, its bit 1, ..., bit 0 of row 1, ..."""

    @property
    def first_lines(self) -> NDArray[np.int32]:
        """[N] number of each row's first line."""
        stops = np.cumsum(self.widths, dtype=np.int32)
        return stops - self.widths

    def unpack(self, num_tokens: int) -> NDArray[np.uint8]:
        """Samples [N, T], ``h + NEUTRAL``."""
        samples = np.full((len(self.widths), num_tokens), NEUTRAL, np.uint8)
        first = self.first_lines
        for width in np.unique(self.widths[self.widths > 0]).tolist():
            rows = np.flatnonzero(self.widths == width)
            codes = np.zeros((len(rows), num_tokens), np.uint8)
            for bit in range(width):
                lines = self.lines[first[rows] + bit]
                plane = np.unpackbits(lines, axis=1, count=num_tokens, bitorder="little")
                codes |= plane << np.uint8(bit)
            samples[rows] = codes + np.uint8(NEUTRAL - (1 << (width - 1)))
        return samples


class Packing(NamedTuple):
    """Integers split into packed rows and escapes."""

    samples: NDArray[np.uint8]
    """[N, T]; NEUTRAL where an integer is an escape."""
    sections: tuple[Section, Section]
    escaped: NDArray[np.int64]
    """Positions in C order, rising."""


def pack(integers: NDArray[np.int32]) -> Packing:
    """Split integers [N, T]."""
    needed = _NEEDED[np.clip(integers, -NEUTRAL - 1, NEUTRAL) + (NEUTRAL + 1)]
    row_bits = 8 * -(-integers.shape[1] // 8)
    costs = [
        width * row_bits + _ESCAPE_BITS * np.count_nonzero(needed > width, axis=1)
        for width in range(MAX_WIDTH + 1)
    ]
    widths = np.argmin(costs, axis=0).astype(np.uint8)
    is_escaped = needed > widths[:, None]
    kept = np.where(is_escaped, 0, integers)
    sections = (
        packed_section(SectionKind.PACKED_WIDTHS, widths.tobytes()),
        raw_section(SectionKind.PACKED_ROWS, _to_lines(kept, widths).tobytes()),
    )
    samples = (kept + NEUTRAL).astype(np.uint8)
    return Packing(samples, sections, np.flatnonzero(is_escaped))


def read_packed(unit: Unit, num_rows: int) -> PackedRows:
    """A unit's packed rows; the lines are a view of it.

    Raises:
        FormatError: a width is over 8, or a bit behind a row's last token is set.
    """
    widths = np.frombuffer(unit.section(SectionKind.PACKED_WIDTHS, num_bytes=num_rows), np.uint8)
    if widths.max() > MAX_WIDTH:
        raise FormatError(f"packed rows have 0 to {MAX_WIDTH} bits, the unit says {widths.max()}")
    line_bytes = -(-unit.num_tokens // 8)
    num_bytes = int(widths.sum(dtype=np.int64)) * line_bytes
    data = unit.section(SectionKind.PACKED_ROWS, num_bytes=num_bytes)
    return PackedRows(widths, read_lines(data, unit.num_tokens))


def read_lines(data: bytes | memoryview, num_tokens: int) -> NDArray[np.uint8]:
    """Lines [lines, ceil(T / 8)] of a bit for each token, the lowest bit of a byte first; a view.

    Raises:
        FormatError: a bit behind a line's last token is set.
    """
    lines = np.frombuffer(data, np.uint8).reshape(-1, -(-num_tokens // 8))
    if num_tokens % 8 and np.any(lines[:, -1] >> (num_tokens % 8)):
        raise FormatError("unused bits of the unit's packed lines must be 0")
    return lines


def _to_lines(integers: NDArray[np.int32], widths: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`PackedRows.lines` of integers [N, T] that fit their rows' widths."""
    num_tokens = integers.shape[1]
    empty = np.empty((int(widths.sum(dtype=np.int64)), -(-num_tokens // 8)), np.uint8)
    packed = PackedRows(widths, empty)
    first = packed.first_lines
    for width in np.unique(widths[widths > 0]).tolist():
        rows = np.flatnonzero(widths == width)
        codes = (integers[rows] + (1 << (width - 1))).astype(np.uint8)
        for bit in range(width):
            plane = (codes >> np.uint8(bit)) & np.uint8(1)
            packed.lines[first[rows] + bit] = np.packbits(plane, axis=1, bitorder="little")
    return packed.lines
