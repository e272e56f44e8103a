import pickle
import struct
import subprocess
import sys
from itertools import pairwise

import pytest

from kvfetcher.errors import ChecksumError, FormatError, UnsupportedVersionError
from kvfetcher.format.container import (
    HEADER_READ_BYTES,
    MAX_CHUNK_TOKENS,
    PREFIX_BYTES,
    UnitData,
    build_chunk,
    check_unit,
    header_size,
    parse_header,
)
from kvfetcher.spec import KVSpec
from support.tamper import resealed_chunk as resealed

SPEC = KVSpec(num_layers=3, num_kv_heads=2, head_dim=8)
UNITS = (
    UnitData(0, 2, "640x360", b"first unit"),
    UnitData(2, 1, "640x360", b"second"),
    UnitData(0, 3, "1280x720", b"all layers"),
)


def chunk(units=UNITS, **changes):
    fields = {
        "spec": SPEC,
        "profile": "exact/1",
        "identity": bytes(range(32)),
        "chunk_key": b"k" * 32,
        "parent_key": b"p" * 32,
        "first_position": 512,
        "token_ids": (5, 0, 2**31 - 1),
    }
    return build_chunk(units, **{**fields, **changes})


UNIT_TABLE = 160 + len("exact/1") + 2 * 24 + 3 * 4


def test_header_says_what_was_written():
    data = chunk()
    header = parse_header(data)
    assert (header.spec, header.profile, header.version) == (SPEC, "exact/1", 1)
    assert header.identity == bytes(range(32))
    assert (header.chunk_key, header.parent_key) == (b"k" * 32, b"p" * 32)
    assert (header.first_position, header.num_tokens) == (512, 3)
    assert header.token_ids == (5, 0, 2**31 - 1)
    assert header.object_bytes == len(data)
    assert header.variants == ("640x360", "1280x720")
    assert [u.layer_start for u in header.units_of("640x360")] == [0, 2]
    assert header.units_of("1x1") == ()
    assert pickle.loads(pickle.dumps(header)) == header


def test_units_lie_where_the_table_says():
    data = chunk()
    header = parse_header(data)
    for entry, unit in zip(header.units, UNITS, strict=True):
        assert data[entry.offset : entry.stop] == unit.data
        check_unit(header, entry, data[entry.offset : entry.stop])


def test_a_variants_units_are_one_range():
    header = parse_header(chunk())
    for name in header.variants:
        units = header.units_of(name)
        assert all(a.stop == b.offset for a, b in pairwise(units))


def test_header_is_read_from_a_prefix():
    data = chunk()
    size = header_size(data[:PREFIX_BYTES])
    assert parse_header(data[:size]) == parse_header(data)
    with pytest.raises(FormatError, match=rf"needs {size} bytes, got {size - 1}"):
        parse_header(data[: size - 1])
    with pytest.raises(FormatError, match="prefix must be 24 bytes, got 23"):
        header_size(data[: PREFIX_BYTES - 1])


def test_first_range_holds_the_header_of_a_default_chunk_of_a_deep_model():
    units = [UnitData(i, 1, "-", b"x") for i in range(80)]
    data = chunk(units, spec=KVSpec(80, 8, 128), token_ids=range(256))
    assert parse_header(data).header_bytes <= HEADER_READ_BYTES


def test_every_flipped_header_bit_is_noticed():
    data = chunk()
    for at in range(parse_header(data).header_bytes):
        for bit in range(8):
            bad = bytearray(data)
            bad[at] ^= 1 << bit
            with pytest.raises(FormatError):
                parse_header(bytes(bad))


def test_damaged_unit_is_reported_not_returned():
    header = parse_header(chunk())
    with pytest.raises(ChecksumError, match=r"layers 0 to 1, variant 640x360.*damaged"):
        check_unit(header, header.units[0], b"first uniT")
    with pytest.raises(FormatError, match="expected 10 bytes, got 9"):
        check_unit(header, header.units[0], b"first uni")


@pytest.mark.parametrize(
    ("offset", "replacement", "error", "match"),
    [
        (0, b"KVFCHUNX", FormatError, "not a KVFetcher chunk"),
        (8, b"\2\0", UnsupportedVersionError, "format version 2, this build reads 1"),
        (10, b"\1\0", UnsupportedVersionError, "unknown flags 0x0001"),
        (12, struct.pack("<I", 191), FormatError, "191 bytes is outside 192"),
        (12, struct.pack("<I", 5 << 20), FormatError, "outside 192 to min"),
        (16, struct.pack("<Q", 1 << 40), FormatError, "over the limit"),
        (16, struct.pack("<Q", 500), FormatError, "the object at 500"),
        (120, struct.pack("<Q", 1 << 41), FormatError, "first_position"),
        (128, struct.pack("<I", 0), FormatError, "1 to 65536 tokens, got 0"),
        (128, struct.pack("<I", 1 << 31), FormatError, "tokens, got 2147483648"),
        (128, struct.pack("<I", 4), FormatError, "its counts need"),
        (132, struct.pack("<I", 4), FormatError, "ends at layer 3 of 4"),
        (136, struct.pack("<I", 0), FormatError, "num_kv_heads must be 1 to 1024, got 0"),
        (144, b"\3", FormatError, "kv_factor"),
        (145, b"\0", FormatError, "dtype code 0 is unknown"),
        (146, struct.pack("<H", 2000), FormatError, "profile text bytes"),
        (148, struct.pack("<H", 65), FormatError, "1 to 64 variants"),
        (150, b"\1", UnsupportedVersionError, "reserved"),
        (152, struct.pack("<I", 5000), FormatError, "1 to 4096 units"),
        (156, b"\1", UnsupportedVersionError, "reserved"),
        (160, b"\n", FormatError, "profile is not printable"),
        (167, b"\xff", FormatError, "variant is not printable"),
        (167, b"1280x720", FormatError, "order of its variants"),  # a name twice
        (167 + 48 + 3, b"\x80", FormatError, "token id 2147483653"),
        (UNIT_TABLE, struct.pack("<I", 1), FormatError, "follow in order from 0"),
        (UNIT_TABLE + 4, struct.pack("<I", 0), FormatError, "covers 0 layers"),
        (UNIT_TABLE + 4, struct.pack("<I", 4), FormatError, "covers 4 layers"),
        (UNIT_TABLE + 8, struct.pack("<H", 2), FormatError, "unknown variant"),
        (UNIT_TABLE + 8, struct.pack("<H", 1), FormatError, "order of its variants"),
        (UNIT_TABLE + 10, b"\1", FormatError, "reserved"),
        (UNIT_TABLE + 16, struct.pack("<Q", 0), FormatError, "must start at byte"),
        (UNIT_TABLE + 24, struct.pack("<Q", 0), FormatError, "must start at byte"),
        (UNIT_TABLE + 24, struct.pack("<Q", 11), FormatError, "must start at byte"),
        (UNIT_TABLE + 64 + 4, struct.pack("<I", 2), FormatError, "covers 2 layers"),
    ],
)
def test_broken_rule_is_named(offset, replacement, error, match):
    with pytest.raises(error, match=match):
        parse_header(resealed(chunk(), offset, replacement))


@pytest.mark.parametrize(
    ("units", "changes", "match"),
    [
        (UNITS[:1], {}, "ends at layer 2 of 3"),
        (UNITS[1:], {}, "follow in order from 0"),
        ((UNITS[2], UNITS[0], UNITS[1], UNITS[2]), {}, "order of its variants"),
        ((), {}, "variants, got 0"),
        ((UnitData(0, 3, "-", b""),), {}, "must start at byte"),
        ((UnitData(0, 3, "v" * 25, b"x"),), {}, "variant name"),
        ((UnitData(0, 3, "", b"x"),), {}, "variant name"),
        (UNITS, {"token_ids": (-1,)}, "cannot be written"),
        (UNITS, {"token_ids": (2**31,)}, "token id"),
        (UNITS, {"token_ids": ()}, "tokens, got 0"),
        (UNITS, {"token_ids": range(MAX_CHUNK_TOKENS + 1)}, "tokens, got 65537"),
        (UNITS, {"profile": "é"}, "cannot be written"),
        (UNITS, {"profile": ""}, "profile text bytes, got 0"),
        (UNITS, {"identity": b"short"}, "identity key must be 32 bytes, got 5"),
        (UNITS, {"first_position": -1}, "first_position"),
    ],
)
def test_writer_refuses_what_a_reader_would(units, changes, match):
    with pytest.raises(FormatError, match=match):
        chunk(units, **changes)


def test_reading_a_header_needs_the_standard_library_only():
    program = (
        "import sys, kvfetcher.format.container as c;"
        "print(sorted({'numpy', 'av', 'zstandard', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
