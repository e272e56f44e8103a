"""Fetches under random faults: the hit ends exactly at the first one, and nothing is left over."""

import asyncio
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.errors import CodecError, RequestCancelledError, StoreError, StoreTimeoutError
from kvfetcher.format import container
from support.examples import examples
from support.fetch_world import CHUNK_TOKENS, RecordingStore, World

NUM_CHUNKS = 4
FAULTS = ["none", "missing", "corrupt", "error", "timeout", "decoder", "slow"]


class Faults(RecordingStore):
    """Chunk by chunk, one fault; it strikes at the units, after the look-up."""

    def __init__(self, inner, faults):
        super().__init__(inner)
        self.faults = faults

    async def get_range(self, name, start, end):
        data = await super().get_range(name, start, end)
        fault = self.faults.get(name, "none")
        if start == 0:
            return data
        if fault == "missing":
            await self.inner.delete(name)
            return await super().get_range(name, start, end)
        if fault == "error":
            raise StoreError("down")
        if fault == "timeout":
            await asyncio.sleep(0.01)
            raise StoreTimeoutError("slow")
        if fault == "corrupt":
            return data[:-1] + bytes([data[-1] ^ 1])
        if fault == "slow":
            await asyncio.sleep(0.02)
        return data


@examples(25)
@given(
    st.lists(st.sampled_from(FAULTS), min_size=NUM_CHUNKS, max_size=NUM_CHUNKS),
    st.sampled_from([1, 1 << 20]),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_the_hit_ends_at_the_first_fault_and_nothing_is_left(faults, max_read, reads, units):
    async def run(world):
        await world.save(*range(NUM_CHUNKS))
        names = [key.name for key in world.keys[:NUM_CHUNKS]]
        by_name = dict(zip(names, faults, strict=True))
        free = world.free_blocks
        broken = {i for i, fault in enumerate(faults) if fault == "decoder"}
        seen = {}

        async def decode(unit, target):
            for index in broken:
                if target.block_ids == seen["span"](index):
                    raise CodecError("broken")
            return await world.units(unit, target)

        lease = world.leases.lease

        async def noted(num_tokens, ttl_seconds):
            lease_id, target = await lease(num_tokens, ttl_seconds)
            seen["span"] = lambda i: (
                target.span(i * CHUNK_TOKENS, CHUNK_TOKENS, tokens_per_block=16).block_ids
            )
            return lease_id, target

        world.leases.lease = noted
        fetcher = world.fetcher(
            store=Faults(world.store, by_name),
            run_unit=decode,
            max_read_bytes=max_read,
            max_inflight_reads=reads,
            max_inflight_units=units,
        )
        fetched = await world.fetch(fetcher, policy="fetch")
        good = next((i for i, f in enumerate(faults) if f not in ("none", "slow")), NUM_CHUNKS)
        assert fetched.report.chunks_hit == good, fetched.report
        if good:
            np.testing.assert_array_equal(
                world.restored(fetched.claim), world.values[:, :, :, : good * CHUNK_TOKENS]
            )
            await world.leases.release(fetched.claim.lease_id)
        assert world.free_blocks == free
        assert_idle(fetcher)

    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        try:
            asyncio.run(run(world))
        finally:
            world.units.decoder.close()
            world.arena.close()


@examples(15)
@given(st.integers(1, 40), st.integers(1, 4))
def test_a_cancellation_at_any_moment_leaves_nothing(polls, reads):
    async def run(world):
        await world.save(*range(NUM_CHUNKS))
        free = world.free_blocks
        fetcher = world.fetcher(
            store=RecordingStore(world.store, unit_seconds=0.02),
            max_inflight_reads=reads,
            max_read_bytes=1,
        )
        task = asyncio.create_task(world.fetch(fetcher, policy="fetch"))
        await asyncio.sleep(polls * 0.004)
        task.cancel()
        try:
            fetched = await task
        except (asyncio.CancelledError, RequestCancelledError):
            pass
        else:
            await world.leases.release(fetched.claim.lease_id)
        for _ in range(200):
            if world.free_blocks == free:
                break
            await asyncio.sleep(0.01)
        assert world.free_blocks == free
        assert_idle(fetcher)

    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        try:
            asyncio.run(run(world))
        finally:
            world.units.decoder.close()
            world.arena.close()


def assert_idle(fetcher):
    """Nothing is accounted for as under way."""
    stages = fetcher._stages
    for backlog in (stages.requested, stages.planned):
        assert backlog.num_bytes == 0
        assert backlog.decode_seconds == pytest.approx(0, abs=1e-9)
    assert (stages.budget.num_holders, stages.budget.used_bytes) == (0, 0)
    assert stages.read_queue.num_holders == 0
    assert fetcher.load().num_waiting == 0


def test_faults_strike_after_the_header(tmp_path):
    """The tests above rest on units lying behind the first range's start."""
    world = World(tmp_path)
    header = container.parse_header(world.chunk(0))
    assert all(entry.offset > 0 for entry in header.units)
    world.units.decoder.close()
    world.arena.close()
