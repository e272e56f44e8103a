"""Planes from a decoding process to a restoring one, into an arena: right values, and no memory lost."""

import contextlib
import json
import multiprocessing

import numpy as np
import pytest

from kvfetcher.backend.coding import UnitDecoder, UnitRestorer
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.profiles import encode_chunk
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.format.container import parse_header
from kvfetcher.memory.permits import Permits
from kvfetcher.memory.plane_ring import PlaneTicket
from kvfetcher.memory.split_arena import create_arena
from kvfetcher.spec import HeadRange, KVSpec
from support.calibrations import correlated_values
from support.kv_values import special_values
from support.trust import give_out

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("run_folder")]

SPEC = KVSpec(num_layers=6, num_kv_heads=4, head_dim=64)
TOKENS = 256
RING_BYTES = 32 << 20
# The driver's own bookkeeping moves in steps of 2 MiB.
SLACK_BYTES = 16 << 20
ANSWER_SECONDS = 120


def decode_units(pipe, ring_bytes, gpu):
    """A kv_decode: (unit, target) in, `DecodedUnit` out, until it is closed or killed."""
    decoder = UnitDecoder("nvdec", gpu=gpu, ring_bytes=ring_bytes)
    try:
        while True:
            pipe.send(decoder.decode_for(*pipe.recv()))
    except EOFError:
        decoder.close()


class Decoding:
    """A context manager: `decode_units` in a process of its own."""

    def __init__(self, ring_bytes=RING_BYTES, *, gpu=0):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=decode_units, args=(theirs, ring_bytes, gpu), daemon=True
        )
        self.process.start()
        theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pipe.close()
        self.process.join(ANSWER_SECONDS)
        self.process.kill()
        self.process.join()

    def decode(self, unit, target):
        self._pipe.send((unit, target))
        assert self._pipe.poll(ANSWER_SECONDS)
        return self._pipe.recv()


@pytest.fixture(scope="module")
def values():
    return special_values(SPEC, TOKENS)


@pytest.fixture(scope="module")
def units(values):
    return units_of(values, ExactProfile(unit_layers=2))


def units_of(values, profile):
    chunk = encode_chunk(
        values,
        spec=SPEC,
        profile=profile,
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=range(TOKENS),
        first_position=0,
        num_threads=4,
    )
    return [chunk[entry.offset : entry.stop] for entry in parse_header(chunk).units]


@pytest.fixture
def arena(tmp_path):
    from kvfetcher.memory.gpu_arena import GpuArena

    made = GpuArena.create_on(
        0, tmp_path / "arena", spec=SPEC, tokens_per_block=32, num_bytes=16 << 20
    )
    yield made
    made.close()


@pytest.fixture
def restorer():
    made = UnitRestorer()
    yield made
    made.close()


def restore(restorer, decoded, target):
    _, status = restorer.restore(
        decoded.rest,
        decoded.planes,
        planes_at=decoded.planes_at,
        target_json=target,
        decode_status=decoded.status,
    )
    return json.loads(status)


@pytest.mark.parametrize(("ring_bytes", "planes"), [(RING_BYTES, "gpu"), (4096, "host")])
def test_values_are_the_chunks_whichever_way_the_planes_take(
    arena, restorer, units, values, ring_bytes, planes
):
    target = arena.target(tuple(range(7, -1, -1)), TOKENS)
    sealed = give_out("write", arena, target)
    arena.blocks.fill_(-1)
    with Decoding(ring_bytes) as decoding:
        for unit in units:
            status = restore(restorer, decoding.decode(unit, sealed), sealed)
            assert (status["decoder"], status["planes"], status["restorer"]) == (
                "nvdec", planes, "gpu",
            )  # fmt: skip
            assert ("fallback" in status) == (planes == "host")
    np.testing.assert_array_equal(arena.read(target), values)
    assert not restorer.is_lost()


@pytest.fixture
def decoders():
    """(GPU, `Decoding`): one on each GPU, at least two in all."""
    import torch

    count = torch.cuda.device_count()
    with contextlib.ExitStack() as stack:
        gpus = [index % count for index in range(max(2, count))]
        yield [(gpu, stack.enter_context(Decoding(gpu=gpu))) for gpu in gpus]


def restore_together(restorer, units, decoders, target):
    """Each unit from the next decoder, which leaves the planes on its GPU, in one batch."""
    jobs = []
    for index, unit in enumerate(units):
        gpu, decoding = decoders[index % len(decoders)]
        decoded = decoding.decode(unit, target)
        assert PlaneTicket.from_json(Permits.of_run().open("planes", decoded.planes_at)).gpu == gpu
        jobs.append(
            restorer.start(
                decoded.rest,
                decoded.planes,
                planes_at=decoded.planes_at,
                target_json=target,
                decode_status=decoded.status,
            )
        )
    for result in restorer.finish(restorer.close_batch(jobs)):
        assert not isinstance(result, Exception), result
        assert json.loads(result[1])["restorer"] == "gpu"


@pytest.mark.parametrize(
    "profile",
    [ExactProfile(unit_layers=2), UncalibratedProfile(unit_layers=2)],
    ids=["exact", "lossy"],
)
def test_planes_of_every_gpu_become_the_values_that_those_of_the_first_become(
    arena, restorer, decoders, profile
):
    units = units_of(float32_to_bits(correlated_values(SPEC, TOKENS), SPEC.dtype), profile)
    target = arena.target(tuple(range(7, -1, -1)), TOKENS)
    restore_together(restorer, units, decoders[:1], give_out("write", arena, target))
    expected = arena.read(target)
    for first in range(len(decoders)):  # so that each GPU decodes each unit
        arena.blocks.fill_(-1)
        in_turn = decoders[first:] + decoders[:first]
        restore_together(restorer, units, in_turn, give_out("write", arena, target))
        np.testing.assert_array_equal(arena.read(target), expected)
    assert not restorer.is_lost()


def test_planes_of_every_gpu_reach_an_arena_in_parts_on_several(
    tmp_path, restorer, decoders, units, values
):
    last, _ = decoders[-1]
    parts = create_arena(
        tmp_path / "parts",
        spec=SPEC,
        tokens_per_block=32,
        num_bytes=16 << 20,
        places={HeadRange(0, 2): 0, HeadRange(2, 4): last},
    )
    target = parts.target(tuple(range(8)), TOKENS)
    for first in range(len(decoders)):
        for part in parts.parts:
            part.blocks.fill_(-1)
        in_turn = decoders[first:] + decoders[:first]
        restore_together(restorer, units, in_turn, give_out("write", parts, target))
        np.testing.assert_array_equal(parts.read(target), values)
    restorer.close()
    parts.close()


def test_killed_decoders_leave_no_memory_behind(arena, restorer, units):
    import torch

    target = give_out("write", arena, arena.target(tuple(range(8)), TOKENS))

    def one_life():
        """A decoder that is killed with a unit restored and another one waiting."""
        with Decoding() as decoding:
            restore(restorer, decoding.decode(units[0], target), target)
            assert decoding.decode(units[1], target).planes_at
            decoding.process.kill()

    def free_bytes():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    one_life()  # kernels, caches
    before = free_bytes()
    for _ in range(3):
        one_life()
    # The last one's ring stays open until the next ring is seen.
    assert free_bytes() >= before - RING_BYTES - SLACK_BYTES
    restorer.close()
    assert free_bytes() >= before - SLACK_BYTES
