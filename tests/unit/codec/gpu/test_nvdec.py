"""`NvdecDecoder` around its library, with the CPU decoder in NVDEC's place (NVDEC is in tests/gpu)."""

import ctypes
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kvfetcher.codec.gpu import nvdec
from kvfetcher.codec.gpu.nvdec import NvdecDecoder, sample_shift
from kvfetcher.codec.video import encode_planes
from kvfetcher.errors import CodecError, DecoderUnavailableError
from kvfetcher.format.pictures import PlaneGeometry
from support.host_as_gpu import HostAsGpu, nvdec_on_host

GEOMETRY = PlaneGeometry(num_frames=3, width=160, height=144, bit_depth=10)
PLANES = np.random.default_rng(3).integers(480, 544, GEOMETRY.shape, dtype=np.uint16)


@pytest.fixture(scope="module")
def packets():
    return encode_planes(PLANES, bit_depth=10)


@pytest.fixture
def host(monkeypatch):
    return nvdec_on_host(monkeypatch, GEOMETRY)


@pytest.fixture
def decoder(host):
    made = NvdecDecoder()
    yield made
    made.close()


def test_memory_is_asked_for_when_the_first_picture_is_there(host, decoder, packets):
    library, gpu = host
    address = gpu.allocate(GEOMETRY.num_bytes)
    asked = []

    def place():
        asked.append(library.pictures)
        return address

    assert decoder.decode_on_gpu(packets, GEOMETRY, place) is None
    assert asked == [1]
    data = ctypes.string_at(address, GEOMETRY.num_bytes)
    got = np.frombuffer(data, np.uint16).reshape(GEOMETRY.shape) >> sample_shift(GEOMETRY)
    np.testing.assert_array_equal(got, PLANES)


def test_planes_without_room_on_the_gpu_come_to_the_host_in_one_decode(host, decoder, packets):
    planes = decoder.decode_on_gpu(packets, GEOMETRY, lambda: None)
    np.testing.assert_array_equal(planes, PLANES)
    assert host[0].pictures == 3
    np.testing.assert_array_equal(decoder.decode(packets, GEOMETRY), PLANES)
    assert len(host[0].opened) == 1, "the session is kept"


def test_nothing_is_asked_for_where_no_picture_comes(decoder, packets):
    asked = []
    with pytest.raises(CodecError):
        decoder.decode_on_gpu([b"\0\0\0\1no stream"], GEOMETRY, lambda: asked.append(1))
    assert not asked
    assert decoder.decode_on_gpu(packets, GEOMETRY) is None, "pictures are dropped"


def test_nothing_is_asked_of_another_gpu(host, packets, monkeypatch):
    monkeypatch.setattr(nvdec, "cuda_context", HostAsGpu)
    decoder = NvdecDecoder(2)
    np.testing.assert_array_equal(decoder.decode(packets, GEOMETRY), PLANES)
    assert (host[0].gpus, decoder.context.gpu) == ({2}, 2)


@pytest.mark.parametrize(("limit", "kept"), [(8, 8), (1, 1), (2.5, 2)])
def test_open_decoders_are_bounded_by_what_their_pictures_take(
    decoder, packets, monkeypatch, limit, kept
):
    picture = GEOMETRY.num_bytes // GEOMETRY.num_frames
    monkeypatch.setattr(nvdec, "MAX_SESSION_BYTES", int(limit * picture))
    for _ in range(10):  # a new size each time, but for what the session is given
        decoder.decode_on_gpu(packets, GEOMETRY)
        session = decoder._sessions.pop(nvdec._session_key(GEOMETRY))
        decoder._sessions[object()] = session
    assert len(decoder._sessions) == kept
    assert nvdec.MAX_SESSIONS == 8


@pytest.mark.parametrize(
    ("version", "is_old"),
    [
        ("2.0.4", True),
        ("2.2", True),
        ("2.2.3", True),
        ("2.2.4", False),
        ("2.10.0", False),
        ("3.0.0", False),
        ("2.2.3.post1", True),
        ("unknown", False),
    ],
)
def test_libraries_with_strides_in_bytes_are_refused_by_version(monkeypatch, version, is_old):
    monkeypatch.setattr(nvdec, "loads_library", lambda name: True)
    library = SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", library)
    if not is_old:
        assert nvdec.import_library() is library
        return
    with pytest.raises(DecoderUnavailableError, match=r"strides .*'PyNvVideoCodec>=2\.2\.4,<3'"):
        nvdec.import_library()


def test_strides_in_bytes_are_named(monkeypatch):
    geometry = replace(GEOMETRY, num_frames=1)
    frame = SimpleNamespace(
        shape=(3 * 144, 160), strides=(320, 2), framesize=lambda: 3 * 144 * 160 * 2
    )
    with pytest.raises(DecoderUnavailableError, match=r"strides \(320, 2\), .* 2\.2\.4"):
        nvdec._checked_address(frame, geometry)
