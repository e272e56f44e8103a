"""Shared reads: each range once at a time, and nobody hurt by another's leaving."""

import asyncio
import time

import pytest

from kvfetcher.errors import ChunkNotFoundError, StoreError
from kvfetcher.fetch.planning.bandwidth import LinkEstimator
from kvfetcher.fetch.reads import SharedReads, Tally
from kvfetcher.storage.base import ByteRange


class Store:
    """Answers when it is told to; counts its calls."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.calls = []
        self.cancelled = 0
        self.error = None

    async def _answer(self, parts):
        self.calls.append(list(parts))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error:
            raise self.error
        return [
            ChunkNotFoundError(p.name) if p.name == "gone" else bytes(p.end - p.start)
            for p in parts
        ]

    async def get_range(self, name, start, end):
        (answer,) = await self._answer([ByteRange(name, start, end)])
        if isinstance(answer, StoreError):
            raise answer
        return answer

    async def get_ranges(self, ranges):
        return await self._answer(ranges)


A, B, C = (ByteRange(name, 0, 100) for name in "abc")


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def reads(store):
    link = LinkEstimator(prior_bytes_per_second=1e6, prior_rtt_seconds=0.01, half_life_seconds=5)
    return SharedReads(store, link=link, clock=time.monotonic)


async def start(*coroutines):
    tasks = [asyncio.create_task(each) for each in coroutines]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


async def test_askers_of_one_range_share_its_read_and_one_of_them_counts_it(reads, store):
    tallies = [Tally() for _ in range(50)]
    tasks = await start(*(reads.read(A, tally) for tally in tallies))
    store.gate.set()
    assert await asyncio.gather(*tasks) == [bytes(100)] * 50
    assert store.calls == [[A]]
    assert (sum(t.num_reads for t in tallies), sum(t.num_bytes for t in tallies)) == (1, 100)


async def test_a_batch_asks_only_for_what_nobody_reads_yet(reads, store):
    tasks = await start(
        reads.read(A, Tally()), reads.read_many([A, B], Tally()), reads.read_many([B, C], Tally())
    )
    store.gate.set()
    assert await asyncio.gather(*tasks) == [bytes(100), [bytes(100)] * 2, [bytes(100)] * 2]
    assert store.calls == [[A], [B], [C]]


async def test_after_the_answer_the_range_is_read_anew(reads, store):
    store.gate.set()
    await reads.read(A, Tally())
    await reads.read(A, Tally())
    assert store.calls == [[A], [A]]


async def test_errors_reach_every_asker(reads, store):
    tasks = await start(*(reads.read(A, Tally()) for _ in range(3)))
    store.error = StoreError("down")
    store.gate.set()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(end) for end in ends] == ["down"] * 3


async def test_a_batch_that_is_refused_is_raised_for_every_asker(reads, store):
    tasks = await start(*(reads.read_many([A], Tally()) for _ in range(2)))
    store.error = StoreError("bad name")
    store.gate.set()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(end) for end in ends] == ["bad name"] * 2


async def test_a_missing_object_is_an_answer_among_others(reads, store):
    store.gate.set()
    tally = Tally()
    found, gone = await reads.read_many([A, ByteRange("gone", 0, 9)], tally)
    assert found == bytes(100)
    assert isinstance(gone, ChunkNotFoundError)
    assert (tally.num_reads, tally.num_bytes) == (1, 100)


async def test_one_askers_leaving_does_not_hurt_the_others_and_the_last_ones_cancels(reads, store):
    first, second = await start(reads.read(A, Tally()), reads.read(A, Tally()))
    first.cancel()
    await asyncio.sleep(0.01)
    assert (store.cancelled, second.done()) == (0, False)
    second.cancel()
    await asyncio.sleep(0.01)
    assert store.cancelled == 1
    (third,) = await start(reads.read(A, Tally()))
    store.gate.set()
    assert await third == bytes(100), "a read that was cancelled is not joined"
    assert store.calls == [[A], [A]]
