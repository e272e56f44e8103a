"""Low bits beside the video: exact on the integers, refused where they are not what they must be."""

from dataclasses import replace

import numpy as np
import pytest

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.ladder import profile as transform
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.ladder.low_bits import cut, packed_bytes, row_shifts, split
from kvfetcher.codec.ladder.packed import read_lines
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.profiles import decode_unit, restore_unit
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import FormatError, UnsupportedVersionError
from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import HAS_LOW_BITS, parse_unit, raw_section, write_unit
from kvfetcher.spec import KVSpec
from support.calibrations import correlated_values, make_calibration
from support.tamper import resealed_unit

SPEC = KVSpec(4, 2, 8)
TOKENS = 37  # no whole byte of bits


@pytest.fixture(scope="module", params=[0, 1], ids=["all heads", "one head"])
def unit(request):
    calibration = make_calibration(SPEC, heads=request.param)
    register_calibration(calibration)
    bits = float32_to_bits(correlated_values(SPEC, TOKENS), SPEC.dtype)[:2]
    return TransformProfile("near", calibration).encode(UnitSource(bits, SPEC, 0, 64), "-")


def test_shifts_are_what_the_format_says():
    step = np.float32(0.3)
    ratios = [5000, 2048.5, 2048, 512, 64.5, 64, 32, 8.01, 8, 4.01, 4, 3, 0]
    sigma = np.float32(ratios) * step
    # As many j of 1 to 8 as sigma > step * 2^(j + 1), counted one at a time.
    expected = [sum(s > step * np.float32(2 ** (j + 1)) for j in range(1, 9)) for s in sigma]
    assert expected == [8, 8, 8, 7, 5, 4, 3, 2, 1, 1, 0, 0, 0]
    np.testing.assert_array_equal(row_shifts(sigma, float(step)), expected[:10])
    assert row_shifts(sigma[10:], float(step)).size == 0


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 256])
def test_integers_come_back_from_their_parts(tokens):
    rng = np.random.default_rng(tokens)
    shifts = [np.uint8([8, 8, 3, 1, 1]), np.uint8([]), np.uint8([2])]
    whole = [rng.integers(-(1 << 23), 1 << 23, (len(s) + 2, tokens), np.int32) for s in shifts]
    high = [integers.copy() for integers in whole]
    data = b"".join(map(cut, high, shifts))
    assert len(data) == packed_bytes(shifts, tokens)
    found = split(read_lines(data, tokens), shifts)
    for integers, top, of_rows, packed in zip(whole, high, shifts, found, strict=True):
        low = packed.unpack(tokens)
        count = len(of_rows)
        np.testing.assert_array_equal(top[count:], integers[count:])
        np.testing.assert_array_equal(top[:count], integers[:count] >> of_rows[:, None])
        np.testing.assert_array_equal(top[:count] * low.factors + low.low, integers[:count])


def test_bits_behind_the_last_token_are_refused():
    data = cut(np.full((2, 9), 3, np.int32), np.uint8([2, 1]))
    assert read_lines(data, 9).shape == (3, 2)
    with pytest.raises(FormatError, match="unused bits"):
        read_lines(data[:-1] + b"\2", 9)


def test_restored_values_are_those_of_whole_samples(unit, monkeypatch):
    parsed = parse_unit(unit)
    assert parsed.flags == HAS_LOW_BITS
    restored = restore_unit(unit, decode_unit(unit, VideoDecoder())).values
    calibration = transform.plan_restore(parsed).calibration
    bits = float32_to_bits(correlated_values(SPEC, TOKENS), SPEC.dtype)[:2]
    monkeypatch.setattr(transform, "_shifts", lambda *_: np.zeros(0, np.uint8))
    whole = TransformProfile("near", calibration).encode(UnitSource(bits, SPEC, 0, 64), "-")
    assert parse_unit(whole).flags == 0
    assert SectionKind.LOW_BITS not in [section.kind for section in parse_unit(whole).sections]
    assert parse_unit(whole).geometry.bit_depth > parsed.geometry.bit_depth
    again = restore_unit(whole, decode_unit(whole, VideoDecoder())).values
    np.testing.assert_array_equal(restored, again)


def test_escaped_high_parts_keep_their_low_bits():
    calibration = make_calibration(SPEC)
    register_calibration(calibration)
    values = correlated_values(SPEC, 256)[:2]
    values[:, :, :, 99] *= 60  # beyond the pictures, below what keeps a token exact
    bits = float32_to_bits(values, SPEC.dtype)
    unit = TransformProfile("near", calibration).encode(UnitSource(bits, SPEC, 0, 64), "-")
    assert transform.plan_restore(parse_unit(unit)).num_escapes > 0
    restored = restore_unit(unit, decode_unit(unit, VideoDecoder())).values
    big = (restored[:, 1, :, 99].astype(np.uint32) << 16).view(np.float32)
    # A lost low bit would be off by up to 255 steps of 0.02.
    np.testing.assert_allclose(big, values[:, 1, :, 99], rtol=2**-7, atol=0.2)


def test_flag_and_section_go_together(unit):
    planes = decode_unit(unit, VideoDecoder())
    with pytest.raises(FormatError, match="has sections"):
        restore_unit(resealed_unit(unit, 10, b"\0\0"), planes)
    for flags in (4, 5, 0x8001):
        with pytest.raises(UnsupportedVersionError, match="flag"):
            parse_unit(resealed_unit(unit, 10, flags.to_bytes(2, "little")))
    for profile in (1, 2, 4, 5, 6):
        with pytest.raises(UnsupportedVersionError, match="flag"):
            parse_unit(resealed_unit(unit, 24, profile.to_bytes(2, "little")))


@pytest.mark.parametrize("change", [-1, 1, 1 << 20])
def test_low_bits_of_another_length_are_refused(unit, change):
    parsed = parse_unit(unit)
    *others, low = parsed.sections
    assert low.kind == SectionKind.LOW_BITS
    wrong = raw_section(
        SectionKind.LOW_BITS, (bytes(low.stored) + bytes(1 << 20))[: low.raw_bytes + change]
    )
    data = write_unit(replace(parsed, sections=(*others, wrong)))
    with pytest.raises(FormatError, match=f"section 24 of the unit must be {low.raw_bytes} bytes"):
        restore_unit(data, decode_unit(data, VideoDecoder()))
