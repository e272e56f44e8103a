import contextlib
import struct
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.codec.layout import RowGrid, TileGrid, Tiling
from kvfetcher.errors import ChecksumError, FormatError, LayoutError, UnsupportedVersionError
from kvfetcher.format.pictures import PlaneGeometry
from kvfetcher.format.sections import ProfileCode
from kvfetcher.format.unit import (
    RAW,
    ZSTD,
    Section,
    Unit,
    max_samples,
    packed_section,
    parse_unit,
    raw_section,
    serialise,
    video_sections,
    write_unit,
)
from kvfetcher.launcher.probe import probe_unit
from kvfetcher.spec import KVSpec
from support.tamper import resealed_unit as resealed

SPEC = KVSpec(num_layers=5, num_kv_heads=2, head_dim=8)


def unit(sections=None, **changes):
    fields = {
        "profile": ProfileCode.EXACT,
        "spec": SPEC,
        "layer_start": 2,
        "num_layers": 3,
        "num_tokens": 7,
        "first_position": 99,
        "geometry": PlaneGeometry(2, 144, 150, 10),
        "params": b"parameters",
        "integer_digest": 2**64 - 5,
        "sections": sections or (*video_sections([b"one", b"three"]), raw_section(16, b"side")),
    }
    return Unit(**{**fields, **changes})


TABLE = 88 + len(b"parameters")


def test_unit_says_what_was_written():
    parsed = parse_unit(write_unit(unit()))
    assert parsed == unit()
    assert parsed.shape == (3, 2, 2, 7, 8)
    assert parsed.num_elements == 3 * 2 * 2 * 7 * 8
    assert [bytes(p) for p in parsed.packets()] == [b"one", b"three"]
    assert parsed.section(16, num_bytes=4) == b"side"


def test_side_data_is_compressed_only_where_that_pays():
    noise = np.random.default_rng(0).bytes(5000)
    assert packed_section(16, noise).encoding == RAW
    packed = packed_section(16, bytes(5000))
    assert packed.encoding == ZSTD
    assert len(packed.stored) < 50
    data = write_unit(unit((*video_sections([b"a", b"b"]), packed)))
    assert parse_unit(data).section(16, num_bytes=5000) == bytes(5000)


def test_every_flipped_bit_is_noticed():
    data = write_unit(unit())
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << (at % 8)
        with pytest.raises(FormatError):
            parse_unit(bytes(bad))


def test_every_truncation_is_noticed():
    data = write_unit(unit())
    for size in range(len(data)):
        with pytest.raises(FormatError):
            parse_unit(data[:size])
    with pytest.raises(FormatError):
        parse_unit(data + b"\0")


def test_damaged_section_is_named():
    data = bytearray(write_unit(unit()))
    data[-1] ^= 1
    with pytest.raises(ChecksumError, match="section 16 of the unit differs"):
        parse_unit(bytes(data))


@pytest.mark.parametrize(
    ("offset", "replacement", "error", "match"),
    [
        (0, b"KVFUNIX\0", FormatError, "not a KVFetcher unit"),
        (8, b"\2\0", UnsupportedVersionError, "format version 2, this build reads 1"),
        (10, b"\1", UnsupportedVersionError, "flag"),
        (16, b"\0", FormatError, "are there"),
        (26, b"\4", FormatError, "dtype code 4"),
        (27, b"\0", FormatError, "kv_factor"),
        (36, struct.pack("<I", 4097), FormatError, "head_dim"),
        (40, struct.pack("<I", 3), FormatError, "covers 3 layers from 3 of a model with 5"),
        (44, struct.pack("<I", 0), FormatError, "covers 0 layers"),
        (48, struct.pack("<I", 0), FormatError, "unit of 0 tokens"),
        (48, struct.pack("<I", 65537), FormatError, "unit of 65537 tokens"),
        (52, struct.pack("<Q", 1 << 41), FormatError, "from position"),
        (60, struct.pack("<I", 0), FormatError, "1 to 65536 pictures"),
        (60, struct.pack("<I", 65536), FormatError, "over the limit"),
        (64, struct.pack("<H", 8200), FormatError, "picture width"),
        (68, b"\x09", FormatError, "bit depth"),
        (69, b"\0", UnsupportedVersionError, "chroma"),
        (70, b"\2", UnsupportedVersionError, "codec"),
        (71, b"\1", UnsupportedVersionError, "reserved"),
        (80, struct.pack("<H", 65), FormatError, "1 to 64"),
        (82, b"\1", UnsupportedVersionError, "reserved"),
        (84, struct.pack("<I", 70000), FormatError, "parameter bytes"),
        (84, struct.pack("<I", 11), FormatError, "its counts need"),
        (TABLE, struct.pack("<H", 2), FormatError, "rising order"),
        (TABLE + 2, b"\2", UnsupportedVersionError, "encoding 2"),
        (TABLE + 3, b"\1", UnsupportedVersionError, "does not know"),
        (TABLE + 8, struct.pack("<Q", 1 << 60), FormatError, "past the unit's end"),
        (TABLE + 16, struct.pack("<Q", 1 << 60), FormatError, "past the unit's end"),
        (TABLE + 16, struct.pack("<Q", 9), FormatError, "has 8 bytes but says 9"),
        (TABLE + 48 + 8, struct.pack("<QQ", 3, 3), ChecksumError, "section 16"),
    ],
)
def test_broken_rule_is_named(offset, replacement, error, match):
    with pytest.raises(error, match=match):
        parse_unit(resealed(write_unit(unit()), offset, replacement))


def test_values_over_the_memory_limit_are_refused():
    spec = KVSpec(num_layers=1024, num_kv_heads=1024, head_dim=4096)
    with pytest.raises(FormatError, match=r"restores to .* over the limit"):
        write_unit(unit(spec=spec, layer_start=0, num_layers=1024, num_tokens=1))


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        (video_sections([b"a"]), "section 1 of the unit must be 8 bytes, got 4"),
        (video_sections([b"a", b""]), "empty video packet"),
        ((raw_section(1, bytes(8)),), "no section of kind 2"),
        ((raw_section(1, b"\xff" * 8), raw_section(2, b"x")), "must be 8589934590 bytes, got 1"),
    ],
)
def test_packets_that_do_not_add_up_are_refused(sections, match):
    with pytest.raises(FormatError, match=match):
        parse_unit(write_unit(unit(sections))).packets()


def test_section_that_the_profile_does_not_name_is_refused():
    unit().require_sections(16)
    for kinds in ((), (17,), (16, 17)):
        with pytest.raises(FormatError, match="has sections"):
            unit().require_sections(*kinds)


def test_compression_bomb_is_refused_before_it_is_inflated():
    bomb = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(64 << 20))
    section = Section(16, ZSTD, 1000, bomb)
    data = write_unit(unit((*video_sections([b"a", b"b"]), section)))
    with pytest.raises(FormatError, match="says 1000 bytes, its zstd frame 67108864"):
        parse_unit(data).section(16, num_bytes=1000)


@pytest.mark.parametrize("kind", [1, 2])
def test_video_that_is_compressed_again_is_refused(kind):
    """A frame of zeros would inflate to 1 GiB from a few bytes, and no header says otherwise."""
    sections = [*video_sections([b"a" * 8, b"b" * 8]), raw_section(16, b"side")]
    frame = zstandard.ZstdCompressor(write_content_size=True).compress(
        bytes(sections[kind - 1].stored)
    )
    sections[kind - 1] = Section(kind, ZSTD, sections[kind - 1].raw_bytes, frame)
    with pytest.raises(
        FormatError, match=f"section {kind}, the video of a unit, must be stored raw"
    ):
        write_unit(unit(tuple(sections)))


SOUND = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(1000))
WITH_DICTIONARY = zstandard.ZstdCompressor(
    dict_data=zstandard.ZstdCompressionDict(
        bytes(range(256)) * 8, dict_type=zstandard.DICT_TYPE_RAWCONTENT
    ),
    write_content_size=True,
).compress((bytes(range(256)) * 8)[1000:2000])


@pytest.mark.parametrize(
    "frame",
    [
        b"no frame at all",
        SOUND + b"junk",
        SOUND + SOUND,
        SOUND + zstandard.ZstdCompressor(write_content_size=True).compress(b""),
        WITH_DICTIONARY,
        SOUND[:-2],
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000)),
    ],
)
def test_damaged_zstd_frame_is_a_format_error(frame):
    data = write_unit(unit((*video_sections([b"a", b"b"]), Section(16, ZSTD, 1000, frame))))
    with pytest.raises(FormatError, match="section 16"):
        parse_unit(data).section(16, num_bytes=1000)


@pytest.mark.parametrize(
    ("width", "height", "num_frames", "is_allowed"),
    [
        (192, 144, 1, True),  # the unit as it is
        (8192, 8192, 1, False),
        (144, 144, 4000, False),
        (8192, 144, 1, False),
    ],
)
def test_pictures_are_bounded_by_what_the_values_need(width, height, num_frames, is_allowed):
    """Before anything is decoded: a small unit with huge pictures filled /dev/shm."""
    unit = parse_unit(probe_unit())
    geometry = replace(unit.geometry, width=width, height=height, num_frames=num_frames)
    data = serialise(replace(unit, geometry=geometry))
    if is_allowed:
        assert parse_unit(data).geometry == geometry
    else:
        with pytest.raises(FormatError, match=r"samples; \d+ layers of 192 tokens need at most"):
            parse_unit(data)


@given(
    st.integers(1, 40), st.integers(1, 2), st.integers(1, 8), st.integers(1, 128),
    st.integers(1, 2048), st.integers(144, 1024), st.integers(144, 1024),
)  # fmt: skip
def test_no_grid_of_pictures_is_refused(layers, factor, heads, dims, tokens, width, height):
    spec = KVSpec(layers, heads, dims, kv_factor=factor)
    most = max_samples(spec, num_layers=layers, num_tokens=tokens)
    channels = layers * spec.elements_per_layer_token
    grid = RowGrid.fit(channels, tokens, max_frame_rows=height, max_frame_columns=width)
    with contextlib.suppress(FormatError):  # over the limits of one unit
        assert grid.geometry(8).num_samples <= most
    with contextlib.suppress(FormatError, LayoutError):
        tiles = TileGrid.fit(
            layers, factor, tokens, Tiling(1, heads, dims, 1), max_width=width, max_height=height
        )
        assert tiles.geometry(8).num_samples <= most
