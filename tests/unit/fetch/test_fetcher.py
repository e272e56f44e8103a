"""The fetcher, promise by promise: hits, faults, deadlines, sharing, the gate, warming."""

import asyncio
import time

import numpy as np
import pytest

from kvfetcher.codec.raw import RawProfile
from kvfetcher.errors import (
    ArenaFullError,
    EngineError,
    FormatError,
    RequestCancelledError,
    StoreError,
    StoreTimeoutError,
)
from kvfetcher.fetch.failures import Failures
from kvfetcher.fetch.fetcher import UnitStatus
from kvfetcher.fetch.planning.decode_times import AS_IN_TABLE
from kvfetcher.fetch.shared import SharedFetch
from kvfetcher.format import container
from kvfetcher.format.unit import has_video
from kvfetcher.storage import TieredStore
from kvfetcher.storage.base import get_ranges_singly
from kvfetcher.storage.disk_tier import DiskTier
from kvfetcher.storage.guard import GuardedStore, GuardOptions
from kvfetcher.storage.memory_tier import MemoryTier
from support.fetch_world import (
    CHUNK_TOKENS,
    TOKENS,
    Leases,
    RecordingStore,
    set_aside,
    until,
)
from support.stores import FaultyStore, LatencyStore


async def test_a_hit_holds_the_saved_values_byte_for_byte(world):
    await world.save(0, 1, 2, 3)
    fetched = await world.fetch()
    assert fetched.report.outcome == "hit"
    assert fetched.report.hit_tokens == 4 * CHUNK_TOKENS
    assert fetched.claim.num_tokens == 4 * CHUNK_TOKENS
    np.testing.assert_array_equal(world.restored(fetched.claim), world.values)
    assert fetched.report.bytes_fetched > 0
    assert fetched.report.decoders == {"cpu": 8}


async def test_a_header_longer_than_the_first_range_takes_a_second_read(world, monkeypatch):
    monkeypatch.setattr("kvfetcher.format.container.HEADER_READ_BYTES", 100)
    await world.save(0, 1)
    fetched = await world.fetch()
    assert fetched.report.hit_tokens == 2 * CHUNK_TOKENS


async def test_nothing_stored_is_a_miss_and_takes_no_blocks(world):
    free = world.free_blocks
    fetched = await world.fetch()
    assert (fetched.claim, fetched.lease_json) == (None, "")
    assert (fetched.report.outcome, fetched.report.reason) == ("miss", "not_stored")
    assert world.free_blocks == free


async def test_chunks_up_to_the_first_gap_are_a_partial_hit(world):
    await world.save(0, 1, 3)
    fetched = await world.fetch()
    assert (fetched.report.outcome, fetched.report.hit_tokens) == ("partial", 2 * CHUNK_TOKENS)
    assert fetched.report.reason == "not_stored"
    np.testing.assert_array_equal(
        world.restored(fetched.claim), world.values[:, :, :, : 2 * CHUNK_TOKENS]
    )


async def test_a_prompt_of_whole_chunks_leaves_its_last_chunk_to_the_engine(world):
    await world.save(0, 1)
    fetched = await world.fetch(tokens=TOKENS[: 2 * CHUNK_TOKENS])
    assert fetched.report.hit_tokens == CHUNK_TOKENS


@pytest.mark.parametrize("where", ["unit", "header"])
async def test_a_corrupt_chunk_is_a_shorter_hit_and_set_aside(world, where):
    await world.save(0, 1, 2, 3)
    path = world.folder / world.keys[2].name
    data = bytearray(path.read_bytes())
    data[-5 if where == "unit" else 40] ^= 0x10
    path.write_bytes(data)
    fetched = await world.fetch()
    assert (fetched.report.outcome, fetched.report.reason) == ("partial", "corrupt_chunk")
    assert fetched.report.hit_tokens == 2 * CHUNK_TOKENS
    assert world.keys[2].name in fetched.report.detail
    await set_aside(world.store, world.keys[2].name)
    np.testing.assert_array_equal(
        world.restored(fetched.claim), world.values[:, :, :, : 2 * CHUNK_TOKENS]
    )


async def test_a_corrupt_first_chunk_is_a_miss_with_all_blocks_back(world):
    await world.save(0, 1)
    path = world.folder / world.keys[0].name
    path.write_bytes(path.read_bytes()[:-1])
    free = world.free_blocks
    fetched = await world.fetch()
    assert (fetched.claim, fetched.report.outcome) == (None, "miss")
    assert fetched.report.reason == "corrupt_chunk"
    assert world.free_blocks == free


@pytest.mark.parametrize("where", ["unit", "header"])
async def test_a_store_that_hangs_while_a_chunk_is_set_aside_holds_no_request_up(world, where):
    await world.save(0, 1)
    path = world.folder / world.keys[1].name
    data = bytearray(path.read_bytes())
    data[-5 if where == "unit" else 40] ^= 0x10
    path.write_bytes(data)

    class Hangs(RecordingStore):
        num_asked = 0

        async def quarantine(self, name, reason):
            self.num_asked += 1
            await answer.wait()
            await super().quarantine(name, reason)

    answer = asyncio.Event()
    store = Hangs(world.store)
    fetcher = world.fetcher(store=store, deadline_seconds=10.0)
    for _ in range(3):
        fetched = await asyncio.wait_for(world.fetch(fetcher), timeout=5)
        assert (fetched.report.reason, fetched.report.hit_tokens) == ("corrupt_chunk", CHUNK_TOKENS)
    assert store.num_asked == 1, "one that is being set aside is not set aside again"
    answer.set()
    await set_aside(world.store, world.keys[1].name)


async def test_setting_aside_is_bounded():
    class Hangs:
        num_asked = 0

        async def quarantine(self, name, reason):
            self.num_asked += 1
            await answer.wait()

    answer, store = asyncio.Event(), Hangs()
    failures = Failures(store)
    for number in range(100):
        assert failures.note(f"chunk{number}", FormatError("torn"))[0] == "corrupt_chunk"
    await asyncio.sleep(0)
    bound = store.num_asked
    assert 0 < bound < 100
    answer.set()
    await until(lambda: not failures._pending)
    failures.note("later", FormatError("torn"))
    await until(lambda: store.num_asked == bound + 1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"identity": b"j" * 32}, "identity"),
        ({"chunk_key": b"k" * 32}, "chunk key"),
        ({"token_ids": list(range(CHUNK_TOKENS))}, "token ids differ"),
        ({"first_position": 7 * CHUNK_TOKENS}, "position"),
    ],
)
async def test_a_chunk_of_something_else_under_the_right_name_is_never_used(
    world, changes, problem
):
    await world.store.put(world.keys[0].name, world.chunk(0, **changes))
    fetched = await world.fetch()
    assert (fetched.claim, fetched.report.reason) == (None, "identity_mismatch")
    assert problem in fetched.report.detail
    name = world.keys[0].name

    async def is_free():
        while await world.store.head(name) is not None:
            await asyncio.sleep(0.01)

    await asyncio.wait_for(is_free(), 5)  # set aside: it can be saved anew
    assert [aside.info.name async for aside in world.store.list_quarantined()] == [name]


@pytest.mark.parametrize("policy", ["recompute", "no_store"])
async def test_policies_that_do_not_fetch_touch_no_store(world, policy):
    class NoStore:
        def __getattr__(self, name):
            raise AssertionError(f"store.{name} was used")

    fetched = await world.fetch(world.fetcher(store=NoStore()), policy=policy)
    assert (fetched.claim, fetched.report.outcome) == (None, "skipped")


class FailingStore:
    lookup_batch_size = 32

    def __init__(self, inner, error, *, units_only):
        self.inner, self.error, self.units_only = inner, error, units_only

    async def get_range(self, name, start, end):
        if start or not self.units_only:
            raise self.error
        return await self.inner.get_range(name, start, end)

    async def get_ranges(self, ranges):
        return await get_ranges_singly(self, ranges, max_concurrency=8)


@pytest.mark.parametrize("units_only", [True, False])
@pytest.mark.parametrize(
    ("error", "reason"),
    [(StoreError("down"), "store_error"), (StoreTimeoutError("slow"), "store_timeout")],
)
async def test_a_store_that_fails_is_a_miss_with_a_reason(world, error, reason, units_only):
    await world.save(0)
    free = world.free_blocks
    store = FailingStore(world.store, error, units_only=units_only)
    fetched = await world.fetch(world.fetcher(store=store))
    assert (fetched.claim, fetched.report.reason) == (None, reason)
    assert world.free_blocks == free


async def test_a_full_arena_is_a_miss(world):
    await world.save(0, 1)
    world.leases.table.lease(
        world.arena.num_blocks * world.arena.tokens_per_block, 60, now=time.monotonic()
    )
    fetched = await world.fetch(world.fetcher(deadline_seconds=0.3))
    assert (fetched.claim, fetched.report.reason) == (None, "arena_full")


async def test_who_waits_no_longer_for_room_is_told_of_the_arena(world):
    await world.save(0)

    answer = asyncio.Event()

    class SlowToRefuse(Leases):
        num_asked = num_answered = 0

        async def lease(self, num_tokens, ttl_seconds):
            self.num_asked += 1
            if self.num_asked > 1:
                await answer.wait()
            self.num_answered += 1
            raise ArenaFullError("no room")

    leases = SlowToRefuse(world.arena)
    report = (await world.fetch(world.fetcher(leases=leases, deadline_seconds=0.3))).report
    assert (report.reason, report.detail) == ("arena_full", "no room")
    answer.set()
    await until(lambda: leases.num_answered == leases.num_asked)


async def test_an_unreachable_engine_is_a_miss(world):
    class Gone(Leases):
        async def facts(self):
            raise EngineError("gone")

    fetched = await world.fetch(world.fetcher(leases=Gone(world.arena)))
    assert (fetched.claim, fetched.report.reason) == (None, "engine_error")


async def test_a_decoder_that_fails_is_a_miss(world):
    await world.save(0)

    async def broken(unit, target):
        raise ValueError("secret path")

    fetched = await world.fetch(world.fetcher(run_unit=broken))
    assert (fetched.claim, fetched.report.reason) == (None, "decode_error")
    assert "secret" not in fetched.report.detail


async def test_at_the_deadline_nothing_live_is_promised_and_blocks_come_back_later(world):
    await world.save(0, 1)
    free = world.free_blocks
    world.units.gate.clear()
    started = time.monotonic()
    fetched = await world.fetch(world.fetcher(deadline_seconds=2.0))
    assert time.monotonic() - started < 2.0 * 1.2
    assert (fetched.claim, fetched.report.reason) == (None, "deadline")
    assert world.free_blocks < free, "a decoder may still write to them"
    world.units.gate.set()
    await until(lambda: world.free_blocks == free)


async def test_at_the_deadline_whole_chunks_are_kept_and_live_blocks_rest(world):
    await world.save(0, 1, 2)

    first_blocks = set(range(CHUNK_TOKENS // 16))  # an empty arena is leased from its start

    async def stuck_behind_the_first_chunk(unit, target):
        if not first_blocks & set(target.block_ids):
            await hold.wait()
        return await world.units(unit, target)

    hold = asyncio.Event()
    fetcher = world.fetcher(run_unit=stuck_behind_the_first_chunk, deadline_seconds=2.0)
    fetched = await world.fetch(fetcher)
    assert (fetched.report.outcome, fetched.report.reason) == ("partial", "deadline")
    assert fetched.report.hit_tokens == CHUNK_TOKENS
    np.testing.assert_array_equal(
        world.restored(fetched.claim), world.values[:, :, :, :CHUNK_TOKENS]
    )
    assert world.leases.table.usage()["resting"] == 2 * CHUNK_TOKENS // 16
    hold.set()
    await until(lambda: world.units.done == 6)


async def test_who_can_wait_no_longer_gets_what_is_ready_even_if_others_could_wait(world):
    await world.save(0, 1, 2, 3)
    first_blocks = set(range(CHUNK_TOKENS // 16))  # an empty arena is leased from its start

    async def stuck_behind_the_first_chunk(unit, target):
        if not first_blocks & set(target.block_ids):
            await hold.wait()
        return await world.units(unit, target)

    hold = asyncio.Event()
    fetcher = world.fetcher(run_unit=stuck_behind_the_first_chunk, deadline_seconds=2.0)
    first = asyncio.create_task(world.fetch(fetcher, policy="fetch"))
    await until(lambda: world.units.done == 2)
    later = []
    while not first.done():  # a stream of them must not keep the fetch going for ever
        later.append(asyncio.create_task(world.fetch(fetcher, policy="fetch")))
        await asyncio.wait({first}, timeout=0.3)
    for fetched in (await first, *await asyncio.gather(*later)):
        assert (fetched.report.outcome, fetched.report.reason) == ("partial", "deadline")
        np.testing.assert_array_equal(
            world.restored(fetched.claim), world.values[:, :, :, :CHUNK_TOKENS]
        )
    assert later
    assert world.units.done == 2
    hold.set()
    await until(lambda: world.units.done == 8)


async def test_a_fetch_ends_before_its_lease_does(world):
    await world.save(0, 1)
    first_blocks = set(range(CHUNK_TOKENS // 16))  # an empty arena is leased from its start

    async def stuck_behind_the_first_chunk(unit, target):
        if not first_blocks & set(target.block_ids):
            await hold.wait()
        return await world.units(unit, target)

    hold = asyncio.Event()
    fetcher = world.fetcher(
        run_unit=stuck_behind_the_first_chunk, deadline_seconds=60.0, lease_ttl_seconds=2.0
    )
    fetched = await asyncio.wait_for(world.fetch(fetcher, policy="fetch"), timeout=20)
    assert (fetched.report.reason, fetched.report.hit_tokens) == ("deadline", CHUNK_TOKENS)
    assert world.leases.table.counts.expired == 0
    hold.set()
    await until(lambda: world.units.done == 4)


async def test_a_lease_that_cannot_be_sealed_is_given_back(world):
    await world.save(0, 1)
    free = world.free_blocks

    class Refuses(Leases):
        async def seal(self, lease_id, num_tokens, tokens_digest, **options):
            raise EngineError("busy")

    leases = Refuses(world.arena)
    fetched = await world.fetch(world.fetcher(leases=leases))
    assert (fetched.claim, fetched.report.reason) == (None, "engine_error")
    await until(lambda: leases.table.usage()["free"] == free)


def test_a_shared_fetch_ends_for_its_first_waiter_once_something_is_ready():
    fetch = SharedFetch()
    first, second = fetch.join(10.0), fetch.join(12.0)
    assert fetch.deadline(1) == 10.0
    assert fetch.deadline(0) == 12.0, "nothing is ready: the second one may go on alone"
    fetch.waiters.remove(first)
    assert fetch.deadline(1) == fetch.deadline(0) == 12.0
    fetch.waiters.remove(second)
    assert fetch.deadline(0) == float("-inf")


async def test_waiting_for_a_place_ends_at_the_deadline_too(world):
    await world.save(0)
    await world.save(0, salt="other")
    world.units.gate.clear()
    fetcher = world.fetcher(max_inflight_requests=1, deadline_seconds=0.5)
    first = asyncio.create_task(world.fetch(fetcher))
    await world.units.started.wait()
    second = asyncio.create_task(world.fetch(fetcher, salt="other"))
    assert (await asyncio.wait_for(first, timeout=5)).report.reason == "deadline"
    second = await asyncio.wait_for(second, timeout=5)
    assert (second.claim, second.report.reason) == (None, "deadline")
    world.units.gate.set()


async def test_one_more_than_may_wait_in_line_is_computed_at_once(world):
    for salt in ("", "other", "third"):
        await world.save(0, salt=salt)
    world.units.gate.clear()
    fetcher = world.fetcher(max_inflight_requests=1, max_waiting_requests=1)
    running = asyncio.create_task(world.fetch(fetcher))
    await world.units.started.wait()
    waiting = asyncio.create_task(world.fetch(fetcher, salt="other"))
    await until(lambda: fetcher.load().num_waiting == 1)
    third = await asyncio.wait_for(world.fetch(fetcher, salt="third"), timeout=5)
    assert (third.claim, third.report.reason) == (None, "line_full")
    joined = asyncio.create_task(world.fetch(fetcher, salt="other"))  # waits for what waits already
    world.units.gate.set()
    for fetched in await asyncio.gather(running, waiting, joined):
        assert fetched.report.hit_tokens == CHUNK_TOKENS


async def test_cancelling_waits_for_the_decoder_before_blocks_are_reused(world):
    await world.save(0, 1)
    free = world.free_blocks
    world.units.gate.clear()
    with pytest.raises(RequestCancelledError):
        await world.fetch(cancelled=lambda: world.units.started.is_set())
    assert world.free_blocks < free
    world.units.gate.set()
    await until(lambda: world.free_blocks == free)


async def test_requests_that_hit_nothing_do_not_wait_for_those_that_do(world):
    await world.save(0, 1)
    world.units.gate.clear()
    fetcher = world.fetcher(max_inflight_requests=1, max_inflight_units=1)
    waiting = [asyncio.create_task(world.fetch(fetcher)) for _ in range(3)]
    await world.units.started.wait()
    miss = await asyncio.wait_for(world.fetch(fetcher, tokens=TOKENS[::-1].copy()), timeout=5)
    assert miss.report.outcome == "miss"
    assert not any(task.done() for task in waiting)
    world.units.gate.set()
    for fetched in await asyncio.gather(*waiting):
        np.testing.assert_array_equal(
            world.restored(fetched.claim), world.values[:, :, :, : 2 * CHUNK_TOKENS]
        )


async def test_units_in_flight_are_bounded_over_all_requests(world):
    salts = ["a", "b", "c"]
    for salt in salts:
        await world.save(0, 1, 2, 3, salt=salt)
    fetcher = world.fetcher(max_inflight_units=3, max_inflight_requests=3)
    await asyncio.gather(*(world.fetch(fetcher, salt=salt) for salt in salts))
    assert world.units.most <= 3
    assert world.units.done == 24


async def test_many_requests_for_one_prefix_are_one_transfer_one_decode_and_one_lease(world):
    await world.save(0, 1, 2, 3)
    store = RecordingStore(world.store)
    fetcher = world.fetcher(store=store)
    free = world.free_blocks
    fetched = await asyncio.gather(*(world.fetch(fetcher) for _ in range(200)))
    assert all(each.report.outcome == "hit" for each in fetched)
    assert store.most_reads_of_a_byte() == 1
    assert world.units.done == 8
    assert len({each.claim.lease_id for each in fetched}) == 1
    assert sum(each.report.bytes_fetched for each in fetched) == store.num_bytes
    assert sum(each.report.shared for each in fetched) == 199
    gates = [each.report.gate for each in fetched]
    assert all(gate.chunks_wanted == 4 and gate.error_ms is not None for gate in gates)
    lease_id = fetched[0].claim.lease_id
    for _ in fetched:
        assert world.free_blocks < free
        world.leases.table.claim(lease_id, now=time.monotonic())
        world.leases.table.release(lease_id, now=time.monotonic(), is_claimer=True)
    assert world.free_blocks == free


async def test_prefixes_of_different_length_share_the_transfers_of_what_they_share(world):
    await world.save(0, 1, 2, 3)
    store = RecordingStore(world.store, unit_seconds=1.2)  # a busy machine starts the second late
    fetcher = world.fetcher(store=store, max_read_bytes=1)
    longer, shorter = await asyncio.gather(
        world.fetch(fetcher), world.fetch(fetcher, tokens=TOKENS[: 2 * CHUNK_TOKENS + 1])
    )
    assert (longer.report.hit_tokens, shorter.report.hit_tokens) == (256, 128)
    assert longer.claim.lease_id != shorter.claim.lease_id
    assert store.most_reads_of_a_byte() == 1
    np.testing.assert_array_equal(
        world.restored(shorter.claim), world.values[:, :, :, : 2 * CHUNK_TOKENS]
    )


async def test_a_late_request_shares_the_lease_while_somebody_holds_it(world):
    await world.save(0, 1)
    fetcher = world.fetcher()
    first = await world.fetch(fetcher, tokens=TOKENS[:129])
    late = await world.fetch(fetcher, tokens=TOKENS[:129])
    assert late.claim == first.claim
    assert (late.report.shared, late.report.bytes_fetched) == (True, 0)
    gate = late.report.gate
    assert (gate.verdict, gate.chunks_wanted, gate.predicted_fetch_ms) == ("joined", 2, 0)
    assert gate.error_ms == gate.fetch_ms
    assert gate.loss_ms < 0
    for _ in range(2):
        await world.leases.release(first.claim.lease_id)
    fresh = await world.fetch(fetcher, tokens=TOKENS[:129])
    assert fresh.claim.lease_id != first.claim.lease_id
    assert not fresh.report.shared
    assert fresh.report.bytes_fetched > 0


async def test_one_waiters_cancellation_does_not_hurt_the_others(world):
    await world.save(0, 1)
    free = world.free_blocks
    fetcher = world.fetcher()
    world.units.gate.clear()
    gone = asyncio.Event()
    leaving = asyncio.create_task(world.fetch(fetcher, cancelled=gone.is_set))
    staying = [asyncio.create_task(world.fetch(fetcher)) for _ in range(3)]
    await world.units.started.wait()
    gone.set()
    with pytest.raises(RequestCancelledError):
        await leaving
    world.units.gate.set()
    for fetched in await asyncio.gather(*staying):
        assert fetched.report.hit_tokens == 2 * CHUNK_TOKENS
        await world.leases.release(fetched.claim.lease_id)
    assert world.free_blocks == free


async def test_a_cancellation_ends_the_look_up(world):
    class Hangs(RecordingStore):
        num_inside = 0

        async def get_ranges(self, ranges):
            self.num_inside += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.num_inside -= 1

    store = Hangs(world.store)
    fetch = world.fetch(
        world.fetcher(store=store), policy="fetch", cancelled=lambda: store.num_inside > 0
    )
    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(fetch, timeout=5)
    await until(lambda: not store.num_inside)


async def test_the_last_waiters_cancellation_stops_the_transfers(world):
    await world.save(0, 1, 2, 3)
    free = world.free_blocks
    store = RecordingStore(LatencyStore(world.store, latency_seconds=0.2))
    fetcher = world.fetcher(store=store, max_inflight_reads=1, max_read_bytes=1)
    gone = asyncio.Event()
    tasks = [asyncio.create_task(world.fetch(fetcher, cancelled=gone.is_set)) for _ in range(2)]
    await until(lambda: store.reads > 6)  # look-up over, units under way
    gone.set()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, RequestCancelledError) for end in ends)
    reads = store.reads
    await asyncio.sleep(0.5)
    assert store.reads == reads
    assert world.free_blocks == free
    for backlog in (fetcher._stages.requested, fetcher._stages.planned):
        assert (backlog.num_bytes, backlog.decode_seconds) == (0, pytest.approx(0))
    assert fetcher._stages.budget.used_bytes == 0


async def test_the_gate_computes_what_is_faster_to_compute(world):
    await world.save(0, 1, 2, 3)
    world.leases.prefill_seconds = 1e-7
    fetcher = world.fetcher()
    await world.fetch(fetcher, policy="fetch")  # the link is known then
    fetched = await world.fetch(fetcher, tokens=TOKENS[:200])
    assert (fetched.claim, fetched.report.reason) == (None, "slower_than_computing")
    gate = fetched.report.gate
    assert (gate.verdict, gate.chunks_stored, gate.chunks_wanted) == ("none", 3, 0)
    assert gate.predicted_ms == gate.predicted_compute_ms
    # What was turned down is told, too: where fetching would begin to pay.
    assert gate.chunks_considered > 0
    assert gate.predicted_all_fetch_ms >= gate.predicted_fetch_ms > gate.predicted_compute_ms
    assert gate.predicted_with_fetch_ms >= gate.predicted_fetch_ms


async def test_policy_fetch_bypasses_the_gate(world):
    await world.save(0, 1, 2, 3)
    world.leases.prefill_seconds = 1e-7
    fetched = await world.fetch(policy="fetch")
    assert fetched.report.outcome == "hit"
    gate = fetched.report.gate
    assert gate.verdict == "forced"
    assert gate.fetch_ms > 0
    lookup_ms = fetched.report.stages_ms["lookup"]
    assert gate.loss_ms == pytest.approx(lookup_ms + gate.fetch_ms, abs=1.0)
    assert gate.error_ms == pytest.approx(gate.fetch_ms - gate.predicted_fetch_ms, abs=0.01)


async def test_a_store_that_stalls_is_given_up_for_computing_and_what_came_is_kept(world):
    for salt in ("", "x", "y", "z"):
        await world.save(0, 1, 2, 3, salt=salt)
    store = RecordingStore(world.store)
    fetcher = world.fetcher(store=store)
    for salt in ("x", "y", "z"):  # so that the link is known
        await world.fetch(fetcher, salt=salt)

    async def stall(verb, name):
        if name == world.keys[2].name and store.spans[-1][1]:
            await asyncio.sleep(30)

    store.before = stall
    world.leases.prefill_seconds = 1.0 / CHUNK_TOKENS  # 4 s for all
    started = time.monotonic()
    fetched = await world.fetch(fetcher)
    assert fetched.report.reason == "fell_behind"
    assert time.monotonic() - started < 3.0
    assert fetched.report.hit_tokens == 2 * CHUNK_TOKENS
    np.testing.assert_array_equal(
        world.restored(fetched.claim), world.values[:, :, :, : 2 * CHUNK_TOKENS]
    )


async def test_a_fetch_that_is_given_up_does_not_wait_for_the_room_it_asked_for(world):
    for salt in ("", "first"):
        await world.save(0, 1, 2, 3, salt=salt)
    world.units.gate.clear()
    fetcher = world.fetcher(max_inflight_bytes=1 << 16, max_read_bytes=1 << 20)
    fetcher._stages.budget._max_bytes = 1  # the first fetch's first read takes it all
    first = asyncio.create_task(world.fetch(fetcher, salt="first", policy="fetch"))
    await world.units.started.wait()
    world.leases.prefill_seconds = 1.0 / CHUNK_TOKENS
    started = time.monotonic()
    second = await asyncio.wait_for(world.fetch(fetcher), timeout=5)
    assert (second.claim, second.report.reason) == (None, "fell_behind")
    assert time.monotonic() - started < 2.5
    world.units.gate.set()
    assert (await first).report.outcome == "hit"
    budget = fetcher._stages.budget
    assert (budget.num_holders, budget.used_bytes) == (0, 0)


class OneRequest(RecordingStore):
    """A store that answers many headers in one request; remembers how many each one asked for."""

    lookup_batch_size = 128

    def __init__(self, inner):
        super().__init__(inner)
        self.batches = []

    async def get_ranges(self, ranges):
        self.batches.append(len(ranges))
        return await super().get_ranges(ranges)


@pytest.mark.parametrize("stored", [0, 1, 4])
async def test_a_look_up_asks_for_all_headers_at_once_where_that_is_one_request(world, stored):
    await world.save(*range(stored))
    store = OneRequest(world.store)
    fetched = await world.fetch(world.fetcher(store=store))
    assert fetched.report.hit_tokens == stored * CHUNK_TOKENS
    # The first one goes beside the others: it tells the round trip.
    assert sorted(store.batches) == [1, 3]


async def test_a_look_up_asks_again_for_what_a_healing_breaker_refused(world):
    await world.save(0, 1, 2, 3)
    faulty = FaultyStore(OneRequest(world.store), errors={"get_range": StoreError("down")})
    options = GuardOptions(
        max_retries=0,
        hedge_fraction=0,
        min_failures=2,
        min_backoff_seconds=0.3,
        max_backoff_seconds=1,
    )
    store = GuardedStore(faulty, options)
    fetcher = world.fetcher(store=store)
    await world.fetch(fetcher)
    assert store.breaker.state == "open"
    faulty.errors.clear()
    await asyncio.sleep(0.35)
    assert (await world.fetch(fetcher)).report.hit_tokens == 4 * CHUNK_TOKENS
    assert store.breaker.state == "closed"


async def test_an_open_breaker_is_a_miss_that_costs_no_reads(world):
    await world.save(0, 1)
    faulty = FaultyStore(world.store, errors={"get_range": StoreError("down")})
    faulty.get_ranges = lambda ranges: get_ranges_singly(faulty, ranges, max_concurrency=8)
    options = GuardOptions(
        max_retries=0,
        hedge_fraction=0,
        min_failures=2,
        min_backoff_seconds=0.3,
        max_backoff_seconds=1,
    )
    store = GuardedStore(faulty, options)
    fetcher = world.fetcher(store=store)
    for _ in range(2):
        assert (await world.fetch(fetcher)).report.reason == "store_error"
    calls = faulty.calls["get_range"]
    for _ in range(5):
        assert (await world.fetch(fetcher)).report.reason == "store_unavailable"
    assert faulty.calls["get_range"] == calls
    faulty.errors.clear()
    await asyncio.sleep(0.35)
    assert (await world.fetch(fetcher)).report.hit_tokens == 2 * CHUNK_TOKENS
    assert store.breaker.state == "closed"


async def test_a_read_damaged_on_its_way_is_repeated_and_nothing_set_aside(world):
    await world.save(0, 1)
    header_bytes = container.parse_header(world.chunk(1)).header_bytes

    class Noise(RecordingStore):
        async def get_range(self, name, start, end):
            data = await super().get_range(name, start, end)
            if name == world.keys[1].name and start >= header_bytes and not self.damaged:
                self.damaged = True
                return data[:-1] if self.cut else bytes([data[0] ^ 1]) + data[1:]
            return data

    for cut in (True, False):
        store = Noise(world.store)
        store.damaged, store.cut = False, cut
        fetched = await world.fetch(world.fetcher(store=store))
        assert store.damaged
        assert fetched.report.hit_tokens == 2 * CHUNK_TOKENS
        np.testing.assert_array_equal(
            world.restored(fetched.claim), world.values[:, :, :, : 2 * CHUNK_TOKENS]
        )


async def test_reads_that_end_early_again_and_again_are_the_stores_fault_not_the_chunks(world):
    await world.save(0, 1)
    header_bytes = container.parse_header(world.chunk(1)).header_bytes

    class Short(RecordingStore):
        async def get_range(self, name, start, end):
            data = await super().get_range(name, start, end)
            if name == world.keys[1].name and start >= header_bytes and len(data) > 1:
                return data[: len(data) // 2]
            return data

    fetched = await world.fetch(world.fetcher(store=Short(world.store)))
    assert (fetched.report.reason, fetched.report.hit_tokens) == ("store_error", CHUNK_TOKENS)
    assert await world.store.head(world.keys[1].name) is not None


async def test_a_chunk_that_disappears_after_the_look_up_is_a_shorter_hit(world):
    await world.save(0, 1, 2)
    header_bytes = container.parse_header(world.chunk(1)).header_bytes

    class Forgetful(RecordingStore):
        async def get_range(self, name, start, end):
            if name == world.keys[1].name and start >= header_bytes:
                await self.inner.delete(name)
            return await super().get_range(name, start, end)

    fetched = await world.fetch(world.fetcher(store=Forgetful(world.store)))
    assert (fetched.report.outcome, fetched.report.hit_tokens) == ("partial", CHUNK_TOKENS)
    assert fetched.report.reason == "not_stored"


async def test_neighbouring_units_are_read_together(world, monkeypatch):
    # So few units are left here that a tenth of them is less than one.
    monkeypatch.setattr("kvfetcher.fetch.stages._READ_SHARE", 1.0)
    await world.save(0, 1, 2, 3)
    whole, single = RecordingStore(world.store), RecordingStore(world.store)
    together = await world.fetch(world.fetcher(store=whole))
    apart = await world.fetch(world.fetcher(store=single, max_read_bytes=1))
    assert (together.report.reads, apart.report.reads) == (4 + 4, 4 + 8)  # with the headers
    assert together.report.units == apart.report.units == 8


async def test_transfer_and_decode_of_different_units_overlap(world):
    await world.save(0, 1, 2, 3)

    async def slow(unit, target):
        await asyncio.sleep(0.1)
        return await world.units(unit, target)

    fetcher = world.fetcher(
        store=RecordingStore(world.store, unit_seconds=0.1),
        run_unit=slow,
        max_read_bytes=1,
        max_inflight_reads=1,
        max_inflight_units=1,
    )
    report = (await world.fetch(fetcher, policy="fetch")).report
    assert report.units == 8
    assert report.stages_ms["transfer"] >= 800
    one_after_the_other = 8 * 0.1 + 8 * 0.1
    assert report.stages_ms["fetch"] < 0.8e3 * one_after_the_other


async def test_bytes_in_flight_are_bounded(world):
    await world.save(0, 1, 2, 3)
    world.units.gate.clear()
    fetcher = world.fetcher(max_inflight_bytes=1 << 16, max_read_bytes=1)
    task = asyncio.create_task(world.fetch(fetcher))
    await world.units.started.wait()
    await asyncio.sleep(0.1)
    assert 0 < fetcher._stages.budget.used_bytes <= 1 << 16
    world.units.gate.set()
    assert (await task).report.outcome == "hit"
    assert fetcher._stages.budget.used_bytes == 0


async def test_waiting_for_room_in_the_arena_ends_when_there_is_some(world):
    await world.save(0, 1)
    table = world.leases.table
    held = table.lease(world.arena.num_blocks * 16, 60, now=time.monotonic())
    task = asyncio.create_task(world.fetch())
    await asyncio.sleep(0.2)
    assert not task.done()
    table.release(held.id, now=time.monotonic())
    fetched = await asyncio.wait_for(task, timeout=5)
    assert fetched.report.hit_tokens == 2 * CHUNK_TOKENS
    assert fetched.report.stages_ms["arena_wait"] > 100


async def test_copies_near_by_are_no_transfers(world, tmp_path):
    await world.save(0, 1, 2, 3)
    await world.save(0, 1, 2, 3, salt="far")
    slow = RecordingStore(LatencyStore(world.store, bytes_per_second=1e5))
    disk = DiskTier(tmp_path / "tier", max_bytes=1 << 20, max_age_seconds=60)
    store = TieredStore(slow, memory=None, disk=disk, disk_timeout_seconds=5)
    fetcher = world.fetcher(store=store, local=store)
    first = await world.fetch(fetcher, policy="fetch")  # brings the copies, and tells of the link
    await store.drained()
    assert first.report.outcome == "hit"
    rate = fetcher._stages.link().bytes_per_second
    world.leases.prefill_seconds = 0.5 * first.report.stages_ms["total"] / 1e3 / len(TOKENS)
    num_reads = slow.reads
    for _ in range(3):
        near = await world.fetch(fetcher)
        assert (near.report.outcome, near.report.chunks_hit) == ("hit", 4)
    assert slow.reads == num_reads
    assert fetcher._stages.link().bytes_per_second == pytest.approx(rate, rel=0.2)
    far = await world.fetch(fetcher, salt="far")
    assert far.report.chunks_hit < 4
    # Where the machine stalls, looking the headers up takes too long already.
    assert far.report.reason in ("slower_than_computing", "store_timeout")


def in_memory(store):
    memory = MemoryTier(max_bytes=1 << 20, max_age_seconds=60)
    return TieredStore(store, memory=memory, disk=None, disk_timeout_seconds=5)


async def test_warming_reads_whole_chunks_once_into_the_copies_near_by(world):
    await world.save(0, 1, 2)
    store = RecordingStore(world.store)
    tier = in_memory(store)
    fetcher = world.fetcher(store=tier, local=tier)
    warmed = (await world.fetch(fetcher, policy="warm")).report
    assert (warmed.outcome, warmed.reason) == ("warmed", "not_stored")
    assert (warmed.chunks_stored, warmed.chunks_hit, warmed.hit_tokens) == (3, 3, 0)
    assert warmed.bytes_fetched == store.num_bytes
    read = store.num_bytes
    fetched = await world.fetch(fetcher, tokens=TOKENS[: 3 * CHUNK_TOKENS + 1])
    assert fetched.report.hit_tokens == 3 * CHUNK_TOKENS
    assert store.num_bytes == read, "nothing was asked of the store again"


async def test_warming_without_copies_near_by_reads_nothing(world):
    await world.save(0)
    store = RecordingStore(world.store)
    report = (await world.fetch(world.fetcher(store=store), policy="warm")).report
    assert (report.outcome, report.reason, store.reads) == ("skipped", "no_copies", 0)


async def test_warming_sets_a_corrupt_chunk_aside_and_warms_the_others(world):
    await world.save(0, 1)
    path = world.folder / world.keys[1].name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    tier = in_memory(world.store)
    report = (await world.fetch(world.fetcher(store=tier, local=tier), policy="warm")).report
    assert (report.outcome, report.reason, report.chunks_hit) == ("warmed", "corrupt_chunk", 1)
    await set_aside(world.store, world.keys[1].name)


async def test_warming_ends_at_its_deadline_and_when_the_client_goes_away(world):
    await world.save(0, 1)

    class Slow(RecordingStore):
        async def get_range(self, name, start, end):
            if (start, end) != (0, container.HEADER_READ_BYTES):
                await asyncio.sleep(30)
            return await super().get_range(name, start, end)

    tier = in_memory(Slow(world.store))
    fetcher = world.fetcher(store=tier, local=tier, deadline_seconds=0.3)
    report = (await world.fetch(fetcher, policy="warm")).report
    assert (report.outcome, report.reason, report.chunks_hit) == ("warmed", "deadline", 0)
    with pytest.raises(RequestCancelledError):
        await world.fetch(fetcher, policy="warm", cancelled=lambda: True)
    assert fetcher.load().inflight_bytes == 0


class HeldStore(RecordingStore):
    """Holds reads of some objects back until told to let them go, and counts them."""

    def __init__(self, inner, names):
        super().__init__(inner)
        self.names = names
        self.let_go = asyncio.Event()
        self.num_held = self.most_held = 0

    async def get_range(self, name, start, end):
        if name in self.names and (start, end) != (0, container.HEADER_READ_BYTES):
            self.num_held += 1
            self.most_held = max(self.most_held, self.num_held)
            await self.let_go.wait()
            self.num_held -= 1
        return await super().get_range(name, start, end)


async def test_warming_leaves_a_place_to_requests_that_need_their_bytes_now(world):
    await world.save(0, 1)
    for salt in ("cold", "colder"):
        await world.save(0, 1, 2, 3, salt=salt)
    cold = {key.name for salt in ("cold", "colder") for key in world.keys_of(salt)}
    store = HeldStore(world.store, cold)
    tier = in_memory(store)
    fetcher = world.fetcher(store=tier, local=tier)
    warming = [
        asyncio.create_task(world.fetch(fetcher, policy="warm", salt=salt))
        for salt in ("cold", "colder")
    ]
    await until(lambda: store.num_held)
    hit = await asyncio.wait_for(world.fetch(fetcher, policy="fetch"), timeout=5)
    assert hit.report.hit_tokens == 2 * CHUNK_TOKENS
    assert fetcher._stages.requested.num_bytes > 0, "what is being warmed is in others' way"
    store.let_go.set()
    assert {each.report.chunks_hit for each in await asyncio.gather(*warming)} == {4}
    assert store.most_held == 1
    assert fetcher._stages.requested.num_bytes == 0


async def test_requests_that_need_their_bytes_now_pass_those_that_warm(world):
    await world.save(0)
    await world.save(0, 1, 2, salt="cold")
    cold = [key.name for key in world.keys_of("cold")]
    store = HeldStore(world.store, {cold[0]})
    tier = in_memory(store)
    fetcher = world.fetcher(store=tier, local=tier, max_inflight_reads=1)
    warming = asyncio.create_task(world.fetch(fetcher, policy="warm", salt="cold"))
    await until(lambda: store.num_held)
    wanted = asyncio.create_task(world.fetch(fetcher, policy="fetch"))
    await until(lambda: fetcher._stages.read_queue._waiting)
    store.spans.clear()
    store.let_go.set()
    assert (await wanted).report.hit_tokens == CHUNK_TOKENS
    assert (await warming).report.chunks_hit == 3
    first, second, *_ = [name for name, start, _ in store.spans]
    assert (first, second) == (cold[0], world.keys[0].name)


async def test_a_chunk_is_warmed_in_reads_of_whole_units(world):
    await world.save(0)
    store = RecordingStore(world.store)
    tier = in_memory(store)
    fetcher = world.fetcher(store=tier, local=tier, max_read_bytes=1)
    tokens = TOKENS[: CHUNK_TOKENS + 1]
    report = (await world.fetch(fetcher, policy="warm", tokens=tokens)).report
    units = container.parse_header(world.chunk(0)).units
    assert report.chunks_hit == 1
    assert units[0].stop <= container.HEADER_READ_BYTES < units[1].stop
    parts = [(unit.offset, unit.stop) for unit in units[1:]]
    assert [span[1:] for span in store.spans] == [(0, container.HEADER_READ_BYTES), *parts]
    near = await world.fetch(fetcher, tokens=tokens, policy="fetch")
    assert near.report.hit_tokens == CHUNK_TOKENS
    assert len(store.spans) == 1 + len(parts), "what lies near is not read again"


async def test_units_without_video_do_not_wait_for_a_decoder(world):
    await world.save(0)
    await world.store.put(world.keys[1].name, world.chunk(1, profile=RawProfile()))
    came = asyncio.Event()

    async def run_unit(unit, target):
        if has_video(unit):
            await asyncio.wait_for(came.wait(), 20)
        status = await world.units(unit, target)
        if not has_video(unit):
            came.set()
        return status

    class RawComesLast(RecordingStore):
        async def get_range(self, name, start, end):
            if name == world.keys[1].name and start:
                await asyncio.sleep(0.2)
            return await super().get_range(name, start, end)

    fetcher = world.fetcher(
        store=RawComesLast(world.store), run_unit=run_unit, max_inflight_units=1
    )
    report = (await world.fetch(fetcher, policy="fetch")).report
    assert report.chunks_hit == 2, report


async def test_how_long_this_machine_decodes_and_restores_is_learnt(world):
    await world.save(0, 1, 2)

    async def slow_to_restore(unit, target):
        await world.units(unit, target)
        return UnitStatus("cpu", 1000.0, 1000.0)

    fetcher = world.fetcher(run_unit=slow_to_restore, max_inflight_units=1)
    assert fetcher._stages.learning.factors == AS_IN_TABLE
    await world.fetch(fetcher)
    assert min(fetcher._stages.learning.factors) > 2.0


async def test_time_that_no_decoder_reports_is_learnt_while_all_are_busy(world):
    salts = ("a", "b", "c", "d")
    for salt in salts:
        await world.save(0, 1, 2, salt=salt)

    async def slow_to_arrive(unit, target):
        await world.units(unit, target)
        await asyncio.sleep(0.1)
        return UnitStatus("cpu", 1.0, 1.0)

    fetcher = world.fetcher(run_unit=slow_to_arrive)
    await asyncio.gather(*(world.fetch(fetcher, policy="fetch", salt=salt) for salt in salts))
    one_by_one = world.fetcher(run_unit=slow_to_arrive, max_inflight_units=1)
    await world.fetch(one_by_one, policy="fetch", salt="a")
    many, single = (f._stages.learning.factors for f in (fetcher, one_by_one))
    assert many.decode > 1.5 * single.decode
    assert many.latency < 1.5 * single.latency, "what a unit alone takes is the same"
