"""The fetcher with a real codec, a real arena and a real file store; only Triton is left out."""

import asyncio
import dataclasses
import time

import numpy as np
import pytest

from kvfetcher.arena import Arena
from kvfetcher.codec import profiles
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.config import CodecConfig, FetchConfig
from kvfetcher.errors import EngineError, RequestCancelledError, StoreError, StoreTimeoutError
from kvfetcher.fetch.fetcher import Fetcher, FetchFacts, UnitStatus
from kvfetcher.keys import chunk_keys
from kvfetcher.leases import LeaseTable
from kvfetcher.spec import KVSpec
from kvfetcher.storage.local import LocalStore

SPEC = KVSpec(num_layers=4, num_kv_heads=1, head_dim=16)
CHUNK_TOKENS = 64
PROFILE = profiles.make_profile(CodecConfig(profile="exact", unit_layers=2))
FACTS = FetchFacts(
    identity_digest=b"i" * 32,
    chunk_tokens=CHUNK_TOKENS,
    tokens_per_block=16,
    spec=SPEC,
    max_prompt_tokens=10_000,
)
TOKENS = np.arange(1, 4 * CHUNK_TOKENS + 10, dtype=np.int32)


class Leases:
    """The engine's lease service without its socket."""

    def __init__(self, arena):
        self.arena = arena
        self.table = LeaseTable(arena.num_blocks, arena.tokens_per_block)
        self.sealed = {}

    async def facts(self):
        return FACTS

    async def lease(self, num_tokens, ttl_seconds):
        lease = self.table.lease(num_tokens, ttl_seconds, now=time.monotonic())
        return lease.id, self.arena.target(lease.block_ids, num_tokens)

    async def seal(self, lease_id, num_tokens, tokens_digest):
        lease = self.table.seal(lease_id, num_tokens, tokens_digest, now=time.monotonic())
        self.sealed[lease_id] = self.arena.target(lease.block_ids, num_tokens)

    async def release(self, lease_id):
        self.table.release(lease_id, now=time.monotonic())


@dataclasses.dataclass
class Units:
    """Decodes and restores for real; can be held, slowed or broken, and counts."""

    arena: Arena
    gate: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    started: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    running: int = 0
    most: int = 0
    done: int = 0

    def __post_init__(self):
        self.decoder = VideoDecoder()
        self.gate.set()

    async def __call__(self, unit, target):
        self.running += 1
        self.most = max(self.most, self.running)
        self.started.set()
        try:
            await self.gate.wait()
            restored = profiles.restore_unit(unit, profiles.decode_unit(unit, self.decoder))
            self.arena.write(target, restored.layer_start, restored.values)
            self.done += 1
            return UnitStatus("cpu", 1.0, 1.0)
        finally:
            self.running -= 1


class World:
    def __init__(self, folder):
        self.store = LocalStore(folder / "store", timeout_seconds=5)
        self.arena = Arena.create(
            folder / "arena", spec=SPEC, tokens_per_block=16, num_bytes=1 << 20
        )
        self.leases = Leases(self.arena)
        self.units = Units(self.arena)
        self.folder = folder / "store"
        rng = np.random.default_rng(3)
        shape = (4, 2, 1, 4 * CHUNK_TOKENS, 16)
        self.values = (rng.normal(size=shape).astype("<f4").view("<u4") >> 16).astype("<u2")
        self.keys = chunk_keys(TOKENS, CHUNK_TOKENS, FACTS.identity_digest, "")

    def chunk(self, index, **changes):
        tokens = slice(index * CHUNK_TOKENS, (index + 1) * CHUNK_TOKENS)
        facts = {
            "spec": SPEC,
            "profile": PROFILE,
            "identity": FACTS.identity_digest,
            "chunk_key": self.keys[index].key,
            "parent_key": self.keys[index].parent,
            "token_ids": TOKENS[tokens].tolist(),
            "first_position": index * CHUNK_TOKENS,
            "num_threads": 1,
            **changes,
        }
        return profiles.encode_chunk(np.ascontiguousarray(self.values[:, :, :, tokens]), **facts)

    async def save(self, *indices):
        for index in indices:
            await self.store.put(self.keys[index].name, self.chunk(index))

    def fetcher(self, *, store=None, leases=None, **config):
        settings = {"min_hit_tokens": 1, **config}
        return Fetcher(
            store=store or self.store,
            leases=leases or self.leases,
            run_unit=self.units,
            config=FetchConfig(**settings),
        )

    async def fetch(self, fetcher=None, *, tokens=TOKENS, policy="auto", cancelled=lambda: False):
        return await (fetcher or self.fetcher()).fetch(
            tokens, cache_salt="", policy=policy, is_cancelled=cancelled
        )

    def restored(self, claim):
        return self.arena.read(self.leases.sealed[claim.lease_id])

    @property
    def free_blocks(self):
        return self.leases.table.usage()["free"]


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.units.decoder.close()
    made.arena.close()


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
    monkeypatch.setattr("kvfetcher.container.HEADER_READ_BYTES", 100)
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
    assert await world.store.head(world.keys[2].name) is None
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


@pytest.mark.parametrize("policy", ["recompute", "no_store"])
async def test_policies_that_do_not_fetch_touch_no_store(world, policy):
    class NoStore:
        def __getattr__(self, name):
            raise AssertionError(f"store.{name} was used")

    fetched = await world.fetch(world.fetcher(store=NoStore()), policy=policy)
    assert (fetched.claim, fetched.report.outcome) == (None, "skipped")


class FailingStore:
    def __init__(self, inner, error, *, units_only):
        self.inner, self.error, self.units_only = inner, error, units_only

    async def get_range(self, name, start, end):
        if start or not self.units_only:
            raise self.error
        return await self.inner.get_range(name, start, end)


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
    fetched = await world.fetch()
    assert (fetched.claim, fetched.report.reason) == (None, "arena_full")


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

    fetcher = Fetcher(
        store=world.store,
        leases=world.leases,
        run_unit=broken,
        config=FetchConfig(min_hit_tokens=1),
    )
    fetched = await world.fetch(fetcher)
    assert (fetched.claim, fetched.report.reason) == (None, "decode_error")
    assert "secret" not in fetched.report.detail


async def test_at_the_deadline_nothing_live_is_promised_and_blocks_come_back_later(
    world, monkeypatch
):
    monkeypatch.setattr("kvfetcher.fetch.fetcher._DRAIN_SECONDS", 0.1)
    await world.save(0, 1)
    free = world.free_blocks
    world.units.gate.clear()
    fetched = await world.fetch(world.fetcher(deadline_seconds=0.2))
    assert (fetched.claim, fetched.report.reason) == (None, "deadline")
    assert world.free_blocks < free, "a decoder may still write to them"
    world.units.gate.set()
    await until(lambda: world.free_blocks == free)


async def test_waiting_for_a_place_ends_at_the_deadline_too(world):
    await world.save(0)
    world.units.gate.clear()
    fetcher = world.fetcher(max_inflight_requests=1, deadline_seconds=0.5)
    first = asyncio.create_task(world.fetch(fetcher))
    await world.units.started.wait()
    second = await asyncio.wait_for(world.fetch(fetcher), timeout=5)
    assert (second.claim, second.report.reason) == (None, "deadline")
    assert "other requests" in second.report.detail
    world.units.gate.set()
    assert (await first).report.outcome in ("partial", "miss")


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
    await world.save(0, 1, 2, 3)
    fetcher = world.fetcher(max_inflight_units=3, max_inflight_requests=2)
    await asyncio.gather(world.fetch(fetcher), world.fetch(fetcher))
    assert world.units.most <= 3
    assert world.units.done == 16


async def until(condition, timeout_seconds=5.0):
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        await asyncio.sleep(0.01)
