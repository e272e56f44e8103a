"""Signed integers <-> pictures: rows of like spread, neutral grey for zero, escapes for the rest.

Shared by the transform profiles. The picture's bit depth is the smallest that leaves few escapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvfetcher.errors import ChecksumError, FormatError
from kvfetcher.format.digest import integer_digest
from kvfetcher.format.pictures import BIT_DEPTHS
from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import Section, Unit, packed_section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.codec.layout import RowGrid
    from kvfetcher.format.pictures import Integers


# An escape costs about 40 bits, a deeper picture nothing (10 and 12 bit measured equal), but 8 bit
# pictures code and decode faster and take half the memory.
MAX_ESCAPES = 1e-4


class Symbols(NamedTuple):
    """Integers split into what a picture holds and what it does not."""

    samples: Integers
    """Same shape as the integers; uint8 at 8 bits, else uint16."""
    bit_depth: int
    sections: tuple[Section, ...]
    num_escapes: int


def to_symbols(integers: NDArray[np.int32]) -> Symbols:
    """Split integers into samples and escapes, at the smallest bit depth with few escapes."""
    flat = integers.reshape(-1)
    size = np.abs(flat)
    for bit_depth in BIT_DEPTHS:
        limit = (1 << (bit_depth - 1)) - 1
        escaped = np.flatnonzero(size > limit)
        if escaped.size <= MAX_ESCAPES * flat.size:
            break
    shifted = np.clip(integers, -limit, limit) + (limit + 1)
    samples: Integers = shifted.astype(np.uint8) if bit_depth == 8 else shifted.astype(np.uint16)
    return Symbols(
        samples,
        bit_depth,
        escape_sections(integers, escaped),
        int(escaped.size),
    )


def escape_sections(
    integers: NDArray[np.int32], escaped: NDArray[np.int64]
) -> tuple[Section, Section]:
    """The two sections of integers that samples do not hold, at rising positions in C order."""
    return escape_sections_of(escaped, integers.reshape(-1)[escaped])


def escape_sections_of(
    places: NDArray[np.int64], values: NDArray[np.int32]
) -> tuple[Section, Section]:
    """`escape_sections` of integers that were picked out already."""
    return (
        packed_section(SectionKind.ESCAPE_INDICES, places.astype("<u4").tobytes()),
        packed_section(SectionKind.ESCAPE_VALUES, values.astype("<i4").tobytes()),
    )


def escapes(
    unit: Unit, num_escapes: int, num_integers: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Places and values of the integers that a unit's pictures do not hold.

    Args:
        unit: holds the escape sections.
        num_escapes: as the unit's parameters say.
        num_integers: how many there are; places count through them in C order.

    Raises:
        FormatError: an index is out of range or out of order.
    """
    indices = np.frombuffer(
        unit.section(SectionKind.ESCAPE_INDICES, num_bytes=4 * num_escapes), "<u4"
    )
    values = np.frombuffer(
        unit.section(SectionKind.ESCAPE_VALUES, num_bytes=4 * num_escapes), "<i4"
    )
    places = indices.astype(np.int64)
    if num_escapes and (np.any(indices[1:] <= indices[:-1]) or int(places[-1]) >= num_integers):
        raise FormatError(f"escape indices of the unit must rise and stay below {num_integers}")
    return places, values


def apply_escapes(unit: Unit, num_escapes: int, integers: NDArray[np.float32]) -> None:
    """Put a unit's escaped integers where they belong, in place.

    Args:
        unit: holds the escape sections.
        num_escapes: as the unit's parameters say.
        integers: C-contiguous integers from the samples, as floats.

    Raises:
        FormatError: as `escapes`.
    """
    places, values = escapes(unit, num_escapes, integers.size)
    integers.reshape(-1)[places] = values


def read_corrections(unit: Unit, num_escapes: int, samples: Integers, neutral: int) -> Corrections:
    """A unit's escapes as differences from what the samples say.

    Args:
        unit: holds the escape sections.
        num_escapes: as the unit's parameters say.
        samples: C-contiguous.
        neutral: the sample of integer 0.

    Raises:
        FormatError: an index is out of range or out of order.
    """
    indices, values = escapes(unit, num_escapes, samples.size)
    amounts = values.astype(np.float32) - (
        samples.reshape(-1)[indices].astype(np.float32) - np.float32(neutral)
    )
    return Corrections(indices, amounts)


def check_integers(unit: Unit, samples: Integers) -> None:
    """Compare decoded samples with the unit's digest.

    Raises:
        ChecksumError: they differ.
    """
    check_digest(unit, integer_digest(samples))


def check_digest(unit: Unit, digest: int) -> None:
    """Compare the digest of a unit's integers with the one that the unit states.

    Raises:
        ChecksumError: they differ.
    """
    if digest != unit.integer_digest:
        raise ChecksumError(
            f"unit of layers {unit.layer_start} to {unit.layer_start + unit.num_layers - 1}: the"
            " decoded integers differ from those saved; the decoder or the unit is damaged"
        )


def check_pictures(unit: Unit, grid: RowGrid) -> None:
    """Check that the unit's pictures are those of the grid.

    Raises:
        FormatError: they are not.
    """
    expected = grid.geometry(unit.geometry.bit_depth)
    if unit.geometry != expected:
        raise FormatError(f"pictures of the unit are {unit.geometry}, its values need {expected}")


class Corrections(NamedTuple):
    """Integers that differ from their samples: position ``row * T + t``, rising, and by how much."""

    positions: NDArray[np.int64]
    amounts: NDArray[np.float32]

    def of_rows(self, rows: slice, num_tokens: int) -> Corrections:
        """Those of some rows, counted from the first of them."""
        start, stop = np.searchsorted(
            self.positions, (rows.start * num_tokens, rows.stop * num_tokens)
        )
        first = rows.start * num_tokens
        return Corrections(self.positions[start:stop] - first, self.amounts[start:stop])
