"""The codec models' work without a server: encode, decode with fallback, restore into an arena."""

import json
import sys

import numpy as np
import pytest

from kvfetcher.backend import coding
from kvfetcher.backend.coding import ChunkEncoder, UnitDecoder, UnitRestorer
from kvfetcher.backend.gpu_coding import GpuOutput
from kvfetcher.codec.gpu import nvdec
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.config import CodecConfig
from kvfetcher.errors import (
    ArenaError,
    ChecksumError,
    CodecError,
    DecoderUnavailableError,
    FormatError,
    LayoutError,
    PermissionDeniedError,
    RequestError,
)
from kvfetcher.format.container import parse_header
from kvfetcher.format.pictures import PlaneGeometry
from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import parse_unit
from kvfetcher.memory.arena import Arena
from kvfetcher.memory.permits import Permits
from kvfetcher.spec import KVSpec
from support.tamper import resealed_unit
from support.trust import give_out

SPEC = KVSpec(num_layers=4, num_kv_heads=1, head_dim=16)
TOKENS = np.arange(32, dtype=np.int32)
# Of a size that video shrinks: what it does not is stored raw.
VALUES = float32_to_bits(
    np.random.default_rng(5).normal(size=(4, 2, 1, 32, 16)).astype(np.float32), "bfloat16"
)


def spec_json(**changes):
    return json.dumps({"spec": SPEC.to_dict(), **changes})


def encode(*, spec=None, target="", values=None, tokens=TOKENS):
    encoder = ChunkEncoder(CodecConfig(unit_layers=2))
    try:
        return encoder.encode(
            tokens,
            spec_json=spec or spec_json(),
            target_json=target,
            values=VALUES.tobytes() if values is None else values,
        )
    finally:
        encoder.close()


def units(chunk):
    return [chunk[entry.offset : entry.stop] for entry in parse_header(chunk).units]


@pytest.fixture
def arena(tmp_path):
    made = Arena.create(tmp_path / "arena", spec=SPEC, tokens_per_block=16, num_bytes=1 << 16)
    yield made
    made.close()


def test_values_come_back_from_a_chunk_unit_by_unit():
    chunk, status = encode()
    assert json.loads(status)["num_bytes"] == len(chunk)
    decoder, restorer = UnitDecoder("cpu"), UnitRestorer()
    restored = b""
    for unit in units(chunk):
        planes, decode_status = decoder.decode(unit)
        values, status = restorer.restore(unit, planes, target_json="", decode_status=decode_status)
        assert json.loads(status)["decoder"] == "cpu"
        restored += values
    assert restored == VALUES.tobytes()


def test_an_arena_is_source_and_target(arena):
    source, target = arena.target((2, 0), 32), arena.target((1, 3), 32)
    arena.write(source, 0, VALUES)
    chunk, _ = encode(target=give_out("read", arena, source), values=b"")
    decoder, restorer = UnitDecoder("cpu"), UnitRestorer()
    for unit in units(chunk):
        planes, status = decoder.decode(unit)
        values, _ = restorer.restore(
            unit,
            planes,
            target_json=give_out("write", arena, target),
            decode_status=status,
        )
        assert values == b""
    np.testing.assert_array_equal(arena.read(target), VALUES)
    restorer.close()


def test_a_target_of_an_engine_that_was_restarted_is_refused(arena, tmp_path):
    old = give_out("read", arena, arena.target((0, 1), 32))
    again = Arena.create(tmp_path / "arena", spec=SPEC, tokens_per_block=16, num_bytes=1 << 16)
    with pytest.raises(ArenaError, match="restarted"):
        encode(target=old)
    again.close()


@pytest.mark.parametrize(
    ("offset", "number"), [(48, 1 << 16), (28, 1000)], ids=["tokens", "layers"]
)
def test_a_unit_that_does_not_fit_its_target_is_refused_before_it_is_restored(
    arena, monkeypatch, offset, number
):
    unit = resealed_unit(units(encode()[0])[1], offset, number.to_bytes(4, "little"))
    if offset == 28:  # a model of so many layers, of which the unit has some that are not ours
        unit = resealed_unit(unit, 40, (900).to_bytes(4, "little"))

    def restore(*args):
        raise AssertionError("restored")

    monkeypatch.setattr(coding.profiles, "restore_parsed", restore)
    target = give_out("write", arena, arena.target((0, 1), 32))
    restorer = UnitRestorer()
    with pytest.raises(LayoutError):
        restorer.restore(
            unit, np.zeros((1, 3, 144, 144), np.uint8), target_json=target, decode_status=""
        )
    restorer.close()


@pytest.mark.parametrize(
    "bad",
    ["", "[]", "{}", spec_json(colour=1), spec_json(chunk_key="00"), spec_json(first_position="x")],
)
def test_what_does_not_describe_a_chunk_is_refused(bad):
    with pytest.raises(RequestError, match="kv_spec"):
        encode(spec=bad or "nothing")


def test_values_of_another_size_are_refused_with_both_sizes():
    with pytest.raises(RequestError, match=r"= 8192, got 8191"):
        encode(values=VALUES.tobytes()[:-1])


def test_what_restores_a_unit_is_what_its_decoder_left_of_it(arena):
    chunk, _ = encode()
    decoder, restorer = UnitDecoder("cpu"), UnitRestorer()
    restored, sizes = b"", []
    for unit in units(chunk):
        decoded = decoder.decode_for(unit, "")
        values, _ = restorer.restore(
            decoded.rest, decoded.planes, target_json="", decode_status=decoded.status
        )
        restored += values
        sizes.append((len(decoded.rest), len(unit)))
    assert restored == VALUES.tobytes()
    assert all(rest < whole for rest, whole in sizes)


def test_a_unit_whose_video_differs_from_its_crc_leaves_nothing(arena):
    unit = bytearray(units(encode()[0])[0])
    video = next(s for s in parse_unit(bytes(unit)).sections if s.kind == SectionKind.BITSTREAM)
    unit[bytes(unit).index(bytes(video.stored)) + 9] ^= 1
    with pytest.raises(ChecksumError, match="section 2"):
        UnitDecoder("cpu").decode_for(bytes(unit), "")


class Broken:
    def __init__(self, gpu):
        self.gpu = gpu

    def decode(self, packets, geometry):
        raise CodecError("the engine was reset")

    def is_lost(self):
        return False

    def close(self):
        pass


def test_a_unit_that_nvdec_fails_at_goes_to_the_cpu_with_the_reason(monkeypatch):
    monkeypatch.setattr(coding, "_proven_nvdec", Broken)
    decoder = UnitDecoder("nvdec")
    assert decoder.name == "nvdec"
    unit = units(encode()[0])[0]
    planes, status = decoder.decode(unit)
    expected, _ = UnitDecoder("cpu").decode(unit)
    np.testing.assert_array_equal(planes, expected)
    facts = json.loads(status)
    assert (facts["decoder"], facts["fallback"]) == ("cpu", "the engine was reset")
    with pytest.raises(FormatError):
        decoder.decode(b"no unit")


def test_nvdec_asked_for_where_there_is_none_is_refused_with_a_remedy(monkeypatch):
    def unusable(gpu):
        raise DecoderUnavailableError(f"there is no GPU {gpu} here; install it")

    monkeypatch.setattr(coding, "_proven_nvdec", unusable)
    with pytest.raises(DecoderUnavailableError, match="no GPU 5 here; install"):
        UnitDecoder("nvdec", gpu=5)
    monkeypatch.setattr(nvdec, "has_driver", lambda: True)
    decoder = UnitDecoder("auto", gpu=5)
    assert decoder.name == "cpu"
    _, status = decoder.decode(units(encode()[0])[0])
    assert "no GPU 5 here" in json.loads(status)["fallback"]


@pytest.mark.parametrize(
    ("size", "engines", "refused"),
    [
        ((256, 640), 7, ""),
        ((144, 144), 7, "150x144"),  # 8-bit 4:4:4 pictures 144 wide came back wrong on an H100
        ((8192, 8192), 7, ""),
        ((256, 640), 0, "no HEVC"),
    ],
)
def test_capabilities_refuse_by_size_and_say_the_range(size, engines, refused):
    caps = nvdec.DecoderCaps("4:4:4", 8, engines, 144, 144, 8192, 8192)
    geometry = PlaneGeometry(num_frames=1, width=size[0], height=size[1], bit_depth=8)
    answer = caps.refusal(geometry)
    assert (refused in answer) if refused else answer == ""


def opened(monkeypatch):
    """Paths that were opened from now on."""
    paths = []

    def note(event, args):
        if event == "open" and "arena" in str(args[0]):
            paths.append(args[0])

    monkeypatch.setattr(coding, "parse_unit", lambda *_, **__: pytest.fail("parsed"))
    sys.addaudithook(note)
    return paths


def test_what_was_not_given_out_is_refused_before_anything_is_opened(arena, monkeypatch):
    """No target of a client's own making, of another right, changed, over, or of another run."""
    (unit, *_) = units(encode()[0])
    target = arena.target((0, 1), 32)
    text = target.to_json()
    read = give_out("read", arena, target)
    permit, _, _ = read.partition(" ")
    foreign = Permits(bytes(32)).seal("write", text)
    over = Permits.of_run().seal("write", text, expires_at=1.0)
    moved = arena.target((2, 3), 32).to_json()
    planes = np.zeros((1, 1, 1, 1), np.uint8)
    paths = opened(monkeypatch)
    restorer = UnitRestorer()
    texts = set()
    for bad in (
        text, "x", " " + text, "\ud800", read, foreign, over, f"{permit} {moved}",
        f"{'f' * 14}.{'0' * 32}.{'0' * 64} {text}",
    ):  # fmt: skip
        with pytest.raises(PermissionDeniedError) as refused:
            restorer.restore(unit, planes, target_json=bad, decode_status="")
        texts.add(str(refused.value))
        with pytest.raises(PermissionDeniedError) as refused:
            restorer.restore(unit, planes, planes_at=bad, target_json="", decode_status="")
        texts.add(str(refused.value))
        with pytest.raises(PermissionDeniedError) as refused:
            GpuOutput(1 << 20).wants(bad)
        if bad is read:
            continue
        with pytest.raises(PermissionDeniedError):
            encode(target=bad)
    with pytest.raises(PermissionDeniedError):
        encode(target=give_out("write", arena, target))
    restorer.close()
    assert len(texts) == 1, "one text, so that a refusal tells nothing"
    assert [p for p in paths if "arena-" not in str(p)] == []


@pytest.mark.parametrize("status", ["{", "[]", '{"stamps": 1}', '{"a":"' + "x" * 5000 + '"}'])
def test_a_decode_status_that_is_none_is_refused(status):
    (unit, *_) = units(encode()[0])
    planes, _ = UnitDecoder("cpu").decode(unit)
    restorer = UnitRestorer()
    with pytest.raises(RequestError, match="decode_status"):
        restorer.restore(unit, planes, target_json="", decode_status=status)
    restorer.close()
