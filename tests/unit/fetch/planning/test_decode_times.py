import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.errors import ConfigError
from kvfetcher.fetch.planning.decode_times import (
    H100_NVDEC,
    TABLE_FILE,
    DecodeCorrection,
    DecodePoint,
    DecodeTable,
    cpu_table,
    load_table,
    picture_load,
    store_table,
)

TABLES = [H100_NVDEC, cpu_table(2), cpu_table(1)]


@pytest.mark.parametrize("table", TABLES)
def test_measured_points_are_met(table):
    for point in table.points:
        busy = table.picture_seconds(point.load, num_busy=table.num_decoders)
        assert busy == pytest.approx(point.busy_seconds)
        assert table.latency_seconds(point.load) == pytest.approx(point.latency_seconds)
        if table.num_decoders > 1:
            alone = table.picture_seconds(point.load, num_busy=1)
            assert alone == pytest.approx(point.alone_seconds)


def test_h100_gives_the_rates_that_were_measured():
    samples = 3 * 256 * 640
    seconds = H100_NVDEC.picture_seconds(picture_load(samples, 1.62 * samples), num_busy=7)
    assert 7 * samples / seconds == pytest.approx(2.40e9)


@given(st.floats(1e3, 1e9), st.floats(1.0, 10.0), st.integers(1, 9), st.sampled_from(TABLES))
def test_more_load_and_more_neighbours_never_take_less(load, factor, num_busy, table):
    seconds = table.picture_seconds(load, num_busy=num_busy)
    assert 0 < seconds <= table.picture_seconds(load * factor, num_busy=num_busy) * (1 + 1e-9)
    assert seconds <= table.picture_seconds(load, num_busy=num_busy + 1) * (1 + 1e-9)
    assert table.latency_seconds(load) <= table.latency_seconds(load, num_pictures=2)


def test_pictures_below_two_bits_per_sample_are_bound_by_samples():
    assert picture_load(1000, 100) == picture_load(1000, 2000) == 2000
    assert picture_load(1000, 3000) == 3000


def test_table_comes_back_from_its_file(tmp_path):
    assert load_table(tmp_path, fallback=H100_NVDEC) is H100_NVDEC
    path = store_table(tmp_path / "new", cpu_table(3))
    assert path.name == TABLE_FILE
    assert load_table(tmp_path / "new", fallback=H100_NVDEC) == cpu_table(3)
    assert [p.name for p in path.parent.iterdir()] == [TABLE_FILE]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "version 2, this build reads 1"),
        ({"points": []}, "has points"),
        ({"num_decoders": 0}, "has points, decoders"),
        ({"restore_elements_per_second": 0}, "restore rate"),
        ({"points": [{"width": 1}]}, "not a table"),
        ({"surprise": 1}, "not a table"),
    ],
)
def test_files_that_are_not_tables_are_refused(tmp_path, change, match):
    data = {**json.loads(H100_NVDEC.to_json()), **change}
    (tmp_path / TABLE_FILE).write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=f"{match}.*run `kvfetcher doctor` again"):
        load_table(tmp_path, fallback=H100_NVDEC)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", "null"])
def test_garbage_is_refused(text):
    with pytest.raises(ConfigError, match="not a table"):
        DecodeTable.from_json(text)


def test_folders_that_cannot_be_used_are_errors(tmp_path):
    (tmp_path / TABLE_FILE).mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_table(tmp_path, fallback=H100_NVDEC)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        store_table(tmp_path / "file", H100_NVDEC)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "fast", None])
def test_points_are_positive_numbers(value):
    with pytest.raises(ConfigError, match="busy_seconds must be a number above 0"):
        replace(H100_NVDEC.points[0], busy_seconds=value)


def test_points_of_one_load_do_not_divide_by_zero():
    points = (DecodePoint(256, 640, 1.0, 1e-3, 1e-3, 2e-3), DecodePoint(256, 640, 2.0, 1, 1, 1e-3))
    table = replace(H100_NVDEC, points=points)
    assert table.picture_seconds(points[0].load, num_busy=7) == 2e-3


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0])
def test_correction_learns_the_factor_and_shrugs_off_outliers(factor):
    correction = DecodeCorrection()
    assert correction.factor == 1.0
    for index in range(60):
        actual = factor * (1000 if index % 15 == 7 else 1)
        correction.observe(1.0, actual)
    assert correction.factor == pytest.approx(factor, rel=0.6)
    before = correction.factor
    correction.observe(0.0, 1.0)
    correction.observe(1.0, 0.0)
    assert correction.factor == before


def test_first_observations_count_much():
    correction = DecodeCorrection()
    for _ in range(4):
        correction.observe(1.0, 4.0)
    assert correction.factor > 2.5
