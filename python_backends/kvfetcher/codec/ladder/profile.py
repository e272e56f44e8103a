"""Profiles near, balanced, compact and tiny: calibrated transform, one step, H.265 of integers.

Encode: keys before rotation, z = A (x - mean), q = round(z / step); components by descending
deviation are rows, tokens are columns of all-intra pictures. Tokens that the transform was not made
for (the attention sinks, values that are not finite, outliers) are kept exact beside the video.
Restore: one matrix product per (layer group, head group), rotation, rounding to the KV dtype.
The integers are exact on any machine and have the digest; the floats after them are not part of it.
"""

from __future__ import annotations

import functools
import itertools
import struct
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvfetcher.codec.frame_size import (
    check_frame_sizes,
    max_unit_layers,
    parse_frame_size,
    row_grid,
)
from kvfetcher.codec.ladder.groups import from_vectors, to_vectors
from kvfetcher.codec.ladder.library import find_calibration
from kvfetcher.codec.ladder.low_bits import cut, packed_bytes, row_shifts, split
from kvfetcher.codec.ladder.packed import PackedRows, pack, read_lines, read_packed
from kvfetcher.codec.ladder.product import multiply, round_to_bits
from kvfetcher.codec.ladder.rope import rotate_keys, unrotate_keys
from kvfetcher.codec.layout import NUM_PLANES, RowGrid
from kvfetcher.codec.quant import MAX_MAGNITUDE, bits_to_float32
from kvfetcher.codec.raw_tokens import put_raw_tokens, raw_sections, raw_tokens
from kvfetcher.codec.symbols import (
    check_integers,
    check_pictures,
    escape_sections,
    read_corrections,
    to_symbols,
)
from kvfetcher.codec.video import encode_for
from kvfetcher.errors import CodecError, ConfigError, FormatError, UnsupportedVersionError
from kvfetcher.format.digest import integer_digest
from kvfetcher.format.pictures import MAX_SIDE, MIN_SIDE, NO_PICTURES, ONLY_VARIANT
from kvfetcher.format.sections import ProfileCode, SectionKind
from kvfetcher.format.unit import (
    HAS_LOW_BITS,
    IS_PACKED,
    Unit,
    raw_section,
    video_sections,
    write_unit,
)
from kvfetcher.spec import LADDER, PACKED_VARIANT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from kvfetcher.codec.base import UnitSource
    from kvfetcher.codec.ladder.artifact import F32, Calibration
    from kvfetcher.codec.ladder.inverse import LowBits
    from kvfetcher.format.pictures import Integers, PlaneGeometry
    from kvfetcher.format.unit import Section
    from kvfetcher.spec import KVSpec


# digest of the calibration, step, first layer group, its rank, frame_rows, frame_columns,
# num_escapes, num_raw_tokens; then the rank of each further layer group
_PARAMS = struct.Struct("<32sfIIIIII")
_RANK = struct.Struct("<I")
_MAX_KINDS = 512
# Coefficients of a unit, at most, where a layer group has not more and no frame size is asked for. On a
# GPU it is restored in a fraction of a millisecond, but takes kv_restore about one of Python, and a
# picture costs whoever computes beside NVDEC as much as 4 MB of it: with a unit for each layer group
# of 256 tokens an H100 restores 0.4 of what 14 decoders give, with four in one 0.92, with eight 0.99
# (docs/gpu.md).
_UNIT_SAMPLES = 5 << 20
# Packed units of short chunks have half as many: the fetcher mixes them with pictures, and with large
# ones loses up to 6 % to nothing but packed units (simulated, jitter of 2 to 40 Gbit/s).
_SHORT_PACKED_SAMPLES = _UNIT_SAMPLES // 2
_SHORT_TOKENS = 1024
_NO_SHIFTS = np.empty(0, np.uint8)
# |z / step| beyond this is an outlier whose token is kept exact; far inside int32 and float32.
_MAX_INTEGER = 1 << 23


@dataclass(frozen=True)
class TransformProfile:
    """Encoder of one rung of the ladder."""

    name: str
    calibration: Calibration
    frame_sizes: tuple[str, ...] = ()
    """Largest picture of each variant, ``WIDTHxHEIGHT``; a unit has as many of the calibration's
    layer groups as fill one. None = one variant whose units have as many as make `_UNIT_SAMPLES`."""
    packed_copy: bool = False
    """One more variant: the same integers packed, without video."""

    def __post_init__(self) -> None:
        if self.name not in LADDER:
            raise CodecError(f"transform profile must be one of {LADDER}, got {self.name!r}")
        check_frame_sizes(self.frame_sizes)

    @property
    def identity(self) -> str:
        return f"{self.name}/1 calibration={self.calibration.digest}"

    def variants(self) -> tuple[str, ...]:
        pictures = self.frame_sizes or (ONLY_VARIANT,)
        return (*pictures, PACKED_VARIANT) if self.packed_copy else pictures

    def layer_groups(
        self, spec: KVSpec, num_tokens: int, variant: str
    ) -> tuple[tuple[int, int], ...]:
        """The calibration's layer groups, neighbours joined.

        As few units as can be, and none larger than so few need.
        """
        grouping = self.calibration.grouping
        groups = list(zip(grouping.layer_starts, grouping.layer_counts, strict=True))
        ranks = [self.calibration.unit_rank(index, self.name) for index in range(len(groups))]
        most_layers = max_unit_layers(spec, num_tokens)
        if variant in (ONLY_VARIANT, PACKED_VARIANT):
            is_short = variant == PACKED_VARIANT and num_tokens < _SHORT_TOKENS
            most = _SHORT_PACKED_SAMPLES if is_short else _UNIT_SAMPLES
            max_rows = most // max(num_tokens, MIN_SIDE)
        else:
            max_rows = parse_frame_size(variant).rows

        def num_units(rows: int) -> int:
            return len(_joined(groups, ranks, rows, most_layers))

        # A last unit with the remainder costs as much as a full one beside its samples: of four equal
        # ones in place of three and a rest an H100 decodes 1.1 times as much (3.5 bits, 256 tokens).
        fewest = num_units(max_rows)
        rows = bisect_left(range(max_rows), -fewest, key=lambda rows: -num_units(rows))
        return tuple(_joined(groups, ranks, rows, most_layers))

    def encode(self, source: UnitSource, variant: str) -> bytes:
        """One unit's bytes.

        Takes at most 19 bytes of memory per element beside the encoder's own (measured); the
        calibration's matrices are shared by all threads.

        Raises:
            FormatError: the values are not of the calibration's geometry or layer groups.
        """
        calibration = self.calibration
        groups = _layer_groups(calibration, source.spec, source.layer_start, source.num_layers)
        step = np.float32(calibration.steps[self.name])
        values = bits_to_float32(source.values, source.spec.dtype)
        raw = raw_tokens(
            values, source.first_position, calibration.sink_tokens, limit=MAX_MAGNITUDE
        )
        values[:, :, :, raw] = 0
        rope = calibration.rope.slice(source.layer_start, source.num_layers)
        unrotate_keys(values[:, 0], rope, source.first_position)
        ranks = tuple(calibration.unit_rank(group, self.name) for group in groups)
        parts = list(_forward(calibration, values, groups, ranks, step))
        outliers = np.flatnonzero(
            np.any([np.abs(part).max(axis=0) > _MAX_INTEGER for _, part in parts], axis=0)
        )
        raw = np.union1d(raw, outliers)
        tokens = source.num_tokens
        num_head_groups = len(calibration.grouping.head_ranges)
        is_packed = variant == PACKED_VARIANT
        if is_packed:
            layout = Layout.packed(num_head_groups, ranks, tokens)
        else:
            layout = Layout.fit(num_head_groups, ranks, tokens, variant)
        integers = np.zeros((layout.grid.num_rows, tokens), np.int32)
        low_bits = bytearray()
        for place, part in parts:
            part[:, raw] = 0
            np.rint(part, out=part)
            rows = integers[layout.rows_of(place)]
            rows[:] = part
            low_bits += cut(rows, _shifts(calibration, place, len(part), float(step)))
        coded = _pack(integers) if is_packed else _draw(integers, layout.grid, source)
        unit = Unit(
            profile=ProfileCode.TRANSFORM,
            spec=source.spec,
            layer_start=source.layer_start,
            num_layers=source.num_layers,
            num_tokens=tokens,
            first_position=source.first_position,
            geometry=coded.geometry,
            params=_PARAMS.pack(
                bytes.fromhex(calibration.digest),
                float(step),
                groups[0],
                ranks[0],
                *layout.frame,
                coded.num_escapes,
                len(raw),
            )
            + b"".join(_RANK.pack(rank) for rank in ranks[1:]),
            integer_digest=integer_digest(coded.samples),
            sections=(
                *coded.video,
                *coded.escapes,
                *raw_sections(source.values, raw),
                *((raw_section(SectionKind.LOW_BITS, bytes(low_bits)),) if low_bits else ()),
                *coded.packed,
            ),
            flags=(HAS_LOW_BITS if low_bits else 0) | (IS_PACKED if is_packed else 0),
        )
        return write_unit(unit)


def _joined(
    groups: Sequence[tuple[int, int]], ranks: Sequence[int], max_rows: int, max_layers: int
) -> list[tuple[int, int]]:
    """Layer groups (first layer, layers), neighbours joined up to the largest rows and layers."""
    joined: list[tuple[int, int]] = []
    rows_left = 0
    for (start, count), rank in zip(groups, ranks, strict=True):
        rows_left -= rank
        if joined and rows_left >= 0 and joined[-1][1] + count <= max_layers:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((start, count))
            rows_left = max_rows - rank
    return joined


class _Coded(NamedTuple):
    """A unit's integers, coded one way or the other."""

    samples: Integers
    geometry: PlaneGeometry
    num_escapes: int
    escapes: tuple[Section, ...]
    video: tuple[Section, ...] = ()
    packed: tuple[Section, ...] = ()


def _draw(integers: NDArray[np.int32], grid: RowGrid, source: UnitSource) -> _Coded:
    """Lay integers out as H.265 pictures."""
    symbols = to_symbols(integers)
    depth = symbols.bit_depth
    planes = grid.place(symbols.samples, bit_depth=depth, padding=1 << (depth - 1))
    packets = encode_for(source, planes, bit_depth=depth)
    return _Coded(
        symbols.samples,
        grid.geometry(depth),
        symbols.num_escapes,
        symbols.sections,
        video=video_sections(packets),
    )


def _pack(integers: NDArray[np.int32]) -> _Coded:
    """Without video."""
    packing = pack(integers)
    return _Coded(
        packing.samples,
        NO_PICTURES,
        len(packing.escaped),
        escape_sections(integers, packing.escaped),
        packed=packing.sections,
    )


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What a transform unit needs to be restored, checked: where each coefficient lies."""

    calibration: Calibration
    step: float
    num_escapes: int
    num_raw_tokens: int
    layout: Layout
    places: tuple[Place, ...]
    """Its transforms, in the order of their rows."""
    shifts: tuple[NDArray[np.uint8], ...]
    """Low bits of each transform's rows, those that have any in this unit."""
    low_planes: NDArray[np.uint8] | None
    """Them, [lines, ceil(T / 8)] (`low_bits.split`); None = the samples are whole integers."""
    packed: PackedRows | None
    """Its samples; None = they are in pictures."""

    def low_bits(self, num_tokens: int) -> Iterator[LowBits | None]:
        """Low bits of each transform."""
        if self.low_planes is None:
            return itertools.repeat(None, len(self.places))
        return (p.unpack(num_tokens) for p in split(self.low_planes, self.shifts))


def plan_restore(unit: Unit) -> RestorePlan:
    """Read a unit's parameters and check them against its calibration and pictures.

    Raises:
        FormatError: the unit breaks the profile's rules.
        UnsupportedVersionError: its calibration is not on this machine.
    """
    params = unit.params
    if len(params) < _PARAMS.size or (len(params) - _PARAMS.size) % _RANK.size:
        raise FormatError(
            f"a transform unit has {_PARAMS.size} parameter bytes and {_RANK.size} for each further"
            f" layer group, got {len(params)}"
        )
    has_low_bits, is_packed = unit.flags & HAS_LOW_BITS, unit.flags & IS_PACKED
    unit.require_sections(
        *(
            SectionKind.ESCAPE_INDICES,
            SectionKind.ESCAPE_VALUES,
            SectionKind.EXACT_TOKENS,
            SectionKind.EXACT_TOKEN_VALUES,
        ),
        *((SectionKind.LOW_BITS,) if has_low_bits else ()),
        *((SectionKind.PACKED_WIDTHS, SectionKind.PACKED_ROWS) if is_packed else ()),
    )
    digest, *fixed, num_escapes, num_raw_tokens = _PARAMS.unpack_from(params)
    try:
        calibration = find_calibration(digest.hex())
    except ConfigError as exc:
        raise UnsupportedVersionError(f"transform unit: {exc}") from exc
    kind = _kind_of(
        _PARAMS.pack(digest, *fixed, 0, 0) + params[_PARAMS.size :],
        unit.spec,
        unit.layer_start,
        unit.num_layers,
        unit.num_tokens,
    )
    if bool(is_packed) != kind.layout.is_packed:
        raise FormatError("a packed transform unit, and no other, has picture sides of 0")
    packed = None
    if is_packed:
        packed = read_packed(unit, kind.layout.grid.num_rows)
    else:
        check_pictures(unit, kind.layout.grid)
    shifts, low_planes = (_NO_SHIFTS,) * len(kind.places), None
    if has_low_bits:
        shifts, data = kind.shifts, unit.section(SectionKind.LOW_BITS, num_bytes=kind.low_bytes)
        low_planes = read_lines(data, unit.num_tokens)
    return RestorePlan(
        calibration,
        kind.step,
        num_escapes,
        num_raw_tokens,
        kind.layout,
        kind.places,
        shifts,
        low_planes,
        packed,
    )


def restore_transform(unit: Unit, planes: Integers) -> Integers:
    """Values [Lg, K, H, T, D] of a transform unit.

    With decoding it takes 16 bytes of memory per element (tests/benchmarks/bench_memory.py).

    Raises:
        ChecksumError: the decoded integers differ from those that were saved.
        FormatError: the unit breaks the profile's rules.
        UnsupportedVersionError: its calibration is not on this machine.
    """
    plan = plan_restore(unit)
    calibration, layout = plan.calibration, plan.layout
    if plan.packed is None:
        samples = layout.grid.gather(planes)
    else:
        samples = plan.packed.unpack(unit.num_tokens)
    check_integers(unit, samples)
    neutral = 1 << (unit.geometry.bit_depth - 1)
    corrections = read_corrections(unit, plan.num_escapes, samples, neutral)
    values = np.empty(unit.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        low_bits_of = plan.low_bits(unit.num_tokens)
        for place, low_bits in zip(plan.places, low_bits_of, strict=True):
            rows = layout.rows_of(place)
            inverse = calibration.inverse(place.transform, layout.ranks[place.number], plan.step)
            vectors = inverse.restore(
                samples[rows],
                neutral,
                np.float32(plan.step),
                corrections.of_rows(rows, unit.num_tokens),
                low_bits,
            )
            from_vectors(vectors, values[place.layers], place.heads)
        rope = calibration.rope.slice(unit.layer_start, unit.num_layers)
        rotate_keys(values[:, 0], rope, unit.first_position)
        result = round_to_bits(values, unit.spec.dtype)
    put_raw_tokens(unit, plan.num_raw_tokens, result)
    return result


class _Kind(NamedTuple):
    """What units of one kind share: all of a plan but for their contents."""

    step: float
    layout: Layout
    places: tuple[Place, ...]
    shifts: tuple[NDArray[np.uint8], ...]
    """Low bits of each transform's rows, where the unit has any."""
    low_bytes: int
    """Size of all low bits."""


@functools.lru_cache(maxsize=_MAX_KINDS)
def _kind_of(
    params: bytes, spec: KVSpec, layer_start: int, num_layers: int, num_tokens: int
) -> _Kind:
    """Kept, for a chunk's units come again with every chunk, and making it takes 0.1 ms.

    `params` are a unit's with counts of 0; their calibration is known.
    """
    digest, step, group, rank, frame_rows, frame_columns, _, _ = _PARAMS.unpack_from(params)
    calibration = find_calibration(digest.hex())
    if not 1e-30 < step < 1e30:
        raise FormatError(f"step of the unit must be a positive number, got {step}")
    ranks = (rank, *(found for (found,) in _RANK.iter_unpack(params[_PARAMS.size :])))
    groups = _layer_groups(calibration, spec, layer_start, num_layers)
    if groups[0] != group or len(groups) != len(ranks):
        raise FormatError(
            f"unit says {len(ranks)} layer groups from {group} on, its layers are"
            f" {len(groups)} from {groups[0]} on"
        )
    num_head_groups = len(calibration.grouping.head_ranges)
    if frame_rows or frame_columns:
        layout = Layout.of(num_head_groups, ranks, num_tokens, frame_rows, frame_columns)
    else:
        layout = Layout.packed(num_head_groups, ranks, num_tokens)
    places = tuple(_places(calibration, groups))
    shifts = tuple(_shifts(calibration, p, ranks[p.number], step) for p in places)
    return _Kind(step, layout, places, shifts, packed_bytes(shifts, num_tokens))


class Place(NamedTuple):
    """One transform of a unit: what it covers."""

    number: int
    """Number of the layer group within the unit."""
    layer_group: int
    head_group: int
    layers: slice
    """Its layers, counted within the unit."""
    heads: tuple[int, int]

    @property
    def transform(self) -> tuple[int, int]:
        """The calibration's key of it."""
        return self.layer_group, self.head_group


def _places(calibration: Calibration, groups: range) -> Iterator[Place]:
    """The transforms of a unit, in the order of their rows."""
    grouping = calibration.grouping
    for head_group, heads in enumerate(grouping.head_ranges):
        first = 0
        for index, group in enumerate(groups):
            layers = slice(first, first + grouping.layer_counts[group])
            yield Place(index, group, head_group, layers, heads)
            first = layers.stop


def _shifts(calibration: Calibration, place: Place, rank: int, step: float) -> NDArray[np.uint8]:
    """Low bits of a transform's rows, those that have any."""
    sigma = calibration.bases[place.transform].sigma
    return row_shifts(sigma[:rank], step)


def _forward(
    calibration: Calibration, values: F32, groups: range, ranks: tuple[int, ...], step: np.float32
) -> Iterator[tuple[Place, F32]]:
    """Coefficients [rank, T] in steps, not rounded, of every transform of a unit."""
    for place in _places(calibration, groups):
        forward = calibration.forward(place.transform, ranks[place.number])
        vectors = to_vectors(values[place.layers], place.heads)
        vectors -= forward.mean
        scaled = multiply(forward.matrix, vectors.T)
        scaled *= np.float32(1) / step
        yield place, scaled


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of each transform lie: head group after head group, layer groups within.

    A head group has a whole number of pictures, so that a rank that owns some heads decodes only
    theirs; its layer groups follow one another without padding.
    """

    grid: RowGrid
    """Places of the rows in the pictures; packed rows use only the number of rows and columns."""
    rows_per_head_group: int
    ranks: tuple[int, ...]
    is_packed: bool = False

    @classmethod
    def fit(
        cls, num_head_groups: int, ranks: tuple[int, ...], num_tokens: int, variant: str
    ) -> Layout:
        one = row_grid(sum(ranks), num_tokens, variant)
        return cls.of(num_head_groups, ranks, num_tokens, one.frame_rows, one.frame_columns)

    @classmethod
    def of(
        cls,
        num_head_groups: int,
        ranks: tuple[int, ...],
        num_tokens: int,
        frame_rows: int,
        frame_columns: int,
    ) -> Layout:
        one = RowGrid(sum(ranks), num_tokens, frame_rows, frame_columns)
        rows = one.num_blocks * NUM_PLANES * frame_rows
        total = rows * (num_head_groups - 1) + sum(ranks)
        return cls(RowGrid(total, num_tokens, frame_rows, frame_columns), rows, ranks)

    @classmethod
    def packed(cls, num_head_groups: int, ranks: tuple[int, ...], num_tokens: int) -> Layout:
        """Without pictures, and so without padding."""
        rows = sum(ranks)
        grid = RowGrid(rows * num_head_groups, num_tokens, 1, min(num_tokens, MAX_SIDE))
        return cls(grid, rows, ranks, is_packed=True)

    @property
    def frame(self) -> tuple[int, int]:
        """Lines and columns used of a picture, as the parameters have them."""
        return (0, 0) if self.is_packed else (self.grid.frame_rows, self.grid.frame_columns)

    def rows_of(self, place: Place) -> slice:
        """The rows of one transform's coefficients."""
        first = place.head_group * self.rows_per_head_group + sum(self.ranks[: place.number])
        return slice(first, first + self.ranks[place.number])


def _layer_groups(
    calibration: Calibration, spec: KVSpec, layer_start: int, num_layers: int
) -> range:
    """The calibration's layer groups that a unit covers.

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
    boundaries = (*grouping.layer_starts, ours.num_layers)
    stop = layer_start + num_layers
    if layer_start not in boundaries or stop not in boundaries or num_layers < 1:
        groups = list(zip(grouping.layer_starts, grouping.layer_counts, strict=True))
        raise FormatError(
            f"layers {layer_start} to {stop - 1} are not whole groups of the calibration ({groups})"
        )
    return range(boundaries.index(layer_start), boundaries.index(stop))
