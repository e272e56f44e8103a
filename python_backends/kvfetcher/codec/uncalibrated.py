"""Profile `uncalibrated`: works at once on any model, several times larger than the ladder.

Every channel minus its mean over the chunk, one step per layer and K or V, plain rounding; no rotation
is undone and no artifact is needed, because all that restoring needs is in the unit. The first
tokens of a sequence are kept exact, as in the ladder: without that attention breaks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.codec.frame_size import EvenUnits, row_grid
from kvfetcher.codec.layout import RowGrid
from kvfetcher.codec.quant import MAX_MAGNITUDE, bits_to_float32, float32_to_bits
from kvfetcher.codec.raw_tokens import put_raw_tokens, raw_sections, raw_tokens
from kvfetcher.codec.symbols import apply_escapes, check_integers, check_pictures, to_symbols
from kvfetcher.codec.video import encode_for
from kvfetcher.errors import FormatError
from kvfetcher.format.digest import integer_digest
from kvfetcher.format.sections import ProfileCode, SectionKind
from kvfetcher.format.unit import Unit, packed_section, video_sections, write_unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvfetcher.codec.base import UnitSource
    from kvfetcher.format.pictures import Integers
    from kvfetcher.format.unit import Section
    from kvfetcher.spec import KVSpec

SINK_TOKENS = 4

_PARAMS = struct.Struct("<IIII")  # frame_rows, frame_columns, num_escapes, num_raw_tokens
CLASSES_PER_UNIT = 8.0
# Of the root mean square of a layer's K or V around its channel means.
STEP = 0.25


@dataclass(frozen=True, slots=True)
class UncalibratedProfile(EvenUnits):
    """Encoder of profile `uncalibrated`."""

    @property
    def identity(self) -> str:
        return "uncalibrated/1"

    def encode(self, source: UnitSource, variant: str) -> bytes:
        """One unit's bytes; any values, those that are not finite exactly."""
        values = bits_to_float32(source.values, source.spec.dtype)
        layers, _, _, tokens, _ = values.shape
        raw = raw_tokens(values, source.first_position, SINK_TOKENS, limit=MAX_MAGNITUDE)
        coded = np.setdiff1d(np.arange(tokens), raw)
        values[:, :, :, raw] = 0
        count = max(coded.size, 1)
        means = (values.sum(axis=3, keepdims=True, dtype=np.float64) / count).astype(np.float32)
        values -= means
        values[:, :, :, raw] = 0
        power = np.square(values, dtype=np.float64).mean(axis=(2, 3, 4)) * (tokens / count)
        steps = (STEP * np.sqrt(power)).astype(np.float32)
        divisors = np.where(steps > 0, steps, np.float32(1))
        integers = np.rint(values / divisors[:, :, None, None, None]).astype(np.int32)
        rows = np.ascontiguousarray(integers.swapaxes(3, 4)).reshape(-1, tokens)
        spreads = _spread_classes(rows)
        symbols = to_symbols(rows[_order(spreads)])
        grid = row_grid(len(rows), tokens, variant)
        depth = symbols.bit_depth
        planes = grid.place(symbols.samples, bit_depth=depth, padding=1 << (depth - 1))
        rest = UncalibratedRest(
            grid=grid,
            bit_depth=depth,
            integer_digest=integer_digest(symbols.samples),
            num_escapes=symbols.num_escapes,
            escapes=symbols.sections,
            num_raw_tokens=len(raw),
            raw=raw_sections(source.values, raw),
            means=means,
            steps=steps,
            spreads=spreads,
        )
        return rest.write(
            encode_for(source, planes, bit_depth=depth),
            spec=source.spec,
            layer_start=source.layer_start,
            num_layers=layers,
            num_tokens=tokens,
            first_position=source.first_position,
        )


@dataclass(frozen=True, slots=True)
class UncalibratedRest:
    """All of a unit but its video and what it is of."""

    grid: RowGrid
    bit_depth: int
    integer_digest: int
    num_escapes: int
    escapes: tuple[Section, ...]
    num_raw_tokens: int
    raw: tuple[Section, ...]
    means: NDArray[np.float32]
    """One for each channel, in order."""
    steps: NDArray[np.float32]
    """[Lg, K]"""
    spreads: NDArray[np.uint8]
    """Class of each channel."""

    def write(
        self,
        packets: Sequence[bytes],
        *,
        spec: KVSpec,
        layer_start: int,
        num_layers: int,
        num_tokens: int,
        first_position: int,
    ) -> bytes:
        """The unit's bytes.

        Args:
            packets: access units of its pictures.
            spec: geometry of the whole model.
            layer_start: the unit's first layer.
            num_layers: number of layers of the unit.
            num_tokens: number of tokens of the unit.
            first_position: position of its first token.
        """
        grid = self.grid
        unit = Unit(
            profile=ProfileCode.UNCALIBRATED,
            spec=spec,
            layer_start=layer_start,
            num_layers=num_layers,
            num_tokens=num_tokens,
            first_position=first_position,
            geometry=grid.geometry(self.bit_depth),
            params=_PARAMS.pack(
                grid.frame_rows, grid.frame_columns, self.num_escapes, self.num_raw_tokens
            ),
            integer_digest=self.integer_digest,
            sections=(
                *video_sections(packets),
                *self.escapes,
                *self.raw,
                packed_section(SectionKind.MEANS, self.means.astype("<f4").tobytes()),
                packed_section(SectionKind.STEPS, self.steps.astype("<f4").tobytes()),
                packed_section(SectionKind.SPREADS, self.spreads.tobytes()),
            ),
        )
        return write_unit(unit)


@dataclass(frozen=True, slots=True)
class UncalibratedPlan:
    """What an `uncalibrated` unit needs to be restored, checked."""

    grid: RowGrid
    num_escapes: int
    num_raw_tokens: int
    order: NDArray[np.int64]
    """Channel of each row."""
    means: NDArray[np.float32]
    """[Lg, K, H, 1, D]"""
    steps: NDArray[np.float32]
    """[Lg, K, 1, 1, 1]"""


def plan_uncalibrated(unit: Unit) -> UncalibratedPlan:
    """Read a unit's side data and check it against its pictures.

    Raises:
        FormatError: the unit breaks the profile's rules.
    """
    if len(unit.params) != _PARAMS.size:
        raise FormatError(
            f"an uncalibrated unit has {_PARAMS.size} parameter bytes, got {len(unit.params)}"
        )
    frame_rows, frame_columns, num_escapes, num_raw = _PARAMS.unpack(unit.params)
    unit.require_sections(
        SectionKind.ESCAPE_INDICES,
        SectionKind.ESCAPE_VALUES,
        SectionKind.EXACT_TOKENS,
        SectionKind.EXACT_TOKEN_VALUES,
        SectionKind.MEANS,
        SectionKind.STEPS,
        SectionKind.SPREADS,
    )
    layers, factor, heads, tokens, dims = unit.shape
    channels = unit.num_elements // tokens
    grid = RowGrid(channels, tokens, frame_rows, frame_columns)
    check_pictures(unit, grid)
    means = np.frombuffer(unit.section(SectionKind.MEANS, num_bytes=4 * channels), "<f4")
    steps = np.frombuffer(unit.section(SectionKind.STEPS, num_bytes=4 * layers * factor), "<f4")
    spreads = np.frombuffer(unit.section(SectionKind.SPREADS, num_bytes=channels), np.uint8)
    if not (np.isfinite(means).all() and np.isfinite(steps).all()):
        raise FormatError("means and steps of the unit must be finite")
    return UncalibratedPlan(
        grid,
        num_escapes,
        num_raw,
        _order(spreads),
        means.reshape(layers, factor, heads, 1, dims),
        steps.reshape(layers, factor, 1, 1, 1),
    )


def restore_uncalibrated(unit: Unit, planes: Integers) -> Integers:
    """Values [Lg, K, H, T, D] of an `uncalibrated` unit; the same bits on any machine.

    Raises:
        ChecksumError: the decoded integers differ from those that were saved.
        FormatError: the unit breaks the profile's rules.
    """
    plan = plan_uncalibrated(unit)
    samples = plan.grid.gather(planes)
    check_integers(unit, samples)
    integers = samples.astype(np.float32)
    integers -= np.float32(1 << (unit.geometry.bit_depth - 1))
    apply_escapes(unit, plan.num_escapes, integers)
    rows = np.empty_like(integers)
    rows[plan.order] = integers
    layers, factor, heads, tokens, dims = unit.shape
    values = np.ascontiguousarray(rows.reshape(layers, factor, heads, dims, tokens).swapaxes(3, 4))
    with np.errstate(over="ignore", invalid="ignore"):
        values *= plan.steps
        values += plan.means
        result = float32_to_bits(values, unit.spec.dtype)
    put_raw_tokens(unit, plan.num_raw_tokens, result)
    return result


def _spread_classes(rows: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Deviation of each row [N, T] in eighths; from exact sums, so that all machines agree."""
    count = rows.shape[1]
    wide = rows.astype(np.int64)
    totals = wide.sum(axis=1).astype(np.float64)
    squares = np.einsum("nt,nt->n", wide, wide).astype(np.float64)
    deviations = np.sqrt(np.maximum(count * squares - totals * totals, 0)) / count
    return np.minimum(deviations * CLASSES_PER_UNIT, 255.0).astype(np.uint8)


def _order(spreads: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Channel of each row: by spread class, then by channel."""
    return np.argsort(spreads, kind="stable")
