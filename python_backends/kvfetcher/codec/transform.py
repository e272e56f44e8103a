"""Profiles near, balanced, compact and tiny: calibrated transform, one step, H.265 of integers.

Encode: keys before rotation, z = A (x - mean), q = round(z / step); components by descending
deviation are rows, tokens are columns of all-intra pictures. Tokens that the transform was not made
for (the attention sinks, values that are not finite, outliers) are kept exact beside the video.
Restore: one matrix product per (layer group, head group), rotation, rounding to the KV dtype.
The integers are exact on any machine and have the digest; the floats after them are not part of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.codec.base import ONLY_VARIANT
from kvfetcher.codec.digest import integer_digest
from kvfetcher.codec.raw_tokens import (
    RAW_TOKENS,
    RAW_VALUES,
    put_raw_tokens,
    raw_sections,
    raw_tokens,
)
from kvfetcher.codec.symbols import (
    ESCAPE_INDICES,
    ESCAPE_VALUES,
    TRANSFORM,
    apply_escapes,
    check_integers,
    checked_planes,
    to_symbols,
)
from kvfetcher.codec.unit import Unit, video_sections, write_unit
from kvfetcher.codec.video import encode_planes
from kvfetcher.errors import CodecError, ConfigError, FormatError, UnsupportedVersionError
from kvfetcher.layout import NUM_PLANES, RowGrid
from kvfetcher.quant import MAX_MAGNITUDE, bits_to_float32
from kvfetcher.transform.artifact import LADDER, Calibration
from kvfetcher.transform.groups import from_vectors, to_vectors
from kvfetcher.transform.library import find_calibration
from kvfetcher.transform.product import multiply, round_to_bits
from kvfetcher.transform.rope import rotate_keys, unrotate_keys

if TYPE_CHECKING:
    from kvfetcher.codec.base import Integers, UnitSource
    from kvfetcher.spec import KVSpec


_MAX_FRAME_COLUMNS = 1024
_MAX_FRAME_ROWS = 2048
# digest of the calibration, step, layer group, rank, frame_rows, frame_columns, num_escapes,
# num_raw_tokens
_PARAMS = struct.Struct("<32sfIIIIII")
# |z / step| beyond this is an outlier whose token is kept exact; far inside int32 and float32.
_MAX_INTEGER = 1 << 23


@dataclass(frozen=True)
class TransformProfile:
    """Encoder of one rung of the ladder."""

    name: str
    calibration: Calibration

    def __post_init__(self) -> None:
        if self.name not in LADDER:
            raise CodecError(f"transform profile must be one of {LADDER}, got {self.name!r}")

    @property
    def identity(self) -> str:
        return f"{self.name}/1 calibration={self.calibration.digest}"

    def variants(self) -> tuple[str, ...]:
        return (ONLY_VARIANT,)

    def layer_groups(self, spec: KVSpec, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """The calibration's layer groups."""
        grouping = self.calibration.grouping
        return tuple(zip(grouping.layer_starts, grouping.layer_counts, strict=True))

    def encode(self, source: UnitSource, variant: str) -> bytes:
        """One unit's bytes.

        Takes at most 19 bytes of memory per element beside the encoder's own (measured); the
        calibration's matrices are shared by all threads.

        Raises:
            FormatError: the values are not of the calibration's geometry or layer groups.
        """
        calibration = self.calibration
        group = _layer_group(calibration, source.spec, source.layer_start, source.num_layers)
        step = np.float32(calibration.steps[self.name])
        values = bits_to_float32(source.values, source.spec.dtype)
        raw = raw_tokens(
            values, source.first_position, calibration.sink_tokens, limit=MAX_MAGNITUDE
        )
        values[:, :, :, raw] = 0
        rope = calibration.rope.slice(source.layer_start, source.num_layers)
        unrotate_keys(values[:, 0], rope, source.first_position)
        rank = calibration.unit_rank(group, self.name)
        parts = []
        for head_group, heads in enumerate(calibration.grouping.head_ranges):
            matrices = calibration.matrices((group, head_group), rank)
            vectors = to_vectors(values, heads)
            vectors -= matrices.mean
            scaled = multiply(matrices.forward, vectors.T)
            scaled *= np.float32(1) / step
            parts.append(scaled)
        outliers = np.flatnonzero(
            np.any([np.abs(part).max(axis=0) > _MAX_INTEGER for part in parts], axis=0)
        )
        raw = np.union1d(raw, outliers)
        tokens = source.num_tokens
        layout = _Layout.fit(len(parts), rank, tokens)
        integers = np.zeros((layout.grid.num_rows, tokens), np.int32)
        for index, part in enumerate(parts):
            part[:, raw] = 0
            np.rint(part, out=part)
            integers[layout.first_row(index) : layout.first_row(index) + rank] = part
        symbols = to_symbols(integers)
        grid = layout.grid
        planes = grid.place(
            symbols.samples, bit_depth=symbols.bit_depth, padding=1 << (symbols.bit_depth - 1)
        )
        unit = Unit(
            profile=TRANSFORM,
            spec=source.spec,
            layer_start=source.layer_start,
            num_layers=source.num_layers,
            num_tokens=tokens,
            first_position=source.first_position,
            geometry=grid.geometry(symbols.bit_depth),
            params=_PARAMS.pack(
                bytes.fromhex(calibration.digest),
                float(step),
                group,
                rank,
                grid.frame_rows,
                grid.frame_columns,
                symbols.num_escapes,
                len(raw),
            ),
            integer_digest=integer_digest(symbols.samples),
            sections=(
                *video_sections(encode_planes(planes, bit_depth=symbols.bit_depth)),
                *symbols.sections,
                *raw_sections(source.values, raw),
            ),
        )
        return write_unit(unit)


def restore_transform(unit: Unit, planes: Integers) -> Integers:
    """Values [Lg, K, H, T, D] of a transform unit; takes 12 bytes of memory per element.

    Raises:
        ChecksumError: the decoded integers differ from those that were saved.
        FormatError: the unit breaks the profile's rules.
        UnsupportedVersionError: its calibration is not on this machine.
    """
    if len(unit.params) != _PARAMS.size:
        raise FormatError(
            f"a transform unit has {_PARAMS.size} parameter bytes, got {len(unit.params)}"
        )
    digest, step, group, rank, frame_rows, frame_columns, num_escapes, num_raw = _PARAMS.unpack(
        unit.params
    )
    unit.require_sections(ESCAPE_INDICES, ESCAPE_VALUES, RAW_TOKENS, RAW_VALUES)
    if not 1e-30 < step < 1e30:
        raise FormatError(f"step of the unit must be a positive number, got {step}")
    try:
        calibration = find_calibration(digest.hex())
    except ConfigError as exc:
        raise UnsupportedVersionError(f"transform unit: {exc}") from exc
    if group != _layer_group(calibration, unit.spec, unit.layer_start, unit.num_layers):
        raise FormatError(f"unit says layer group {group}, its layers are another")
    head_ranges = calibration.grouping.head_ranges
    layout = _Layout.of(len(head_ranges), rank, unit.num_tokens, frame_rows, frame_columns)
    samples = layout.grid.gather(checked_planes(unit, layout.grid, planes))
    check_integers(unit, samples)
    half = np.float32(1 << (unit.geometry.bit_depth - 1))
    integers = np.subtract(samples, half, dtype=np.float32)
    apply_escapes(unit, num_escapes, integers)
    integers *= np.float32(step)
    values = np.empty(unit.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for index, heads in enumerate(head_ranges):
            matrices = calibration.matrices((group, index), rank)
            first = layout.first_row(index)
            vectors = multiply(integers[first : first + rank].T, matrices.inverse)
            vectors += matrices.mean
            from_vectors(vectors, values, heads)
        rope = calibration.rope.slice(unit.layer_start, unit.num_layers)
        rotate_keys(values[:, 0], rope, unit.first_position)
        result = round_to_bits(values, unit.spec.dtype)
    put_raw_tokens(unit, num_raw, result)
    return result


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the rows of each head group lie.

    A whole number of pictures each, so that a rank that owns some heads decodes only theirs.
    """

    grid: RowGrid
    rows_per_group: int

    @classmethod
    def fit(cls, num_groups: int, rank: int, num_tokens: int) -> _Layout:
        one = RowGrid.fit(
            rank, num_tokens, max_frame_rows=_MAX_FRAME_ROWS, max_frame_columns=_MAX_FRAME_COLUMNS
        )
        return cls.of(num_groups, rank, num_tokens, one.frame_rows, one.frame_columns)

    @classmethod
    def of(
        cls, num_groups: int, rank: int, num_tokens: int, frame_rows: int, frame_columns: int
    ) -> _Layout:
        one = RowGrid(rank, num_tokens, frame_rows, frame_columns)
        rows = one.num_blocks * NUM_PLANES * frame_rows
        total = rows * (num_groups - 1) + rank
        return cls(RowGrid(total, num_tokens, frame_rows, frame_columns), rows)

    def first_row(self, head_group: int) -> int:
        return head_group * self.rows_per_group


def _layer_group(calibration: Calibration, spec: KVSpec, layer_start: int, num_layers: int) -> int:
    """Index of the calibration's layer group that a unit covers.

    Raises:
        FormatError: geometry or layers are not the calibration's.
    """
    ours, grouping = calibration.spec, calibration.grouping
    for name in ("num_layers", "num_kv_heads", "head_dim", "kv_factor"):
        if getattr(ours, name) != getattr(spec, name):
            raise FormatError(
                f"calibration is for {name} {getattr(ours, name)}, the values have"
                f" {getattr(spec, name)}; calibrate this model"
            )
    groups = list(zip(grouping.layer_starts, grouping.layer_counts, strict=True))
    if (layer_start, num_layers) not in groups:
        raise FormatError(
            f"layers {layer_start} to {layer_start + num_layers - 1} are not a group of the"
            f" calibration ({groups})"
        )
    return groups.index((layer_start, num_layers))
