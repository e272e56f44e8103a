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

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.digest import integer_digest
from kvfetcher.codec.symbols import to_symbols
from kvfetcher.codec.unit import (
    TRANSFORM,
    Unit,
    video_sections,
    write_unit,
)
from kvfetcher.codec.video import encode_planes
from kvfetcher.errors import CodecError
from kvfetcher.transform.artifact import LADDER, Calibration
from kvfetcher.transform.floats import to_float32
from kvfetcher.transform.groups import to_vectors
from kvfetcher.transform.product import multiply
from kvfetcher.transform.rope import unrotate_keys

if TYPE_CHECKING:
    from kvfetcher.spec import KVSpec

RAW_TOKENS = 19
RAW_VALUES = 20

ONLY_VARIANT = "-"

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
        return f"{self.name}/1 calibration={self.calibration.digest()}"

    def variants(self) -> tuple[str, ...]:
        return (ONLY_VARIANT,)

    def layer_groups(self, spec: KVSpec, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """The calibration's layer groups."""
        grouping = self.calibration.grouping
        return tuple(zip(grouping.layer_starts, grouping.layer_counts, strict=True))

    def encode(self, source: UnitSource, variant: str) -> bytes:
        """One unit's bytes.

        Raises:
            CodecError: the values are not of the calibration's geometry or layer groups.
        """
        calibration = self.calibration
        group = _layer_group(calibration, source.spec, source.layer_start, source.num_layers)
        step = np.float32(calibration.steps[self.name])
        values = to_float32(source.values, source.spec.dtype)
        raw = _raw_tokens(values, source.first_position, calibration.sink_tokens)
        values[:, :, :, raw] = 0
        rope = calibration.rope.slice(source.layer_start, source.num_layers)
        unrotate_keys(values[:, 0], rope, source.first_position)
        ranks = _ranks(calibration, group, self.name)
        parts = []
        for head_group, heads in enumerate(calibration.grouping.head_ranges):
            matrices = calibration.matrices((group, head_group), ranks)
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
        layout = _Layout.fit(len(parts), ranks, tokens)
        integers = np.zeros((layout.grid.num_rows, tokens), np.int32)
        for index, part in enumerate(parts):
            part[:, raw] = 0
            np.rint(part, out=part)
            integers[layout.first_row(index) : layout.first_row(index) + ranks] = part
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
                bytes.fromhex(calibration.digest()),
                float(step),
                group,
                ranks,
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
