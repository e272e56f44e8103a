"""Chunks in an arena on a GPU -> chunk objects, with host memory and the CPU in the GPU's place."""

import json
import shutil
from concurrent.futures import wait

import numpy as np
import pytest
import torch

from kvfetcher import wire
from kvfetcher.backend.coding import ChunkEncoder
from kvfetcher.backend.encode_requests import EncodeRequests
from kvfetcher.backend.gpu_encoding import ChunkSource, GpuChunkEncoder
from kvfetcher.codec.encoders import choose_encoder
from kvfetcher.codec.profiles import decode_unit, encode_chunk, restore_unit
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.codec.video import VideoDecoder, encode_planes
from kvfetcher.config import CodecConfig
from kvfetcher.errors import GpuError
from kvfetcher.format.container import parse_header
from kvfetcher.memory.gpu_arena import GpuArena
from kvfetcher.spec import KVSpec
from support import pb_utils
from support.host_as_gpu import gpus_in_host_memory
from support.kernels_on_host import build
from support.trust import give_out

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")

SPEC = KVSpec(num_layers=3, num_kv_heads=1, head_dim=32)
TOKENS = 160
PROFILE = UncalibratedProfile(unit_layers=2)
RNG = np.random.default_rng(3)
VALUES = [
    float32_to_bits(
        RNG.standard_normal((3, 2, 1, TOKENS, 32)).astype(np.float32) * (1 + chunk), "bfloat16"
    )
    for chunk in range(2)
]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    return build(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def arena(tmp_path, monkeypatch):
    gpus_in_host_memory(monkeypatch)
    made = GpuArena.create_on(
        0, tmp_path / "arena", spec=SPEC, tokens_per_block=32, num_bytes=12 << 15
    )
    for chunk, values in enumerate(VALUES):
        made.write(target(made, chunk), 0, values)
    yield made
    made.close()


@pytest.fixture
def gpu_encoder(launcher):
    made = GpuChunkEncoder(0, PROFILE, encode_planes, launcher=launcher, device=torch.device("cpu"))
    yield made
    made.close()


def target(arena, chunk):
    return arena.target(tuple(range(5 * chunk, 5 * chunk + 5)), TOKENS)


def expected(chunk):
    return encode_chunk(
        VALUES[chunk],
        spec=SPEC,
        profile=PROFILE,
        identity=bytes(32),
        chunk_key=bytes([chunk] * 32),
        token_ids=range(TOKENS),
        first_position=TOKENS * chunk,
        num_threads=1,
    )


def restored(chunk):
    decoder = VideoDecoder()
    units = [chunk[entry.offset : entry.stop] for entry in parse_header(chunk).units]
    return [restore_unit(unit, decode_unit(unit, decoder)).values for unit in units]


def test_chunks_of_several_requests_hold_what_the_cpu_saves(arena, gpu_encoder):
    token_ids, none = list(range(TOKENS)), bytes(32)
    sources = [
        ChunkSource(
            arena,
            target(arena, n),
            token_ids,
            TOKENS * n,
            none,
            chunk_key=bytes([n] * 32),
            parent_key=none,
        )
        for n in range(2)
    ]
    made = {}
    gpu_encoder.encode(iter(sources), made.__setitem__)
    wait(made.values())
    assert sorted(made) == [0, 1]
    for chunk in range(2):
        found, by_cpu = made[chunk].result(), expected(chunk)
        assert parse_header(found).chunk_key == parse_header(by_cpu).chunk_key
        for ours, theirs in zip(restored(found), restored(by_cpu), strict=True):
            assert np.array_equal(ours, theirs)


def request(arena, chunk, **changes):
    spec = {"spec": SPEC.to_dict(), "first_position": TOKENS * chunk, **changes}
    return pb_utils.Request(
        {
            wire.INPUT_IDS: np.arange(TOKENS, dtype=np.int32),
            wire.KV_SPEC: np.array([json.dumps(spec).encode()], object),
            wire.KV_TARGET: np.array(
                [give_out("read", arena, target(arena, chunk)).encode()], object
            ),
        }
    )


def answer(of):
    assert of.sender.is_final.wait(60)
    (response,) = of.sender.responses
    return response


@pytest.fixture
def requests_of(gpu_encoder):
    encoder = ChunkEncoder(CodecConfig(profile="uncalibrated", unit_layers=2), on_gpu=True)
    encoder._on_gpu[0] = gpu_encoder
    encoder._encoder = choose_encoder("x265")  # which is there at once
    made = EncodeRequests(encoder, pb_utils)
    yield made
    made.close()


def test_requests_that_wait_are_answered_each(arena, requests_of):
    requests = [request(arena, 0), request(arena, 1), request(arena, 0, chunk_key="zz")]
    requests_of.execute(requests)
    for number in range(2):
        response = answer(requests[number])
        assert json.loads(response[wire.KV_STATUS][0])["encoder"] == "gpu"
        chunk = response[wire.CHUNK].tobytes()
        assert parse_header(chunk).first_position == TOKENS * number
        for ours, theirs in zip(restored(chunk), restored(expected(number)), strict=True):
            assert np.array_equal(ours, theirs)
    assert "does not describe a chunk" in answer(requests[2]).error.message()


def test_where_the_gpu_fails_the_cpu_encodes(arena, requests_of, gpu_encoder, monkeypatch):
    def fail(*_):
        raise GpuError("out of memory")

    monkeypatch.setattr(gpu_encoder, "encode", fail)
    asked = request(arena, 1)
    requests_of.execute([asked])
    response = answer(asked)
    assert json.loads(response[wire.KV_STATUS][0])["encoder"] != "gpu"
    assert parse_header(response[wire.CHUNK].tobytes()).num_tokens == TOKENS


def test_chunks_for_the_cpu_are_encoded_side_by_side(arena):
    encoder = ChunkEncoder(CodecConfig(profile="uncalibrated", unit_layers=2, encoder="x265"))
    made = EncodeRequests(encoder, pb_utils)
    asked = [request(arena, number % 2) for number in range(7)]
    made.execute(asked)
    made.close()
    for number, one in enumerate(asked):
        response = answer(one)
        assert json.loads(response[wire.KV_STATUS][0])["encoder"] == "x265"
        chunk = response[wire.CHUNK].tobytes()
        for ours, theirs in zip(restored(chunk), restored(expected(number % 2)), strict=True):
            assert np.array_equal(ours, theirs)


def test_requests_are_answered_at_once_where_that_is_asked_for(arena):
    encoder = ChunkEncoder(CodecConfig(profile="uncalibrated", unit_layers=2, encoder="x265"))
    made = EncodeRequests(encoder, pb_utils, at_once=True)
    good, bad = made.execute([request(arena, 1), request(arena, 0, chunk_key="zz")])
    made.close()
    for ours, theirs in zip(
        restored(good[wire.CHUNK].tobytes()), restored(expected(1)), strict=True
    ):
        assert np.array_equal(ours, theirs)
    assert "does not describe a chunk" in bad.error.message()


def test_a_small_unit_goes_through_before_the_first_request(gpu_encoder):
    gpu_encoder.warm_up()
