"""The benchmark on a tiny random Llama: every row runs, and none of it means anything."""

import json
from unittest import mock

import numpy as np
import pytest

from kvfetcher.bench import codec
from kvfetcher.calibration.calibrate import CalibrateSettings, CollectSettings, calibrate
from kvfetcher.calibration.capture import CaptureModel
from kvfetcher.calibration.certify import CertifySettings, held_out_documents
from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.ladder import library
from kvfetcher.codec.ladder import profile as transform
from kvfetcher.codec.ladder.rope import rotate_keys
from kvfetcher.codec.profiles import decode_unit
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import ConfigError
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import LADDER, KVSpec
from support.calibrations import correlated_values, make_calibration
from support.tiny_llama import save_tiny_llama, walk_text

SHORT = CertifySettings(num_documents=2, prefix_tokens=256, following_tokens=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def calibration(folder):
    return calibrate(
        folder,
        texts=[walk_text(i) for i in range(4)],
        held_out=[walk_text(i) for i in range(10, 12)],
        settings=CalibrateSettings(
            num_step_documents=1,
            collect=CollectSettings(num_documents=3, prefix_tokens=96, label_tokens=24),
            certify=SHORT,
        ),
    )


@pytest.fixture(scope="module")
def rows(folder, calibration):
    model = CaptureModel.load(folder)
    documents = held_out_documents(
        model, [walk_text(i) for i in range(10, 12)], SHORT, progress=lambda *_: None
    )
    return {row.name: row for row in codec.run(model, calibration, documents)}


def test_table_has_every_rung_the_paper_and_the_rivals(rows):
    assert {"exact", *LADDER, "uncalibrated", "bf16", "CacheGen", "zstd of bf16"} <= set(rows)
    assert sum(row.family == "paper" for row in rows.values()) == 6


def test_lossless_rows_have_the_divergence_of_bfloat16(rows):
    assert rows["exact"].kl == rows["bf16"].kl == rows["zstd of bf16"].kl
    assert rows["exact"].bits_per_element < 16 * 1.6


def test_certificate_and_table_agree(rows, calibration):
    for name in LADDER:
        certified = calibration.certificate["profiles"][name]
        assert rows[name].kl == pytest.approx(certified["kl"], rel=1e-6)
        assert rows[name].bits_per_element == pytest.approx(certified["bits_per_element"], abs=1e-4)


def test_our_rows_have_speeds_and_the_others_do_not(rows):
    for row in rows.values():
        measured = row.encode_elements_per_second is not None
        assert measured == (row.family in ("ladder", "ours") or "frame" in row.name)
        if measured:
            assert row.decode_restore_elements_per_second < row.decode_elements_per_second


def test_rivals_say_why_they_have_no_speed(rows):
    for row in rows.values():
        has_speed = row.encode_elements_per_second is not None
        assert (row.no_speed == "") == has_speed


@pytest.fixture
def wide():
    """A calibration with rows of many steps' deviation, and values for it."""
    spec = KVSpec(2, 2, 16)
    calibration = make_calibration(spec)
    library.register_calibration(calibration)
    values = correlated_values(spec, 300)
    rotate_keys(values[:, 0], calibration.rope, 0)
    return calibration, values


def test_bits_over_entropy_are_told_by_class_of_rows(rows, wide):
    calibration, values = wide
    coder = codec.ProfileCoder(transform.TransformProfile("near", calibration), calibration.spec)
    coder(values)
    for bands in (rows["uncalibrated"].bands, coder.measured()["bands"]):
        assert len(bands) > 1
        assert set(bands) < set(codec.BANDS)
        assert sum(band["share"] for band in bands.values()) == pytest.approx(1)
        assert all(band["video_over_entropy"] > 0.9 for band in bands.values())
        entropies = [bands[band]["entropy_bits"] for band in codec.BANDS if band in bands]
        assert entropies == sorted(entropies, reverse=True)
    assert rows["CacheGen"].bands == {}


def test_symbols_are_the_whole_integers(wide):
    """Those of a unit with low bits are those of the same unit without."""
    calibration, values = wide
    source = UnitSource(float32_to_bits(values, "bfloat16"), calibration.spec, 0, 0)
    found = []
    for shifts in (transform._shifts, lambda *_: np.zeros(0, np.uint8)):
        with mock.patch.object(transform, "_shifts", shifts):
            data = transform.TransformProfile("near", calibration).encode(source, "-")
            unit = parse_unit(data)
            found.append(codec._symbols(unit, decode_unit(data, VideoDecoder())))
    cut, whole = found
    assert cut.low_bits.any()
    assert not whole.low_bits.any()
    np.testing.assert_array_equal(cut.integers, whole.integers)


def test_unknown_row_is_refused(folder, calibration):
    with pytest.raises(ConfigError, match="no rows"):
        codec.run(None, calibration, [], only=["nonsense"])


def test_command_writes_json_and_plot(folder, calibration, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.store_calibration(calibration)
    texts = tmp_path / "texts"
    texts.mkdir()
    for seed in (10, 11):
        (texts / f"{seed}.txt").write_text(walk_text(seed, 2000).text)
    status = codec.main(
        [
            "--model", str(folder), "--texts", str(texts), "--documents", "1",
            "--prefix-tokens", "256", "--following-tokens", "32", "--only", "balanced",
            "--only", "fp8 e4m3", "--json", "--plot", str(tmp_path / "plot.svg"),
        ]
    )  # fmt: skip
    assert status == 0
    report = json.loads(capsys.readouterr().out)
    # The certificate's texts and those given, in one run.
    expected = [(s, name) for s in ("certificate", "given") for name in ("balanced", "fp8 e4m3")]
    assert [(row["text_set"], row["name"]) for row in report["rows"]] == expected
    assert report["documents"]["given"] == ["user/10.txt#0"]
    parallel = report["parallel_encode"]
    assert set(parallel["wall_seconds_by_threads"]) >= {"1", str(parallel["cores"])}
    assert parallel["elements"] == 256 * calibration.spec.elements_per_token
    assert report["calibration"] == calibration.digest
    assert KVSpec(**report["spec"]) == calibration.spec
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")


def test_command_tells_what_is_wrong_in_one_line(folder, calibration, tmp_path, capsys):
    path = tmp_path / "c.safetensors"
    from dataclasses import replace

    replace(calibration, model="0" * 64).save(path)
    assert codec.main(["--model", str(folder), "--calibration", str(path)]) == 1
    assert "another model" in capsys.readouterr().err
