"""The probe keeps the link's estimate fresh, and costs nobody anything else."""

import asyncio
import math
import time
from dataclasses import dataclass, field, replace

import pytest

from kvfetcher.codec.profiles import encode_chunk
from kvfetcher.codec.raw import RawProfile
from kvfetcher.errors import StoreError
from kvfetcher.fetch.planning.bandwidth import LinkEstimate, LinkEstimator
from kvfetcher.fetch.probe import LinkProbe
from kvfetcher.fetch.reads import SharedReads
from kvfetcher.fetch.run import StoredChunk
from kvfetcher.format.container import parse_header
from kvfetcher.spec import KVSpec
from support.kv_values import finite_values

RATE = 50e6  # bytes per second, of the store


@dataclass
class SlowStore:
    """Answers ranges at `RATE`; an error where one is set."""

    ranges: list = field(default_factory=list)
    error: StoreError | None = None
    rate: float = RATE

    async def get_range(self, name, start, end):
        self.ranges.append((name, start, end))
        await asyncio.sleep((end - start) / self.rate)
        if self.error is not None:
            raise self.error
        return bytes(end - start)


@pytest.fixture(scope="module")
def chunk():
    spec = KVSpec(30, 3, 64)
    data = encode_chunk(
        finite_values(spec, 64), spec=spec, profile=RawProfile(), identity=bytes(32),
        chunk_key=bytes(32), token_ids=range(64), first_position=0, num_threads=1,
    )  # fmt: skip
    return StoredChunk("aa/bb", parse_header(data))


def make():
    store = SlowStore()
    link = LinkEstimator(prior_bytes_per_second=1e9, prior_rtt_seconds=0.0, half_life_seconds=5.0)
    return store, link, LinkProbe(SharedReads(store, link=link, clock=time.monotonic))


def seen(rate, *, rtt=0.0, age=10.0):
    return LinkEstimate(
        bytes_per_second=rate,
        recent_bytes_per_second=rate,
        low_bytes_per_second=rate,
        high_bytes_per_second=rate,
        rtt_seconds=rtt,
        num_transfers=9,
        age_seconds=age,
    )


async def drained(probe):
    await asyncio.wait_for(probe._task, 5)


@pytest.mark.parametrize(
    ("rate", "rtt", "num_bytes"),
    [
        (1e5, 0.0, 256 << 10),
        (2e6, 0.0, 500_000),
        (1e9, 0.0, 1 << 20),
        (1e9, 1.3e-4, 1_300_000),  # ten round trips: what is less tells no rate
    ],
)
async def test_a_probe_takes_a_quarter_second_of_the_link_within_bounds(
    chunk, rate, rtt, num_bytes
):
    store, link, probe = make()
    assert probe.consider(chunk, seen(rate, rtt=rtt))
    await drained(probe)
    assert store.ranges == [("aa/bb", 0, num_bytes)]
    learnt = link.estimate(time.monotonic()).bytes_per_second
    assert RATE / 20 < learnt < 1.05 * RATE  # a busy machine wakes late


async def test_one_probe_at_a_time_and_none_while_the_estimate_is_fresh(chunk):
    store, _, probe = make()
    assert not probe.consider(chunk, seen(1e6, age=0.5))
    assert probe.consider(chunk, seen(1e6, age=math.inf))
    assert not probe.consider(chunk, seen(1e6, age=math.inf))
    await drained(probe)
    assert len(store.ranges) == 1


async def test_a_copy_near_by_says_nothing_of_the_link(chunk):
    store, _, probe = make()
    assert not probe.consider(replace(chunk, is_local=True), seen(1e6))
    assert not store.ranges


async def test_a_probe_that_fails_is_nobodys_error(chunk):
    store, link, probe = make()
    store.error = StoreError("gone")
    assert probe.consider(chunk, seen(1e6))
    await drained(probe)
    assert link.estimate(time.monotonic()).num_transfers == 0


async def test_a_probe_ends_in_time_on_a_dead_link(chunk, monkeypatch):
    monkeypatch.setattr("kvfetcher.fetch.probe._TIMEOUT_SECONDS", 0.05)
    store, _, probe = make()
    store.rate = 1.0
    assert probe.consider(chunk, seen(1e6))
    start = time.monotonic()
    await drained(probe)
    assert time.monotonic() - start < 1.0
    store.rate = RATE
    for _ in range(2):  # smaller, then as before
        assert probe.consider(chunk, seen(1e6))
        await drained(probe)
    assert [end for _, _, end in store.ranges] == [256 << 10, 64 << 10, 256 << 10]
