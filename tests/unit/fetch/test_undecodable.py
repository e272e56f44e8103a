"""Chunks that are whole and do not decode here: tried twice, then passed over for a while."""

import numpy as np
import pytest

from kvfetcher.errors import ArenaFullError, CodecError, DecoderUnavailableError, GpuError
from kvfetcher.fetch import undecodable
from kvfetcher.fetch.undecodable import Undecodable
from support.fetch_world import CHUNK_TOKENS


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_a_chunk_is_passed_over_after_two_failures_and_tried_again_later():
    clock = Clock()
    chunks = Undecodable(clock)
    chunks.note("bad", CodecError("broken"))
    assert not chunks.is_passed_over("bad")
    chunks.note("bad", CodecError("broken"))
    assert chunks.is_passed_over("bad")
    assert not chunks.is_passed_over("other")
    clock.now += 601
    assert not chunks.is_passed_over("bad")
    chunks.note("bad", CodecError("broken"))
    assert not chunks.is_passed_over("bad"), "what was forgotten does not count any more"


def test_a_success_in_between_starts_the_count_anew():
    chunks = Undecodable(Clock())
    for _ in range(3):
        chunks.note("chunk", CodecError("broken"))
        chunks.forget("chunk")
    chunks.note("chunk", CodecError("broken"))
    assert not chunks.is_passed_over("chunk")


@pytest.mark.parametrize(
    "exc",
    [DecoderUnavailableError("none"), GpuError("lost"), ArenaFullError("full"), TimeoutError()],
    ids=lambda exc: type(exc).__name__,
)
def test_what_says_nothing_of_the_chunk_does_not_count(exc):
    chunks = Undecodable(Clock())
    for _ in range(5):
        chunks.note("chunk", exc)
    assert not chunks.is_passed_over("chunk")


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(undecodable, "_MAX_REMEMBERED", 2)
    chunks = Undecodable(Clock())
    for name in ("first", "second", "third") * 2:
        chunks.note(name, CodecError("broken"))
    assert not any(chunks.is_passed_over(name) for name in ("first", "second", "third"))
    chunks.note("third", CodecError("broken"))
    assert chunks.is_passed_over("third")


async def test_a_whole_chunk_that_does_not_decode_costs_two_tries_and_stays_in_the_store(world):
    await world.save(0, 1, 2)
    tried = 0

    async def run_unit(unit, target):
        nonlocal tried
        if bytes(unit) in bad:
            tried += 1
            raise CodecError("kv_pipeline: INTERNAL: the bitstream does not decode")
        return await world.units(unit, target)

    bad = (world.folder / world.keys[1].name).read_bytes()
    fetcher = world.fetcher(run_unit=run_unit, max_inflight_units=1)
    before = world.free_blocks
    for _ in range(4):
        fetched = await world.fetch(fetcher)
        assert (fetched.report.outcome, fetched.report.reason) == ("partial", "decode_error")
        assert fetched.report.hit_tokens == CHUNK_TOKENS
        assert world.keys[1].name in fetched.report.detail
        np.testing.assert_array_equal(
            world.restored(fetched.claim), world.values[:, :, :, :CHUNK_TOKENS]
        )
        await world.leases.release(fetched.claim.lease_id)
        assert world.free_blocks == before
    assert 2 <= tried <= 4, "each of two tries, and the chunk's other unit if it was there already"
    assert fetched.report.chunks_stored == 1
    assert await world.store.head(world.keys[1].name) is not None


async def test_a_chunk_that_failed_once_and_was_restored_then_is_not_passed_over(world):
    await world.save(0)
    fails = [True, False, True, False, False]

    async def run_unit(unit, target):
        if fails[0]:
            raise CodecError("broken")
        return await world.units(unit, target)

    fetcher = world.fetcher(run_unit=run_unit)
    outcomes = []
    while fails:
        fetched = await world.fetch(fetcher)
        outcomes.append(fetched.report.chunks_hit)
        fails.pop(0)
        if fetched.claim:
            await world.leases.release(fetched.claim.lease_id)
    assert outcomes == [0, 1, 0, 1, 1]
