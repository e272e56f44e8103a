"""Where a GPU keeps a unit's integers, and their parts beyond float16 and 8 bits; no GPU is needed."""

import numpy as np
import pytest

from kvfetcher.codec.base import LeftToCpuError
from kvfetcher.codec.gpu.rows import (
    EXACT_HALF,
    EXTRA_FACTOR,
    RANK8,
    RANK_EXTRA,
    TILE_ROWS,
    plan_leading_rows,
    plan_rows,
)

TOKENS = 7
WIDE = np.array([6, 5, 2, 1], np.uint8)
NONE = np.empty(0, np.uint8)


@pytest.fixture
def rows():
    """Two transforms with rows between them: 40 leading and 150 trailing ones, 3 and 5."""
    return plan_rows(230, [slice(0, 190), slice(200, 208)], [40, 3], [WIDE, NONE], 8)


def test_every_row_has_one_place_and_one_tile(rows):
    assert (rows.num_leading, rows.num_trailing) == (43, 3 * RANK8)
    first, second = rows.parts
    assert (first.first_leading, first.first_trailing) == (0, 0)
    assert (second.first_leading, second.first_trailing) == (40, 2 * RANK8)
    leading, columns = rows.tables.places.copy(), rows.tables.places.copy()
    covered = np.zeros(230, int)
    for start, stop, row, column in rows.tables.tiles.tolist():
        assert 0 < stop - start <= TILE_ROWS
        covered[start:stop] += 1
        if row >= 0:
            assert (leading[start:stop] == row + np.arange(stop - start)).all()
        elif column >= 0:
            assert column % TILE_ROWS == 0
            assert (-1 - columns[start:stop] == column + np.arange(stop - start)).all()
        else:
            assert 190 <= start < stop <= 200 or start >= 208
    assert (covered == 1).all()


def test_low_bits_have_lines_bit_by_bit(rows):
    assert rows.tables.low_bits[:5].tolist() == [6, 5, 2, 1, 0]
    lines = rows.tables.lines
    assert [lines[:4, 0].tolist(), lines[:3, 1].tolist()] == [[0, 1, 2, 3], [4, 5, 6]]
    assert lines[:2, 2].tolist() == [7, 8]
    assert lines[0, 5] == WIDE.sum() - 1
    # 128 << 5 is beyond one float16.
    assert rows.num_high == [2, 0]


def test_uncalibrated_units_have_leading_rows_only():
    rows = plan_leading_rows(100, 12)
    assert (rows.num_leading, rows.num_trailing, rows.half) == (100, 0, 2048)
    assert (rows.tables.places == np.arange(100)).all()


def test_small_escapes_need_nothing(rows):
    """Of packed units: what their row's width does not hold."""
    places, values = np.array([5, 200 * TOKENS + 40]), np.array([-128, 127], np.int32)
    found = rows.large_escapes(places, values, TOKENS)
    assert (found.num_high, found.extra) == (rows.num_high, ())


def test_large_leading_escapes_need_two_halves_up_to_their_row(rows):
    places = np.array([3 * TOKENS, 20 * TOKENS, 30 * TOKENS + 1, 201 * TOKENS])
    values = np.array([1024, EXACT_HALF, EXACT_HALF - 1, -5000], np.int32)
    found = rows.large_escapes(places, values, TOKENS)
    # 1024 << 1 with a low bit; 2048 and a half may be 2049.
    assert found.num_high == [21, 2]
    assert found.extra == ()


@pytest.mark.parametrize("size", [128, 200, 2300, 70_000, (1 << 23) - 1])
def test_large_trailing_escapes_are_8_bits_and_a_few_exact_halves(rows, size):
    rng = np.random.default_rng(size)
    places = np.sort(rng.choice(np.arange(40 * TOKENS, 190 * TOKENS), 50, replace=False))
    places = np.append(places, 204 * TOKENS + 3)
    values = rng.integers(-size, size, len(places), endpoint=True).astype(np.int32)
    values[:2] = size, -size - (size == 128)
    found = rows.large_escapes(places, values, TOKENS)
    assert found.num_high == rows.num_high
    total = np.zeros((190, TOKENS), np.int64)
    extra = found.extra[0]
    assert len(extra.columns) % RANK_EXTRA == 0
    assert np.isfinite(extra.amounts).all()
    for column, amounts in zip(extra.columns, extra.amounts.astype(np.int64), strict=True):
        total[40 + column // 2] += amounts * (EXTRA_FACTOR if column % 2 else 1)
    in_8_bits = np.clip(values, -128, 127)
    expected = np.zeros_like(total)
    expected.reshape(-1)[places[:-1]] = (values - in_8_bits)[:-1]
    np.testing.assert_array_equal(total, expected)


def test_what_a_gpu_does_not_add_exactly_is_left_to_the_cpu(rows):
    def large(row, value):
        return rows.large_escapes(np.array([row * TOKENS]), np.array([value], np.int32), TOKENS)

    assert large(10, (1 << 25) - 1).num_high[0] == 11
    for row, value in ((10, 1 << 25), (0, 1 << 19), (50, (1 << 24) + 128), (50, -(1 << 25))):
        with pytest.raises(LeftToCpuError, match="of the unit is beyond"):
            large(row, value)
