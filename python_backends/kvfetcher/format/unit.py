"""The unit: one layer group of one chunk, self-contained; bytes <-> dataclass (docs/format.md).

A unit holds a header (geometry of the values and of the pictures, a block of profile parameters, a
section table) and its sections. Sections 1 and 2 are the video; the others belong to the profile.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import zstandard
from isal.isal_zlib import crc32

from kvfetcher.errors import ChecksumError, FormatError, UnsupportedVersionError
from kvfetcher.format.container import (
    DTYPE_CODES,
    MAX_CHUNK_BYTES,
    MAX_CHUNK_TOKENS,
    MAX_POSITION,
    UNIT_MAGIC,
    parse_spec,
)
from kvfetcher.format.pictures import (
    MAX_FRAMES,
    MAX_SIDE,
    MAX_VALUE_BYTES,
    MIN_SIDE,
    NO_PICTURES,
    PlaneGeometry,
)
from kvfetcher.format.sections import ProfileCode, SectionKind
from kvfetcher.spec import FORMAT_VERSION, KVSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfetcher.format.pictures import Chroma

MAX_UNIT_BYTES = MAX_CHUNK_BYTES
MAX_SECTIONS = 64
MAX_PARAMS_BYTES = 1 << 16

HAS_LOW_BITS = 1
"""Flag of a transform unit: the low bits of wide rows are in a section of their own."""
IS_PACKED = 2
"""Flag of a transform unit: its rows are packed, there is no video."""

RAW = 0
ZSTD = 1

# A zstd section that saves less than this stays raw: inflating costs about 1 ns per byte
# (500-1000 MB/s per core), a fifth of all that restoring an element costs.
_ZSTD_MUST_SAVE = 0.02
_ZSTD_LEVEL = 3
_ZSTD_WINDOW = 128 << 20

_NO_VIDEO = 0
_CODEC_HEVC = 1
_CHROMA_CODES: dict[Chroma, int] = {"4:2:0": 1, "4:4:4": 3}
_CHROMA_NAMES: dict[int, Chroma] = {code: name for name, code in _CHROMA_CODES.items()}

# magic, version, flags, header_bytes, unit_bytes, profile, dtype, kv_factor, num_layers_of_model,
# num_kv_heads, head_dim, layer_start, num_layers, num_tokens, first_position, num_frames, width,
# height, bit_depth, chroma, codec, reserved, integer_digest, num_sections, reserved, params_bytes
_FIXED = struct.Struct("<8sHHIQHBBIIIIIIQIHHBBBBQHHI")
# kind, encoding, reserved, crc32, stored_bytes, raw_bytes
_SECTION = struct.Struct("<HBBIQQ")
_CRC = struct.Struct("<I")
_NUM_FRAMES = struct.Struct("<60xI")
_PLANES = 3
# A tile a little larger than half a side leaves three quarters of a picture empty, and pictures may be
# half full.
_TILE_WASTE = 8
_ALWAYS_SAMPLES = 1 << 20
_FACTS = slice(24, 80)  # profile ... integer_digest


@dataclass(frozen=True, slots=True)
class Section:
    """One section of a unit."""

    kind: int
    encoding: int
    """RAW or ZSTD."""
    raw_bytes: int
    stored: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit, parsed or about to be written. Sections are views of the bytes that were parsed."""

    profile: int
    spec: KVSpec
    """Geometry of the whole model; the unit holds `num_layers` of its layers."""
    layer_start: int
    num_layers: int
    num_tokens: int
    first_position: int
    geometry: PlaneGeometry
    params: bytes
    """Parameters of the profile; at most MAX_PARAMS_BYTES."""
    integer_digest: int
    """`digest.integer_digest` of the integers that the profile names."""
    sections: tuple[Section, ...]
    flags: int = 0
    """`HAS_LOW_BITS` and `IS_PACKED`, or 0."""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[Lg, K, H, T, D] of the unit's values."""
        spec = self.spec
        return self.num_layers, spec.kv_factor, spec.num_kv_heads, self.num_tokens, spec.head_dim

    @property
    def num_elements(self) -> int:
        return self.num_layers * self.spec.elements_per_layer_token * self.num_tokens

    def section(self, kind: int, *, num_bytes: int) -> bytes | memoryview:
        """The raw bytes of a section that must be there and `num_bytes` long.

        Raises:
            FormatError: it is missing, of another length, or its zstd frame is damaged.
        """
        for section in self.sections:
            if section.kind == kind:
                break
        else:
            raise FormatError(f"unit has no section of kind {kind}, which its profile needs")
        if section.raw_bytes != num_bytes:
            raise FormatError(
                f"section {kind} of the unit must be {num_bytes} bytes, got {section.raw_bytes}"
            )
        if section.encoding == RAW:
            return section.stored
        return _inflate(section)

    def require_sections(self, *kinds: int) -> None:
        """Check that the unit has its video and exactly these sections of its profile.

        Raises:
            FormatError: one is missing, or there is one that the profile does not name.
        """
        video = (
            (SectionKind.PACKET_LENGTHS, SectionKind.BITSTREAM) if self.geometry.num_frames else ()
        )
        expected = tuple(int(kind) for kind in (*video, *kinds))
        got = tuple(section.kind for section in self.sections)
        if got != expected:
            raise FormatError(f"a unit of profile {self.profile} has sections {expected}: {got}")

    def packets(self) -> list[memoryview]:
        """The access units of the video, one per picture, in order; none where there is no video.

        Raises:
            FormatError: the packet lengths do not add up to the bitstream.
        """
        frames = self.geometry.num_frames
        if not frames:
            return []
        lengths = np.frombuffer(
            self.section(SectionKind.PACKET_LENGTHS, num_bytes=4 * frames), "<u4"
        )
        total = int(lengths.sum(dtype=np.uint64))
        stream = memoryview(self.section(SectionKind.BITSTREAM, num_bytes=total))
        if not lengths.all():
            raise FormatError("unit has an empty video packet; each picture has one")
        stops = np.cumsum(lengths, dtype=np.int64).tolist()
        starts = [0, *stops[:-1]]
        return [stream[start:stop] for start, stop in zip(starts, stops, strict=True)]


def has_video(data: bytes | memoryview) -> bool:
    """Whether a unit says that it has pictures; of bytes that are not a unit, nobody knows."""
    return len(data) < _NUM_FRAMES.size or _NUM_FRAMES.unpack_from(data)[0] > 0


def unit_facts(data: bytes | memoryview) -> bytes:
    """The bytes of a unit's header that say what it holds: profile to integer digest.

    The same of a unit and of what is left of it without its bitstream. Nothing is checked.

    Raises:
        FormatError: there are too few bytes.
    """
    if len(data) < _FIXED.size:
        raise FormatError(f"a unit has at least {_FIXED.size} bytes, got {len(data)}")
    return bytes(memoryview(data)[_FACTS])


def video_sections(packets: Sequence[bytes]) -> tuple[Section, Section]:
    """The two sections that hold a unit's video."""
    lengths = struct.pack(f"<{len(packets)}I", *map(len, packets))
    return raw_section(SectionKind.PACKET_LENGTHS, lengths), raw_section(
        SectionKind.BITSTREAM, b"".join(packets)
    )


def raw_section(kind: int, data: bytes) -> Section:
    """A section stored as it is."""
    return Section(kind, RAW, len(data), data)


def packed_section(kind: int, data: bytes) -> Section:
    """A section stored as a zstd frame where that is at least 2 % smaller, else raw."""
    frame = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True).compress(data)
    if len(frame) > len(data) * (1 - _ZSTD_MUST_SAVE):
        return raw_section(kind, data)
    return Section(kind, ZSTD, len(data), frame)


def write_unit(unit: Unit) -> bytes:
    """Serialise a unit. Exact inverse: `parse_unit`."""
    data = serialise(unit)
    parse_unit(data)  # what we write, we read: same rules, one place
    return data


def serialise(unit: Unit) -> bytes:
    """`write_unit` for a unit whose parts were parsed: nothing is checked."""
    spec = unit.spec
    header_bytes = _FIXED.size + len(unit.params) + _SECTION.size * len(unit.sections) + _CRC.size
    fixed = _FIXED.pack(
        UNIT_MAGIC,
        FORMAT_VERSION,
        unit.flags,
        header_bytes,
        header_bytes + sum(len(section.stored) for section in unit.sections),
        unit.profile,
        DTYPE_CODES[spec.dtype],
        spec.kv_factor,
        spec.num_layers,
        spec.num_kv_heads,
        spec.head_dim,
        unit.layer_start,
        unit.num_layers,
        unit.num_tokens,
        unit.first_position,
        *_video_fields(unit.geometry),
        0,
        unit.integer_digest,
        len(unit.sections),
        0,
        len(unit.params),
    )
    table = b"".join(
        _SECTION.pack(
            section.kind,
            section.encoding,
            0,
            crc32(section.stored),
            len(section.stored),
            section.raw_bytes,
        )
        for section in unit.sections
    )
    header = b"".join((fixed, unit.params, table))
    header += _CRC.pack(crc32(header))
    return b"".join((header, *(section.stored for section in unit.sections)))


def parse_unit(data: bytes | memoryview, *, checks_video: bool = True) -> Unit:
    """Read and check one unit; sections are views of `data`, not copies.

    Args:
        data: the unit's bytes.
        checks_video: False = leave out the CRC-32 of the video, for readers that do not decode it.

    Raises:
        ChecksumError: the header's or a section's CRC-32 differs.
        UnsupportedVersionError: version, flag, codec or encoding that this build does not read.
        FormatError: any other rule of docs/format.md is broken.
    """
    view = memoryview(data)
    if len(view) < _FIXED.size:
        raise FormatError(f"a unit has at least {_FIXED.size} bytes, got {len(view)}")
    (
        magic,
        version,
        flags,
        header_bytes,
        unit_bytes,
        profile,
        dtype,
        kv_factor,
        model_layers,
        num_kv_heads,
        head_dim,
        layer_start,
        num_layers,
        num_tokens,
        first_position,
        num_frames,
        width,
        height,
        bit_depth,
        chroma,
        codec,
        reserved_a,
        integer_digest,
        num_sections,
        reserved_b,
        params_bytes,
    ) = _FIXED.unpack_from(view)
    if magic != UNIT_MAGIC:
        raise FormatError(f"not a KVFetcher unit: it starts with {magic!r}, not {UNIT_MAGIC!r}")
    if version != FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"unit is of format version {version}, this build reads {FORMAT_VERSION}"
        )
    known = HAS_LOW_BITS | IS_PACKED if profile == ProfileCode.TRANSFORM else 0
    if flags & ~known or reserved_a or reserved_b:
        raise UnsupportedVersionError(
            "unit has a flag or reserved field that this build does not know; upgrade kvfetcher"
        )
    if params_bytes > MAX_PARAMS_BYTES or not 1 <= num_sections <= MAX_SECTIONS:
        raise FormatError(
            f"a unit has at most {MAX_PARAMS_BYTES} parameter bytes and 1 to {MAX_SECTIONS}"
            f" sections, got {params_bytes} and {num_sections}"
        )
    expected = _FIXED.size + params_bytes + _SECTION.size * num_sections + _CRC.size
    if header_bytes != expected or unit_bytes != len(view) or header_bytes > unit_bytes:
        raise FormatError(
            f"unit says {header_bytes} header bytes and {unit_bytes} in all; its counts need"
            f" {expected}, and {len(view)} are there"
        )
    (crc,) = _CRC.unpack_from(view, header_bytes - _CRC.size)
    if crc32(view[: header_bytes - _CRC.size]) != crc:
        raise ChecksumError("unit header differs from its CRC-32; fetch or save it again")
    spec = parse_spec(model_layers, num_kv_heads, head_dim, kv_factor, dtype)
    if num_layers < 1 or layer_start + num_layers > model_layers:
        raise FormatError(
            f"unit covers {num_layers} layers from {layer_start} of a model with {model_layers}"
        )
    if not 1 <= num_tokens <= MAX_CHUNK_TOKENS or first_position > MAX_POSITION:
        raise FormatError(
            f"unit of {num_tokens} tokens from position {first_position} is over the limits of"
            f" {MAX_CHUNK_TOKENS} and {MAX_POSITION}"
        )
    value_bytes = num_layers * spec.elements_per_layer_token * num_tokens * spec.item_bytes
    if value_bytes > MAX_VALUE_BYTES:
        raise FormatError(
            f"unit restores to {value_bytes} bytes, over the limit of {MAX_VALUE_BYTES}"
        )
    geometry = _parse_geometry(num_frames, width, height, bit_depth, chroma, codec)
    most = max_samples(spec, num_layers=num_layers, num_tokens=num_tokens)
    if geometry.num_frames and geometry.num_samples > most:
        raise FormatError(
            f"unit has pictures of {geometry.num_samples} samples; {num_layers} layers of"
            f" {num_tokens} tokens need at most {most}"
        )
    params_at = _FIXED.size
    table_at = params_at + params_bytes
    return Unit(
        profile=profile,
        spec=spec,
        layer_start=layer_start,
        num_layers=num_layers,
        num_tokens=num_tokens,
        first_position=first_position,
        geometry=geometry,
        params=bytes(view[params_at:table_at]),
        integer_digest=integer_digest,
        sections=_parse_sections(
            view, table_at, num_sections, header_bytes, checks_video=checks_video
        ),
        flags=flags,
    )


def max_samples(spec: KVSpec, *, num_layers: int, num_tokens: int) -> int:
    """Most samples of all pictures of a unit: what its values need where they fill pictures badly.

    Pictures are evenly filled, and no side is under MIN_SIDE: of two pictures, where one does not
    do, each is at least half full. Channels lie as rows over three planes, or tokens as tiles
    (`paper`), one run of pictures for three layers of K or V.
    """
    channels = num_layers * spec.elements_per_layer_token
    lines = -(-channels // _PLANES)
    rows = _PLANES * _padded(lines) * _padded(num_tokens)
    runs = -(-num_layers // _PLANES) * spec.kv_factor
    values = num_tokens * spec.num_kv_heads * spec.head_dim
    tiles = (
        _PLANES
        * runs
        * max(MIN_SIDE * MIN_SIDE, _TILE_WASTE * values + MIN_SIDE * min(MAX_SIDE, values))
    )
    return max(_ALWAYS_SAMPLES, rows, tiles)


def _padded(length: int) -> int:
    """Longest side, over all pictures beside each other, that holds some lines or columns."""
    return max(MIN_SIDE, 2 * length + 2 + length // (MIN_SIDE // 2))


def _video_fields(geometry: PlaneGeometry) -> tuple[int, int, int, int, int, int]:
    """Pictures, width, height, bit depth, chroma and codec, as the header has them."""
    if geometry == NO_PICTURES:
        return 0, 0, 0, 0, 0, _NO_VIDEO
    return (
        geometry.num_frames,
        geometry.width,
        geometry.height,
        geometry.bit_depth,
        _CHROMA_CODES[geometry.chroma],
        _CODEC_HEVC,
    )


def _parse_geometry(
    num_frames: int, width: int, height: int, bit_depth: int, chroma: int, codec: int
) -> PlaneGeometry:
    """Inverse of `_video_fields`."""
    if codec == _NO_VIDEO:
        if num_frames or width or height or bit_depth or chroma:
            raise FormatError("a unit without video describes no pictures")
        return NO_PICTURES
    if codec != _CODEC_HEVC or chroma not in _CHROMA_NAMES:
        raise UnsupportedVersionError(
            "unit has a codec or chroma format that this build does not know; upgrade kvfetcher"
        )
    if not num_frames:
        raise FormatError(f"a unit with video has 1 to {MAX_FRAMES} pictures, got 0")
    return PlaneGeometry(num_frames, width, height, bit_depth, _CHROMA_NAMES[chroma])


def _parse_sections(
    view: memoryview, table_at: int, num_sections: int, first_byte: int, *, checks_video: bool
) -> tuple[Section, ...]:
    sections: list[Section] = []
    at = first_byte
    for index in range(num_sections):
        kind, encoding, reserved, crc, stored_bytes, raw_bytes = _SECTION.unpack_from(
            view, table_at + _SECTION.size * index
        )
        if encoding not in (RAW, ZSTD) or reserved:
            raise UnsupportedVersionError(
                f"section {kind} of the unit has encoding {encoding}, which this build does not"
                " know; upgrade kvfetcher"
            )
        if encoding != RAW and kind in (SectionKind.PACKET_LENGTHS, SectionKind.BITSTREAM):
            # Nothing else bounds them: a tiny unit could inflate to MAX_UNIT_BYTES.
            raise FormatError(f"section {kind}, the video of a unit, must be stored raw")
        if sections and kind <= sections[-1].kind:
            raise FormatError(f"sections of a unit must be in rising order of kind, got {kind}")
        if stored_bytes > len(view) - at or raw_bytes > MAX_UNIT_BYTES:
            raise FormatError(f"section {kind} of {stored_bytes} bytes goes past the unit's end")
        if encoding == RAW and raw_bytes != stored_bytes:
            raise FormatError(f"raw section {kind} has {stored_bytes} bytes but says {raw_bytes}")
        stored = view[at : at + stored_bytes]
        is_checked = checks_video or kind != SectionKind.BITSTREAM
        if is_checked and crc32(stored) != crc:
            raise ChecksumError(f"section {kind} of the unit differs from its CRC-32")
        sections.append(Section(kind, encoding, raw_bytes, stored))
        at += stored_bytes
    if at != len(view):
        raise FormatError(f"the unit's sections end at byte {at} of {len(view)}")
    return tuple(sections)


def _inflate(section: Section) -> bytes:
    """Decompress; the output's size is known before a byte is allocated."""
    try:
        # Asked for first, because the library allocates what the frame says, not what we allow.
        size = zstandard.frame_content_size(section.stored)
        if size != section.raw_bytes:
            raise FormatError(
                f"section {section.kind} says {section.raw_bytes} bytes, its zstd frame {size}"
            )
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        data = decompressor.decompress(
            section.stored, max_output_size=section.raw_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as exc:
        raise FormatError(f"section {section.kind} is not a whole zstd frame: {exc}") from exc
    if len(data) != section.raw_bytes:
        raise FormatError(
            f"section {section.kind} inflates to {len(data)} bytes, not {section.raw_bytes}"
        )
    return bytes(data)
