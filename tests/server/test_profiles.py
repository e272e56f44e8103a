"""Every lossy profile through the whole graph, with a tiny random model that needs no download."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from kvfetcher import wire
from kvfetcher.format.container import parse_header
from support.engine_rig import write_model

from .conftest import CHUNK_TOKENS, DOCUMENT, start_server

pytestmark = [pytest.mark.triton, pytest.mark.slow]

QUESTION = DOCUMENT[: 3 * CHUNK_TOKENS + 10]  # one token per byte


@pytest.fixture(scope="module", autouse=True)
def _own_cache(model, tmp_path_factory):
    """Calibrations are kept in the user's cache folder; the tests' are not for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def calibration(tiny_model, tmp_path_factory):
    """Made by the command, from a few short texts; its certificate comes with it."""
    from kvfetcher.calibration.commands import main_calibrate

    folder = tmp_path_factory.mktemp("calibration")
    texts = folder / "texts"
    texts.mkdir()
    words = DOCUMENT.split()
    for index in range(6):
        # Drawn anew: files that repeat one another are not calibrated with.
        drawn = random.Random(index).choices(words, k=2000)
        (texts / f"{index}.txt").write_text(" ".join(drawn)[:6500])
    output = folder / "tiny.safetensors"
    assert main_calibrate([str(tiny_model), "--texts", str(texts), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def lossy(request, tiny_model, tmp_path_factory):
    """A server that keeps what it saves in the profile that the parameter names."""
    codec = {"profile": request.param}
    if request.param == "balanced":
        codec["calibration"] = str(request.getfixturevalue("calibration"))
        codec["packed_copy"] = True
    store = {"tier_memory_bytes": 64 << 20} if request.param == "uncalibrated" else {}
    with start_server(
        tmp_path_factory.mktemp("store"),
        engine={"model": str(tiny_model)},
        codec=codec,
        store=store,
    ) as running:
        yield running


@pytest.mark.parametrize("lossy", ["uncalibrated", "paper", "balanced"], indirect=True)
def test_a_lossy_profile_is_saved_hit_and_smaller(lossy):
    profile = lossy.config.codec.profile
    others = set(lossy.settle())
    miss = lossy.client.generate(QUESTION, max_tokens=4)
    saved = set(lossy.settle()) - others
    assert len(saved) == miss.report.prompt_tokens // CHUNK_TOKENS
    hit = lossy.generate_hit(QUESTION, max_tokens=4)
    assert hit.report.hit_tokens == 3 * CHUNK_TOKENS
    assert hit.report.raw["profile"].startswith(profile)
    if profile == "balanced":
        check_packed_copy(lossy, hit)
    assert hit.report.raw["engine"]["cached_tokens"] == hit.report.hit_tokens


@pytest.mark.parametrize("lossy", ["uncalibrated"], indirect=True)
def test_warming_brings_a_prefix_near_and_generates_nothing(lossy):
    question = f"Warm: {QUESTION}"
    others = set(lossy.settle())
    lossy.client.generate(question, max_tokens=2)
    files = [path for path in lossy.settle() if path not in others]
    warmed = lossy.client.generate(question, kv_policy="warm")
    assert (warmed.text, warmed.output_ids, warmed.finish_reason) == ("", (), "warmed")
    report = warmed.report.raw
    assert (report["outcome"], report["hit_tokens"]) == ("warmed", 0)
    assert report["chunks_hit"] == report["chunks_stored"] == len(files) > 1
    assert report["bytes_fetched"] >= sum(path.stat().st_size for path in files)
    for path in files:  # what is near needs the store no more
        path.write_bytes(b"")
    hit = lossy.generate_hit(question, max_tokens=2)
    assert hit.report.raw["chunks_hit"] == report["chunks_hit"]
    again = lossy.client.warm(lossy.token_ids(question).tolist()).raw
    assert (again["outcome"], again["chunks_hit"]) == ("warmed", report["chunks_hit"])
    lossy.settle()


def test_a_profile_without_its_calibration_is_refused_before_any_request(tiny_model, tmp_path):
    from kvfetcher.errors import ServerError

    with (
        pytest.raises(ServerError, match="calibration"),
        start_server(
            tmp_path / "store",
            engine={"model": str(tiny_model)},
            codec={"profile": "balanced"},
            server={"ready_timeout_seconds": 60.0},
        ),
    ):
        pass


def test_a_raw_profile_is_hit_without_a_decoder(tiny_model, tmp_path):
    with start_server(
        tmp_path / "store", engine={"model": str(tiny_model)}, codec={"profile": "raw"}
    ) as running:
        miss = running.client.generate(QUESTION, max_tokens=4)
        running.settle()
        hit = running.generate_hit(QUESTION, max_tokens=4)
        assert hit.report.hit_tokens == 3 * CHUNK_TOKENS
        assert set(hit.report.raw["decoders"]) == {"none"}
        assert hit.output_ids == miss.output_ids
        running.settle()


def test_a_chunk_in_several_sizes_is_hit_in_some_of_them(tiny_model, tmp_path):
    sizes = ("144x144", "256x640")
    with start_server(
        tmp_path / "store",
        engine={"model": str(tiny_model)},
        codec={"profile": "exact", "frame_sizes": sizes, "raw_copy": True},
    ) as running:
        miss = running.client.generate(QUESTION, max_tokens=4, kv_policy="recompute")
        running.settle()
        hit = running.generate_hit(QUESTION, max_tokens=4)
        assert hit.report.hit_tokens == 3 * CHUNK_TOKENS
        taken = hit.report.raw["variants"]
        assert set(taken) <= {*sizes, "raw"}
        assert sum(taken.values()) == hit.report.raw["units"] > 0
        assert hit.output_ids == miss.output_ids
        running.settle()


def check_packed_copy(running, hit):
    """Packed units restore to what the pictures do, also without passing through `kv_decode`."""
    assert set(hit.report.raw["variants"]) <= {"-", "packed"}
    assert sum(hit.report.raw["variants"].values()) == hit.report.raw["units"] > 0
    chunk = running.chunk_files()[0].read_bytes()
    header = parse_header(chunk)
    assert header.variants == ("-", "packed")
    whole = {
        (variant, model): b"".join(
            restore(running, chunk[e.offset : e.stop], model) for e in header.units_of(variant)
        )
        for variant, model in (
            ("-", wire.KV_PIPELINE),
            ("packed", wire.KV_PIPELINE),
            ("packed", wire.KV_RESTORE),
        )
    }
    assert len(set(whole.values())) == 1
    assert len(whole["-", wire.KV_PIPELINE]) == header.spec.elements_per_token * 2 * CHUNK_TOKENS


def restore(running, unit, model):
    """A unit's values; `kv_restore` itself takes units without video as they are."""
    arrays = {wire.UNIT: np.frombuffer(unit, np.uint8)[None]}
    if model == wire.KV_RESTORE:
        arrays[wire.PLANES] = np.zeros((1, 1, 1, 1, 1), np.uint8)
    inputs = []
    for name, array in arrays.items():
        inputs.append(grpcclient.InferInput(name, array.shape, "UINT8"))
        inputs[-1].set_data_from_numpy(array)
    return running.triton.infer(model, inputs).as_numpy(wire.KV_VALUES).tobytes()
