"""The paged engine and its connector on CUDA: loads on the engine's stream, saves beside it."""

import asyncio
import sys
import time

import numpy as np
import pytest

from kvfetcher.backend.coding import UnitDecoder
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.profiles import encode_chunk, restore_unit
from kvfetcher.engines.hf.loader import load_model
from kvfetcher.format.container import parse_header
from kvfetcher.memory.leases import LeaseClaim
from support.engine_rig import CHUNK, lease_with, saved_values, some_ids, write_model
from support.paged_rig import PagedRig

pytestmark = pytest.mark.gpu

NUM_REQUESTS = 20


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write_model(
        tmp_path_factory.mktemp("tiny"),
        head_dim=64,
        hidden_size=384,
        num_hidden_layers=4,
        max_position_embeddings=2048,
    )
    return load_model(folder, device="cuda:0", kv_dtype="bfloat16")


@pytest.fixture
def rig_of(loaded, tmp_path):
    rigs = []

    def make(**options):
        rigs.append(PagedRig(loaded, tmp_path, num_bytes=256 << 20, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def through_store(rig, values):
    """What a fetch restores: encoded by x265 under `exact`, decoded as kv_decode does."""
    chunk = encode_chunk(
        np.ascontiguousarray(values),
        spec=rig.engine.describe().identity.spec,
        profile=ExactProfile(),
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=range(values.shape[3]),
        first_position=0,
        num_threads=8,
    )
    decoder = UnitDecoder()
    units = [chunk[e.offset : e.stop] for e in parse_header(chunk).units]
    parts = [restore_unit(u, decoder.decode(u)[0]).values for u in units]
    decoder.close()
    return np.concatenate(parts)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("async_load_tokens", [0, 1])
async def test_20_requests_at_once_with_and_without_reuse(
    rig_of, layout, async_load_tokens, capsys
):
    rig = rig_of(
        layout=layout,
        connector={"async_load_tokens": async_load_tokens, "pool_bytes": 512 << 20},
    )
    # Prompts of 70 to 279 tokens: launches, not arithmetic, take the time of so small a model.
    assert rig.engine.describe().device == "cuda:0"
    assert rig.engine.stats()["kv_layouts"] == [layout]
    prompts = [some_ids(70 + 11 * i, seed=i) for i in range(NUM_REQUESTS)]
    started = time.perf_counter()
    computed = await asyncio.gather(
        *(rig.run(ids, max_tokens=16, min_length=16, save=True) for ids in prompts)
    )
    seconds_computed = time.perf_counter() - started
    claims, kept = [], []
    for ids, output in zip(prompts, computed, strict=True):
        kept.append(saved_values(rig, output.ticket))
        rig.leases.release(output.ticket.lease_id, now=rig.now)
        shared = len(ids) // CHUNK * CHUNK
        fetched = through_store(rig, kept[-1][:, :, :, :shared])
        np.testing.assert_array_equal(fetched, kept[-1][:, :, :, :shared])
        lease_id = lease_with(rig, ids[:shared], fetched)
        claims.append(LeaseClaim(lease_id, shared, rig.arena.generation))
    started = time.perf_counter()
    reused = await asyncio.gather(
        *(
            rig.run(ids, max_tokens=16, min_length=16, save=True, lease=claim)
            for ids, claim in zip(prompts, claims, strict=True)
        )
    )
    seconds_reused = time.perf_counter() - started
    with capsys.disabled():
        sys.stdout.write(
            f"\n{layout}, {'beside' if async_load_tokens else 'before'} the batch: {NUM_REQUESTS}"
            f" requests in {seconds_computed:.2f} s computed, {seconds_reused:.2f} s reused\n"
        )
    for claim, values, before, after in zip(claims, kept, computed, reused, strict=True):
        assert after.ids == before.ids
        assert claim.num_tokens - 8 <= after.timings[0].cached_tokens <= claim.num_tokens
        for ticket in after.tickets:  # chunks that the answer completed
            first = ticket.first_chunk_index * CHUNK
            np.testing.assert_array_equal(saved_values(rig, ticket), values[:, :, :, first:])
            rig.leases.release(ticket.lease_id, now=rig.now)
    async with asyncio.timeout(10):
        while rig.leases.usage()["free"] < rig.arena.num_blocks:
            await asyncio.sleep(0.01)


async def test_leased_kv_is_what_attention_sees(rig_of):
    rig = rig_of()
    ids = some_ids(70)
    plain = await rig.run(ids, save=True)
    values = saved_values(rig, plain.ticket)
    lease_id = lease_with(rig, ids[:64], values[:, :, ::-1, :64])
    other = await rig.run(ids, lease=LeaseClaim(lease_id, 64, rig.arena.generation))
    assert other.ids != plain.ids
