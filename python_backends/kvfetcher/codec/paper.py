"""Profile `paper`: the layout of arXiv 2602.09725, for reference and comparison. Lossy.

The paper's system quantises KV values and codes the integers as H.265 without loss: token = frame,
three layers = three colour planes, [head, dim] tiled in two dimensions by a searched tiling, several
tokens per picture so that the picture size can be chosen. The quantiser is ours, because the paper
does not disclose its own: per channel (layer, K or V, head, dim) min-max over the chunk's tokens.
"Lossless" is true of the integers only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.frame_size import check_frame_sizes, parse_frame_size
from kvfetcher.codec.layout import NUM_PLANES, TileGrid, Tiling
from kvfetcher.codec.quant import bits_to_float32, dequantise, float32_to_bits, quantise
from kvfetcher.codec.video import encode_for
from kvfetcher.errors import ChecksumError, ConfigError, FormatError
from kvfetcher.format.digest import integer_digest
from kvfetcher.format.pictures import even_groups
from kvfetcher.format.sections import ProfileCode, SectionKind
from kvfetcher.format.unit import Unit, packed_section, video_sections, write_unit

if TYPE_CHECKING:
    from kvfetcher.format.pictures import Integers
    from kvfetcher.spec import KVSpec


MIN_BITS = 2
MAX_BITS = 12

# head_rows, head_columns, dim_rows, dim_columns, slot_rows, slot_columns, bits, inter, reserved
_PARAMS = struct.Struct("<HHHHIIBBH")
PAPER_FRAME_SIZES = ("640x360",)
"""Where the configuration names none."""


@dataclass(frozen=True, slots=True)
class PaperProfile:
    """Encoder of profile `paper`."""

    frame_sizes: tuple[str, ...]
    """Largest picture of each variant, ``WIDTHxHEIGHT``; pictures are cropped to what they hold."""
    bits: int = 8
    """2 to 12 bits per integer."""
    unit_layers: int = 0
    """Layers of one unit; 0 = 3, one per colour plane."""
    tiling: Tiling | None = None
    """None = the most square one. `search_tiling` finds the best for a model."""
    inter: bool = True
    """Predict pictures of a run from the one before (the paper's idea); off = all intra."""

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ConfigError(
                f"codec.paper_bits must be {MIN_BITS} to {MAX_BITS}, got {self.bits!r}"
            )
        if not self.frame_sizes:
            raise ConfigError("profile paper needs one or more frame sizes, got none")
        check_frame_sizes(self.frame_sizes)

    @property
    def identity(self) -> str:
        return f"paper/1 bits={self.bits}"

    def variants(self) -> tuple[str, ...]:
        return self.frame_sizes

    def layer_groups(
        self, spec: KVSpec, num_tokens: int, variant: str
    ) -> tuple[tuple[int, int], ...]:
        """Groups of `unit_layers` layers, the last one perhaps smaller."""
        return even_groups(spec.num_layers, self.unit_layers or NUM_PLANES)

    def encode(self, source: UnitSource, variant: str) -> bytes:
        """One unit's bytes.

        Raises:
            CodecError: a value is not finite, or the encoder failed.
            LayoutError: a token's tile is larger than the picture.
        """
        spec = source.spec
        width, height = parse_frame_size(variant)
        tiling = self.tiling or _default_tiling(spec, width, height)
        quantised = quantise(bits_to_float32(source.values, spec.dtype), bits=self.bits)
        grid = TileGrid.fit(
            source.num_layers,
            spec.kv_factor,
            source.num_tokens,
            tiling,
            max_width=width,
            max_height=height,
        )
        bit_depth = _bit_depth(self.bits)
        planes = grid.place(quantised.codes, bit_depth=bit_depth, padding=1 << (self.bits - 1))
        packets = encode_for(
            source, planes, bit_depth=bit_depth, gop=grid.run_frames if self.inter else 1
        )
        unit = Unit(
            profile=ProfileCode.PAPER,
            spec=spec,
            layer_start=source.layer_start,
            num_layers=source.num_layers,
            num_tokens=source.num_tokens,
            first_position=source.first_position,
            geometry=grid.geometry(bit_depth),
            params=_PARAMS.pack(
                tiling.head_rows,
                tiling.head_columns,
                tiling.dim_rows,
                tiling.dim_columns,
                grid.slot_rows,
                grid.slot_columns,
                self.bits,
                int(self.inter),
                0,
            ),
            integer_digest=integer_digest(quantised.codes),
            sections=(
                *video_sections(packets),
                packed_section(SectionKind.MINIMA, quantised.minima.astype("<f4").tobytes()),
                packed_section(SectionKind.SCALES, quantised.scales.astype("<f4").tobytes()),
            ),
        )
        return write_unit(unit)


def restore_paper(unit: Unit, planes: Integers) -> Integers:
    """Values [Lg, K, H, T, D] of a `paper` unit; its integers are checked against the digest.

    Raises:
        ChecksumError: the integers differ from those that were saved.
        FormatError: the unit breaks the profile's rules.
    """
    unit.require_sections(SectionKind.MINIMA, SectionKind.SCALES)
    grid = _grid(unit)
    codes = grid.gather(planes)
    if integer_digest(codes) != unit.integer_digest:
        raise ChecksumError(
            f"unit of layers {unit.layer_start} to {unit.layer_start + unit.num_layers - 1}: the"
            " decoded integers differ from those saved; the decoder or the unit is damaged"
        )
    layers, factor, heads, tokens, dims = unit.shape
    shape = (layers, factor, heads, 1, dims)
    size = 4 * unit.num_elements // tokens
    minima = np.frombuffer(unit.section(SectionKind.MINIMA, num_bytes=size), "<f4").reshape(shape)
    scales = np.frombuffer(unit.section(SectionKind.SCALES, num_bytes=size), "<f4").reshape(shape)
    if not (np.isfinite(minima).all() and np.isfinite(scales).all()):
        raise FormatError("a paper unit's minima and scales are finite numbers")
    with np.errstate(over="ignore"):
        values = dequantise(codes, minima, scales)
        return float32_to_bits(values, unit.spec.dtype)


class TilingCost(NamedTuple):
    """What a tiling costs on a sample."""

    tiling: Tiling
    num_bytes: int


def search_tiling(
    values: Integers, *, spec: KVSpec, frame_size: str, bits: int, inter: bool
) -> tuple[TilingCost, ...]:
    """Encode a sample with every tiling that fits, cheapest first: the paper's offline search.

    Args:
        values: [Lg, K, H, T, D] of a few layers; three are enough.
        spec: geometry of the model.
        frame_size: ``WIDTHxHEIGHT`` of the pictures.
        bits: number of bits of the quantiser.
        inter: predict between pictures.
    """
    width, height = parse_frame_size(frame_size)
    source = UnitSource(values, spec, 0, 0)
    costs = []
    for tiling in Tiling.all(spec.num_kv_heads, spec.head_dim):
        if tiling.columns <= width and tiling.rows <= height:
            profile = PaperProfile((frame_size,), bits=bits, tiling=tiling, inter=inter)
            costs.append(TilingCost(tiling, len(profile.encode(source, frame_size))))
    return tuple(sorted(costs, key=lambda cost: cost.num_bytes))


def _grid(unit: Unit) -> TileGrid:
    if len(unit.params) != _PARAMS.size:
        raise FormatError(f"a paper unit has {_PARAMS.size} parameter bytes: {len(unit.params)}")
    *tiles, slot_rows, slot_columns, bits, inter, reserved = _PARAMS.unpack(unit.params)
    tiling = Tiling(*tiles)
    spec = unit.spec
    if (
        tiling.head_rows * tiling.head_columns != spec.num_kv_heads
        or tiling.dim_rows * tiling.dim_columns != spec.head_dim
    ):
        raise FormatError(
            f"tiling {tiling.name} does not hold {spec.num_kv_heads} heads of {spec.head_dim}"
        )
    if not MIN_BITS <= bits <= MAX_BITS or inter > 1 or reserved:
        raise FormatError(f"paper unit has bits {bits}, inter {inter}, reserved {reserved}")
    grid = TileGrid(
        unit.num_layers, spec.kv_factor, unit.num_tokens, tiling, slot_rows, slot_columns
    )
    expected = grid.geometry(_bit_depth(bits))
    if unit.geometry != expected:
        raise FormatError(f"pictures of the unit are {unit.geometry}, its values need {expected}")
    return grid


def _bit_depth(bits: int) -> int:
    return 8 if bits <= 8 else 10 if bits <= 10 else 12


def _default_tiling(spec: KVSpec, width: int, height: int) -> Tiling:
    """The most square tiling that fits; shapes differ by under 1 % of the bits."""
    tilings = Tiling.all(spec.num_kv_heads, spec.head_dim)
    return next((t for t in tilings if t.columns <= width and t.rows <= height), tilings[0])
