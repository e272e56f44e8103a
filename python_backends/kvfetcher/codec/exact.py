"""Profile `exact`: bit-exact KV values; exponents as video, sign and mantissa beside it.

Each channel's exponents minus their median are small integers; channels sorted by spread are rows,
tokens are columns. The arithmetic is modulo 2^E, so NaN, infinities and denormals are ordinary bits.
Measured on SmolLM2-135M, bf16: see docs/format.md, section 5.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.codec.frame_size import EvenUnits, row_grid
from kvfetcher.codec.layout import RowGrid
from kvfetcher.codec.video import encode_for
from kvfetcher.errors import ChecksumError, FormatError
from kvfetcher.format.digest import integer_digest
from kvfetcher.format.sections import ProfileCode, SectionKind
from kvfetcher.format.unit import Unit, packed_section, video_sections, write_unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.codec.base import UnitSource
    from kvfetcher.format.pictures import Integers

_BIT_DEPTH = 8
_NEUTRAL = 128
_PARAMS = struct.Struct("<II")  # frame_rows, frame_columns

# Spread classes are eighths of a standard deviation: finer ones gain nothing (the sort only groups
# channels of like statistics), coarser ones lose.
_CLASSES_PER_UNIT = 8.0


@dataclass(frozen=True, slots=True)
class FloatBits:
    """Where the exponent and the rest lie in a dtype's bit pattern."""

    exponent_bits: int
    mantissa_bits: int
    remainder_fields: tuple[int, ...]
    """Widths, low bits first, in which the sign and mantissa are stored; each divides 8."""

    @property
    def item_dtype(self) -> np.dtype[Any]:
        bits = 1 + self.exponent_bits + self.mantissa_bits
        return np.dtype(np.uint8) if bits == 8 else np.dtype("<u2")

    def remainder_bytes(self, num_elements: int) -> int:
        return sum(-(-num_elements * width // 8) for width in self.remainder_fields)


FLOAT_BITS = {
    "bfloat16": FloatBits(8, 7, (8,)),
    "float16": FloatBits(5, 10, (8, 2, 1)),
    "float8_e4m3fn": FloatBits(4, 3, (4,)),
}


@dataclass(frozen=True, slots=True)
class ExactProfile(EvenUnits):
    """Encoder of profile `exact`."""

    @property
    def identity(self) -> str:
        return "exact/1"

    def encode(self, source: UnitSource, variant: str) -> bytes:
        """One unit's bytes; any bit pattern is representable."""
        bits = FLOAT_BITS[source.spec.dtype]
        values = source.values
        tokens, dims = values.shape[3:]
        exponents = ((values >> bits.mantissa_bits) & _ones(bits.exponent_bits)).astype(np.uint8)
        # [Lg, K, H, T, D] -> [channels, T]
        rows = np.ascontiguousarray(exponents.reshape(-1, tokens, dims).swapaxes(1, 2))
        rows = rows.reshape(-1, tokens)
        medians = np.partition(rows, tokens // 2, axis=1)[:, tokens // 2].copy()
        half = 1 << (bits.exponent_bits - 1)
        rows -= medians[:, None]
        rows += np.uint8(half)
        rows &= np.uint8(_ones(bits.exponent_bits))
        rows += np.uint8(_NEUTRAL - half)
        spreads = np.minimum(rows.std(axis=1, dtype=np.float32) * _CLASSES_PER_UNIT, 255.0)
        spreads = spreads.astype(np.uint8)
        grid = row_grid(len(rows), tokens, variant)
        planes = grid.place(rows[_order(spreads)], bit_depth=_BIT_DEPTH, padding=_NEUTRAL)
        unit = Unit(
            profile=ProfileCode.EXACT,
            spec=source.spec,
            layer_start=source.layer_start,
            num_layers=source.num_layers,
            num_tokens=tokens,
            first_position=source.first_position,
            geometry=grid.geometry(_BIT_DEPTH),
            params=_PARAMS.pack(grid.frame_rows, grid.frame_columns),
            integer_digest=integer_digest(values),
            sections=(
                *video_sections(encode_for(source, planes, bit_depth=_BIT_DEPTH, fast=True)),
                packed_section(SectionKind.MEDIANS, medians.tobytes()),
                packed_section(SectionKind.EXPONENT_SPREADS, spreads.tobytes()),
                packed_section(SectionKind.REMAINDERS, _pack_remainders(values, bits)),
            ),
        )
        return write_unit(unit)


@dataclass(frozen=True, slots=True)
class ExactPlan:
    """What an `exact` unit needs to be restored, checked."""

    bits: FloatBits
    grid: RowGrid
    row_of_channel: NDArray[np.int64]
    medians: NDArray[np.uint8]
    """[channels]"""
    remainders: bytes | memoryview
    """Packed: see `FloatBits.remainder_fields`."""


def plan_exact(unit: Unit) -> ExactPlan:
    """Read a unit's side data and check it against its pictures.

    Raises:
        FormatError: the unit breaks the profile's rules.
    """
    unit.require_sections(SectionKind.MEDIANS, SectionKind.EXPONENT_SPREADS, SectionKind.REMAINDERS)
    bits = FLOAT_BITS[unit.spec.dtype]
    channels = unit.num_elements // unit.num_tokens
    grid = _grid(unit, channels)
    medians = np.frombuffer(unit.section(SectionKind.MEDIANS, num_bytes=channels), np.uint8)
    spreads = np.frombuffer(
        unit.section(SectionKind.EXPONENT_SPREADS, num_bytes=channels), np.uint8
    )
    row_of_channel = np.empty(channels, np.int64)
    row_of_channel[_order(spreads)] = np.arange(channels)
    packed = unit.section(SectionKind.REMAINDERS, num_bytes=bits.remainder_bytes(unit.num_elements))
    return ExactPlan(bits, grid, row_of_channel, medians, packed)


def restore_exact(unit: Unit, planes: Integers) -> Integers:
    """Values [Lg, K, H, T, D] of an `exact` unit, checked against its integer digest.

    Raises:
        ChecksumError: the values differ from those that were saved.
        FormatError: the unit breaks the profile's rules.
    """
    plan = plan_exact(unit)
    bits = plan.bits
    tokens, dims = unit.num_tokens, unit.spec.head_dim
    remainders = _unpack_remainders(plan.remainders, bits, unit.num_elements)
    remainders = remainders.reshape(-1, tokens, dims)
    exponents = plan.grid.gather(planes, plan.row_of_channel)
    exponents += (plan.medians - np.uint8(_NEUTRAL))[:, None]
    exponents = exponents.reshape(-1, dims, tokens)

    values = np.empty(remainders.shape, bits.item_dtype)
    mantissa = bits.mantissa_bits
    # Head by head: the passes below stay in the core's cache.
    for exponent, remainder, value in zip(exponents, remainders, values, strict=True):
        np.copyto(value, exponent.T)
        value &= _ones(bits.exponent_bits)
        value <<= mantissa
        value |= remainder & _ones(mantissa)
        sign = (remainder >> mantissa).astype(bits.item_dtype)
        sign <<= mantissa + bits.exponent_bits
        value |= sign
    result = values.reshape(unit.shape)
    check_exact(unit, integer_digest(result))
    return result


def check_exact(unit: Unit, digest: int) -> None:
    """Compare the digest of restored values with the one that an `exact` unit states.

    Raises:
        ChecksumError: they differ.
    """
    if digest != unit.integer_digest:
        raise ChecksumError(
            f"unit of layers {unit.layer_start} to {unit.layer_start + unit.num_layers - 1}: the"
            " restored values differ from those saved; the decoder or the unit is damaged"
        )


def _grid(unit: Unit, channels: int) -> RowGrid:
    if len(unit.params) != _PARAMS.size:
        raise FormatError(f"an exact unit has {_PARAMS.size} parameter bytes: {len(unit.params)}")
    frame_rows, frame_columns = _PARAMS.unpack(unit.params)
    grid = RowGrid(channels, unit.num_tokens, frame_rows, frame_columns)
    if unit.geometry != grid.geometry(_BIT_DEPTH):
        raise FormatError(
            f"pictures of the unit are {unit.geometry}, its values need {grid.geometry(_BIT_DEPTH)}"
        )
    return grid


def _order(spreads: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Channel of each row: by spread class, then by channel."""
    return np.argsort(spreads, kind="stable")


def _ones(bits: int) -> int:
    return (1 << bits) - 1


def _pack_remainders(values: Integers, bits: FloatBits) -> bytes:
    """Sign and mantissa of every element, field after field."""
    flat = values.reshape(-1)
    mantissa = bits.mantissa_bits
    remainders = (flat >> (mantissa + bits.exponent_bits)) << mantissa | flat & _ones(mantissa)
    parts = []
    shift = 0
    for width in bits.remainder_fields:
        field = ((remainders >> shift) & _ones(width)).astype(np.uint8)
        parts.append(_pack(field, width).tobytes())
        shift += width
    return b"".join(parts)


def _unpack_remainders(data: bytes | memoryview, bits: FloatBits, num_elements: int) -> Integers:
    fields = bits.remainder_fields
    packed = np.frombuffer(data, np.uint8)
    if fields == (8,):
        return packed
    remainders = np.zeros(num_elements, bits.item_dtype)
    at = shift = 0
    for width in fields:
        stop = at + -(-num_elements * width // 8)
        field = _unpack(packed[at:stop], width)[:num_elements]
        remainders |= field.astype(bits.item_dtype) << shift
        at, shift = stop, shift + width
    return remainders


def _pack(field: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """`width`-bit numbers into bytes, the first in the lowest bits."""
    per_byte = 8 // width
    padded = np.zeros(-(-field.size // per_byte) * per_byte, np.uint8)
    padded[: field.size] = field
    lanes = padded.reshape(-1, per_byte)
    packed = lanes[:, 0].copy()
    for lane in range(1, per_byte):
        packed |= lanes[:, lane] << np.uint8(lane * width)
    return packed


def _unpack(packed: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    per_byte = 8 // width
    lanes = np.empty((packed.size, per_byte), np.uint8)
    for lane in range(per_byte):
        lanes[:, lane] = (packed >> np.uint8(lane * width)) & np.uint8(_ones(width))
    return lanes.reshape(-1)
