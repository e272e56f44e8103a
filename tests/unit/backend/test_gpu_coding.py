"""Units into an arena in parts, with host memory in the GPUs' place (the kernels are in tests/gpu)."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvfetcher.backend import coding, gpu_coding
from kvfetcher.backend.coding import ChunkEncoder, UnitDecoder, UnitRestorer
from kvfetcher.codec.base import LeftToCpuError
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.gpu.nvdec import NvdecDecoder
from kvfetcher.codec.profiles import encode_chunk, restore_parsed
from kvfetcher.config import CodecConfig
from kvfetcher.errors import ArenaError, ChecksumError, GpuError, LayoutError
from kvfetcher.format.container import parse_header
from kvfetcher.format.unit import parse_unit
from kvfetcher.launcher.probe import probe_unit
from kvfetcher.memory.arena import BlockTarget
from kvfetcher.memory.cuda import IPC_HANDLE_BYTES
from kvfetcher.memory.gpu_arena import GpuArena
from kvfetcher.memory.permits import Permits
from kvfetcher.memory.plane_ring import PlaneReader, PlaneTicket
from kvfetcher.memory.split_arena import create_arena
from kvfetcher.spec import HeadRange, KVSpec
from support.host_as_gpu import gpus_in_host_memory, nvdec_on_host
from support.trust import give_out

SPEC = KVSpec(num_layers=4, num_kv_heads=3, head_dim=16)
TOKENS = 30
VALUES = np.random.default_rng(5).integers(0, 1 << 16, (4, 2, 3, TOKENS, 16), dtype=np.uint16)
ON_CPU = {HeadRange(0, 1): None, HeadRange(1, 3): None}
ON_GPUS = {HeadRange(0, 1): 1, HeadRange(1, 3): 2}


@pytest.fixture(scope="module")
def units():
    chunk = encode_chunk(
        VALUES,
        spec=SPEC,
        profile=ExactProfile(unit_layers=2),
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=range(TOKENS),
        first_position=0,
        num_threads=2,
    )
    return [chunk[entry.offset : entry.stop] for entry in parse_header(chunk).units]


@pytest.fixture
def arena_of(tmp_path, monkeypatch):
    gpus_in_host_memory(monkeypatch)
    made = []

    def make(places):
        made.append(
            create_arena(
                tmp_path / "arena", spec=SPEC, tokens_per_block=16, num_bytes=1 << 18, places=places
            )
        )
        return made[-1]

    yield make
    for arena in made:
        arena.close()


@pytest.fixture
def restorer():
    made = UnitRestorer()
    yield made
    made.close()


def restore(restorer, unit, arena, *, planes_at=""):
    """Status of a unit restored into blocks 3 and 1."""
    planes, decode_status = UnitDecoder("cpu").decode(unit)
    target = arena.target((3, 1), TOKENS)
    values, status = restorer.restore(
        unit,
        planes,
        planes_at=planes_at,
        target_json=give_out("write", arena, target),
        decode_status=decode_status,
    )
    assert values == b""
    return json.loads(status)


def part_values(arena):
    """[L, K, H, T, D] of blocks 3 and 1, put together from the parts' own memory."""
    parts = []
    for part in arena.parts:
        blocks = part.blocks if part.gpu is None else part.blocks.numpy().view(np.uint16)
        parts.append(np.concatenate([blocks[3], blocks[1]], axis=3)[:, :, :, :TOKENS])
    return np.concatenate(parts, axis=2)


@pytest.mark.parametrize("places", [ON_CPU, ON_GPUS], ids=["host", "gpus"])
def test_each_part_gets_its_heads_of_a_unit_restored_once(
    arena_of, restorer, units, places, monkeypatch
):
    monkeypatch.setattr(restorer._gpu, "_restorer", lambda gpu: None)  # no Triton language here
    calls = []

    def once(*args):
        calls.append(args)
        return restore_parsed(*args)

    monkeypatch.setattr("kvfetcher.codec.profiles.restore_parsed", once)
    arena = arena_of(places)
    for unit in units:
        assert restore(restorer, unit, arena)["restorer"] == "cpu"
    np.testing.assert_array_equal(part_values(arena), VALUES)
    assert len(calls) == len(units)


class OnGpu:
    """`GpuRestorer` as far as an arena in parts needs it."""

    def __init__(self, error=None):
        self.error = error

    def can_restore(self, unit):
        return True

    def restore(self, unit, planes):
        if self.error:
            raise self.error
        return torch.from_numpy(restore_parsed(unit, planes).view(np.int16).copy())


class Ring:
    """`PlaneReader` that counts what was given back."""

    def __init__(self):
        self.finished = []

    def finish(self, ticket):
        self.finished.append(ticket)

    drop = finish

    def close(self):
        pass


def with_gpu_restorer(restorer, monkeypatch, *, error=None):
    """Restorers asked for, by GPU, and the ring that planes come from."""
    asked, ring = [], Ring()

    def restorer_of(gpu):
        asked.append(gpu)
        return OnGpu(error)

    monkeypatch.setattr(restorer._gpu, "_restorer", restorer_of)
    monkeypatch.setattr(restorer._gpu, "_planes", lambda unit, planes, ticket, gpu: planes)
    monkeypatch.setattr(restorer._gpu, "_reader", ring)
    return asked, ring


def ticket_on(gpu):
    handle = "00" * IPC_HANDLE_BYTES
    ticket = PlaneTicket("/t", gpu, handle, handle, 1, 0, 1, 0, num_bytes=1, shift=0)
    return Permits.of_run().seal("planes", ticket.to_json())


def test_the_gpu_that_has_the_planes_restores_for_all_parts(arena_of, restorer, units, monkeypatch):
    asked, ring = with_gpu_restorer(restorer, monkeypatch)
    arena = arena_of(ON_GPUS)
    for unit, gpu in zip(units, (2, 5), strict=True):  # 5 holds no part: it decodes, too
        assert restore(restorer, unit, arena, planes_at=ticket_on(gpu))["restorer"] == "gpu"
    np.testing.assert_array_equal(part_values(arena), VALUES)
    assert asked == [2, 5]
    assert [ticket.gpu for ticket in ring.finished] == [2, 5]


def test_planes_from_host_memory_are_restored_on_the_first_parts_gpu(
    arena_of, restorer, units, monkeypatch
):
    asked, ring = with_gpu_restorer(restorer, monkeypatch)
    restore(restorer, units[0], arena_of(ON_GPUS))
    assert (asked, ring.finished) == ([1], [])


def test_unit_with_another_digest_reaches_no_part_and_gives_its_planes_back(
    arena_of, restorer, units, monkeypatch
):
    _, ring = with_gpu_restorer(restorer, monkeypatch, error=ChecksumError("differs"))
    arena = arena_of(ON_GPUS)
    for part in arena.parts:
        part.blocks.fill_(7)
    with pytest.raises(ChecksumError):
        restore(restorer, units[0], arena, planes_at=ticket_on(2))
    assert all(bool((part.blocks == 7).all()) for part in arena.parts)
    assert len(ring.finished) == 1


@pytest.mark.parametrize("places", [ON_CPU, ON_GPUS], ids=["host", "gpus"])
def test_target_without_all_parts_is_refused(arena_of, restorer, units, places, run_folder):
    arena = arena_of(places)
    planes, status = UnitDecoder("cpu").decode(units[0])
    sealed = give_out("write", arena, arena.target((3, 1), TOKENS))
    (published,) = run_folder.glob("arena-*.json")
    for paths in (arena.paths[:1], arena.paths[1:], arena.paths[::-1]):
        published.write_text(json.dumps(paths))
        with pytest.raises(ArenaError, match="a part is missing"):
            restorer.restore(units[0], planes, target_json=sealed, decode_status=status)


def test_unit_of_a_part_alone_does_not_fit_the_whole(arena_of, restorer, units):
    arena = arena_of(ON_CPU)
    with pytest.raises(LayoutError, match="values must be"):
        arena.write(arena.target((3, 1), TOKENS), 0, VALUES[:, :, :1])


@pytest.mark.parametrize("places", [ON_CPU, ON_GPUS], ids=["host", "gpus"])
def test_chunk_saved_from_parts_is_that_of_the_values(arena_of, places):
    arena = arena_of(places)
    source = arena.target((2, 0), TOKENS)
    arena.write(source, 0, VALUES)
    encoder = ChunkEncoder(CodecConfig(profile="exact"))
    chunks = [
        encoder.encode(
            np.arange(TOKENS, dtype=np.int32),
            spec_json=json.dumps({"spec": SPEC.to_dict()}),
            target_json=target,
            values=values,
        )[0]
        for target, values in ((give_out("read", arena, source), b""), ("", VALUES.tobytes()))
    ]
    encoder.close()
    assert chunks[0] == chunks[1]


@pytest.mark.parametrize(("places", "expected"), [(ON_CPU, False), (ON_GPUS, True)])
def test_planes_stay_on_a_gpu_for_parts_on_gpus(arena_of, places, expected):
    arena = arena_of(places)
    target = give_out("write", arena, arena.target((0,), 5))
    assert gpu_coding.GpuOutput(1 << 20).wants(target) is expected


# Decoding: NVDEC's pictures come from the CPU decoder, GPU memory from the host


@pytest.fixture
def probe():
    return parse_unit(probe_unit())


@pytest.fixture
def probe_arena(tmp_path, probe, arena_of):
    arena = GpuArena.create_on(
        0, tmp_path / "gpu", spec=probe.spec, tokens_per_block=16, num_bytes=1 << 18
    )
    yield arena
    arena.close()


@pytest.fixture
def decoder(monkeypatch, probe):
    """A `UnitDecoder` whose ring holds two of the probe's planes; `gpu` and `library` behind it."""
    library, gpu = nvdec_on_host(monkeypatch, probe.geometry)
    monkeypatch.setattr(coding, "_proven_nvdec", NvdecDecoder)
    monkeypatch.setattr(gpu_coding, "_WAIT_SECONDS", 0.0)
    made = UnitDecoder("nvdec", ring_bytes=2 * probe.geometry.num_bytes)
    made.library, made.gpu = library, gpu
    yield made
    made.close()


def target_of(arena):
    return give_out("write", arena, arena.target(tuple(range(12)), 192))


def tickets_of(decoder):
    return sum(map(bool, decoder._gpu_output._ring._table.tickets.tolist()))


def test_planes_stay_on_the_gpu_while_the_ring_has_room(decoder, probe_arena, probe):
    expected, _ = UnitDecoder("cpu").decode(probe_unit())
    for _ in range(2):
        kept = decoder.decode_for(probe_unit(), target_of(probe_arena))
        assert (kept.planes.size, json.loads(kept.status)["planes"]) == (1, "gpu")
        assert (
            PlaneTicket.from_json(Permits.of_run().open("planes", kept.planes_at)).num_bytes
            == probe.geometry.num_bytes
        )
    full = decoder.decode_for(probe_unit(), target_of(probe_arena))
    np.testing.assert_array_equal(full.planes, expected)
    facts = json.loads(full.status)
    assert (full.planes_at, facts["decoder"], facts["planes"]) == ("", "nvdec", "host")
    assert "not restored yet" in facts["fallback"]
    assert decoder.library.pictures == 3 * probe.geometry.num_frames, "decoded once"


def test_a_stream_that_fails_holds_no_memory(decoder, probe_arena, monkeypatch):
    pictures = decoder.library._decode

    def one_and_no_more(packet):
        if decoder.library.pictures:
            raise RuntimeError("the engine was reset")
        return pictures(packet) * 2  # one too many

    monkeypatch.setattr(decoder.library, "_decode", one_and_no_more)
    kept = decoder.decode_for(probe_unit(), target_of(probe_arena))
    assert (kept.planes_at, json.loads(kept.status)["decoder"]) == ("", "cpu")
    assert tickets_of(decoder) == 0


def test_a_decoder_waits_for_room_until_it_waited_in_vain(decoder, probe_arena, probe, monkeypatch):
    asked = []

    class Full:
        num_bytes = 1 << 20

        def reserve(self, num_bytes, *, shift, wait_seconds):
            asked.append(wait_seconds)

        def close(self):
            pass

    monkeypatch.setattr(gpu_coding, "_WAIT_SECONDS", 2.0)
    decoder._gpu_output._ring = Full()
    for _ in range(3):
        decoder.decode_for(probe_unit(), target_of(probe_arena))
    assert asked == [2.0, 0.0, 0.0]


def test_units_larger_than_the_ring_say_what_to_change(monkeypatch, decoder, probe_arena, caplog):
    decoder._gpu_output._ring_bytes = 1024
    for _ in range(2):
        kept = decoder.decode_for(probe_unit(), target_of(probe_arena))
        assert "raise server.plane_bytes" in json.loads(kept.status)["fallback"]
        assert kept.planes.size > 1
    assert caplog.text.count("raise server.plane_bytes") == 1


def test_a_gpu_without_memory_for_planes_is_not_asked_for_each_unit(
    decoder, probe_arena, monkeypatch
):
    decoder.gpu.allocate = lambda num_bytes: asked.append(num_bytes) or fail()
    asked = []

    def fail():
        raise GpuError("out of memory")

    monkeypatch.setattr(decoder._nvdec._copies, "copy_out", lambda *_, **__: None)
    for _ in range(2):
        kept = decoder.decode_for(probe_unit(), target_of(probe_arena))
        assert "out of memory" in json.loads(kept.status)["fallback"]
    assert len(asked) == 1
    monkeypatch.setattr(gpu_coding, "_RETRY_SECONDS", -1.0)
    del decoder.gpu.allocate
    assert decoder.decode_for(probe_unit(), target_of(probe_arena)).planes_at


# Restoring on a GPU that fails


class OnFailingGpu:
    """`GpuRestorer` that fails where a test says so; `log` is its GPU's."""

    def __init__(self, log, *, begin=None, close=None, finish=None):
        self.log, self.errors = log, {"begin": begin, "close": close, "finish": finish}

    def can_restore(self, unit):
        return True

    def begin(self, unit, planes, destination):
        self.log.append("launched")
        if self.errors["begin"]:
            raise self.errors["begin"]
        return unit

    def close_batch(self, pending):
        if self.errors["close"]:
            raise self.errors["close"]
        return SimpleNamespace(units=pending)

    def finish(self, batch):
        if self.errors["finish"]:
            raise self.errors["finish"]
        return [None] * len(batch.units)


@pytest.fixture
def kept(decoder, probe_arena):
    """The probe on a GPU: its `DecodedUnit` and its target."""
    target = target_of(probe_arena)
    return decoder.decode_for(probe_unit(), target), target


@pytest.fixture
def on_failing_gpu(restorer, decoder, monkeypatch):
    """How the GPU fails -> the list of what happened on it; its planes are the decoder's."""

    def make(**errors):
        gpu = decoder.gpu
        made = OnFailingGpu(gpu.log, **errors)
        monkeypatch.setattr(gpu_coding, "cuda_context", lambda index: gpu)
        monkeypatch.setattr(restorer._gpu, "_reader", PlaneReader(lambda index: gpu))
        monkeypatch.setattr(restorer._gpu, "_restorers", {0: made})
        read = restorer._gpu._reader.address
        monkeypatch.setattr(restorer._gpu, "_planes", lambda unit, planes, ticket, _: read(ticket))
        monkeypatch.setattr(restorer._gpu, "_destination", lambda *_: None)
        clear = PlaneReader.drop
        monkeypatch.setattr(
            PlaneReader, "drop", lambda *args: gpu.log.append("dropped") or clear(*args)
        )
        return gpu.log

    return make


def restore_kept(restorer, kept):
    decoded, target = kept
    return restorer.restore(
        decoded.rest,
        decoded.planes,
        planes_at=decoded.planes_at,
        target_json=target,
        decode_status=decoded.status,
    )


def test_nothing_runs_on_a_units_planes_when_they_are_given_back(
    restorer, decoder, kept, on_failing_gpu
):
    log = on_failing_gpu(begin=ChecksumError("a section differs"))
    with pytest.raises(ChecksumError):
        restore_kept(restorer, kept)
    assert log[-3:] == ["launched", "synchronize", "dropped"]
    assert tickets_of(decoder) == 0
    assert not restorer.is_lost()


@pytest.mark.parametrize("at", ["begin", "close", "finish"])
@pytest.mark.parametrize("is_broken", [False, True])
def test_a_gpus_failure_is_answered_and_a_lost_context_told(
    restorer, decoder, kept, on_failing_gpu, at, is_broken
):
    log = on_failing_gpu(**{at: RuntimeError("CUDA error: an illegal address")})
    decoder.gpu.is_broken = is_broken
    with pytest.raises(GpuError, match=r"GPU 0 failed at restoring \(RuntimeError\)"):
        restore_kept(restorer, kept)
    assert "synchronize" in log
    assert tickets_of(decoder) == 0
    assert restorer.is_lost() is is_broken


def test_a_lost_context_on_the_gpu_of_the_planes_is_told(
    restorer, decoder, kept, on_failing_gpu, monkeypatch
):
    on_failing_gpu(begin=RuntimeError("CUDA error: an illegal address"))
    gpus = {0: decoder.gpu, 1: SimpleNamespace(is_lost=lambda: True)}
    monkeypatch.setattr(gpu_coding, "cuda_context", gpus.__getitem__)
    decoded, target = kept
    ticket = Permits.of_run().open("planes", decoded.planes_at).replace('"gpu":0', '"gpu":1')
    elsewhere = decoded._replace(planes_at=Permits.of_run().seal("planes", ticket))
    with pytest.raises(GpuError):
        restore_kept(restorer, (elsewhere, target))
    assert restorer.is_lost()
    assert tickets_of(decoder) == 0


def test_the_stamps_tell_a_units_way_in_order(restorer, kept, on_failing_gpu):
    on_failing_gpu()
    _, status = restore_kept(restorer, kept)
    facts = json.loads(status)
    assert list(facts["stamps"]) == [
        "decode", "reserved", "decoded", "restore", "launched", "synced",
    ]  # fmt: skip
    moments = list(facts["stamps"].values())
    assert moments == sorted(moments)
    assert moments[0] > 0
    assert facts["batch"] == 1


def test_all_planes_come_back_when_finishing_raises(restorer, decoder, kept, on_failing_gpu):
    on_failing_gpu(finish=KeyError("a bug"))
    with pytest.raises(KeyError):
        restore_kept(restorer, kept)
    assert tickets_of(decoder) == 0


@pytest.mark.parametrize(
    "refusal", [torch.OutOfMemoryError("out of memory"), LeftToCpuError("an integer is too large")]
)
def test_what_a_gpu_refuses_is_restored_by_the_cpu(
    restorer, decoder, kept, on_failing_gpu, probe_arena, probe, monkeypatch, refusal
):
    log = on_failing_gpu(begin=refusal)
    planes, _ = UnitDecoder("cpu").decode(probe_unit())
    on_gpu = torch.from_numpy(planes.copy())
    monkeypatch.setattr(restorer._gpu, "_tensor", lambda unit, ticket: on_gpu)
    _, status = restore_kept(restorer, kept)
    assert json.loads(status)["restorer"] == "cpu"
    assert log[-2:] == ["launched", "synchronize"]
    assert tickets_of(decoder) == 0
    assert not restorer.is_lost()
    target = BlockTarget.from_json(Permits.of_run().open("write", target_of(probe_arena)))
    np.testing.assert_array_equal(
        probe_arena.read(target).view(np.uint8), restore_parsed(probe, planes)
    )


def test_planes_come_back_where_the_arena_is_gone(restorer, decoder, kept, probe_arena):
    probe_arena.close()
    probe_arena.path.unlink()
    with pytest.raises(ArenaError):
        restore_kept(restorer, kept)
    assert tickets_of(decoder) == 0


def test_a_decoder_whose_context_is_lost_says_so_and_the_cpu_goes_on(
    decoder, probe_arena, monkeypatch
):
    def fail(packet):
        raise RuntimeError("CUDA error: an illegal address")

    monkeypatch.setattr(decoder.library, "_decode", fail)
    for is_broken in (False, True):
        decoder.gpu.is_broken = is_broken
        kept = decoder.decode_for(probe_unit(), target_of(probe_arena))
        assert json.loads(kept.status)["decoder"] == "cpu"
        assert decoder.is_lost() is is_broken
