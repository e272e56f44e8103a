"""A fetcher with a real codec, a real arena and a real file store; only Triton is left out."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter

import numpy as np

from kvfetcher.codec import profiles
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.config import CodecConfig, FetchConfig
from kvfetcher.fetch.fetcher import EngineThroughput, Fetcher, FetchFacts, UnitStatus
from kvfetcher.fetch.planning.decode_times import cpu_table
from kvfetcher.format.keys import chunk_keys
from kvfetcher.memory.arena import Arena
from kvfetcher.memory.leases import LeaseTable
from kvfetcher.prefill_rate import PrefillModel
from kvfetcher.spec import KVSpec
from kvfetcher.storage.base import get_ranges_singly
from kvfetcher.storage.local import LocalStore
from support.stores import WrappedStore

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
        self.prefill_seconds = 1.0
        """Per token: so slow that the gate always says fetch."""

    async def facts(self):
        return FACTS

    async def throughput(self):
        return EngineThroughput(
            PrefillModel(self.prefill_seconds, 0.0, 10),
            self.arena.num_blocks * self.arena.tokens_per_block,
        )

    async def lease(self, num_tokens, ttl_seconds):
        lease = self.table.lease(num_tokens, ttl_seconds, now=time.monotonic())
        return lease.id, self.arena.target(lease.block_ids, num_tokens)

    async def seal(self, lease_id, num_tokens, tokens_digest, **options):
        lease = self.table.seal(
            lease_id, num_tokens, tokens_digest, now=time.monotonic(), **options
        )
        self.sealed[lease_id] = self.arena.target(lease.block_ids, num_tokens)

    async def share(self, lease_id):
        self.table.share(lease_id, now=time.monotonic())

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


class RecordingStore(WrappedStore):
    """Remembers which bytes of which object were read."""

    def __init__(self, inner, unit_seconds=0.0):
        super().__init__(inner)
        self.unit_seconds = unit_seconds
        self.spans = []
        self.num_bytes = 0

    @property
    def reads(self):
        return len(self.spans)

    async def get_range(self, name, start, end):
        self.spans.append((name, start, end))
        if start:
            await asyncio.sleep(self.unit_seconds)
        data = await super().get_range(name, start, end)
        self.num_bytes += len(data)
        return data

    async def get_ranges(self, ranges):
        return await get_ranges_singly(self, ranges, max_concurrency=8)

    def most_reads_of_a_byte(self):
        """Of header reads, and of unit reads, each for itself (a header's range overlaps units)."""
        headers = Counter(span for span in self.spans if span[1] == 0)
        units = Counter()
        for name, start, end in self.spans:
            if start:
                units.update((name, offset) for offset in range(start, end, 16))
        return max([*headers.values(), *units.values()])


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
        self.keys = self.keys_of("")

    def keys_of(self, salt, tokens=TOKENS):
        return chunk_keys(tokens, CHUNK_TOKENS, FACTS.identity_digest, salt)

    def chunk(self, index, *, keys=None, **changes):
        keys = keys or self.keys
        tokens = slice(index * CHUNK_TOKENS, (index + 1) * CHUNK_TOKENS)
        facts = {
            "spec": SPEC,
            "profile": PROFILE,
            "identity": FACTS.identity_digest,
            "chunk_key": keys[index].key,
            "parent_key": keys[index].parent,
            "token_ids": TOKENS[tokens].tolist(),
            "first_position": index * CHUNK_TOKENS,
            "num_threads": 1,
            **changes,
        }
        return profiles.encode_chunk(np.ascontiguousarray(self.values[:, :, :, tokens]), **facts)

    async def save(self, *indices, salt=""):
        keys = self.keys_of(salt)
        for index in indices:
            await self.store.put(keys[index].name, self.chunk(index, keys=keys))

    def fetcher(self, *, store=None, local=None, leases=None, run_unit=None, **config):
        settings = {"min_hit_tokens": 1, **config}
        return Fetcher(
            store=store or self.store,
            local=local,
            leases=leases or self.leases,
            run_unit=run_unit or self.units,
            config=FetchConfig(**settings),
            table=cpu_table(2),
            num_decoders=2,
        )

    async def fetch(
        self, fetcher=None, *, tokens=TOKENS, policy="auto", salt="", cancelled=lambda: False
    ):
        return await (fetcher or self.fetcher()).fetch(
            tokens, cache_salt=salt, policy=policy, is_cancelled=cancelled
        )

    def restored(self, claim):
        return self.arena.read(self.leases.sealed[claim.lease_id])

    @property
    def free_blocks(self):
        return self.leases.table.usage()["free"]


async def set_aside(store, name, timeout_seconds=5.0):
    """Wait until a corrupt object is out of the way, which no request waits for."""
    deadline = time.monotonic() + timeout_seconds
    while await store.head(name) is not None:
        assert time.monotonic() < deadline, f"{name} was not set aside in time"
        await asyncio.sleep(0.01)


async def until(condition, timeout_seconds=5.0):
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        await asyncio.sleep(0.01)
