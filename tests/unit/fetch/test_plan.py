"""The pure part of the fetcher: every rule without a server."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.arena import BlockTarget
from kvfetcher.container import ChunkHeader, UnitEntry
from kvfetcher.fetch.plan import plan_units, probe_batches, usable_chunks
from kvfetcher.spec import KVSpec

SPEC = KVSpec(num_layers=6, num_kv_heads=2, head_dim=16)


def header(num_tokens=64, variants=("-",), layers=(0, 3)):
    units = tuple(
        UnitEntry(start, 3, variant, offset=1000 * i + start, length=10, digest=b"")
        for i, variant in enumerate(variants)
        for start in layers
    )
    return ChunkHeader(
        "exact", SPEC, bytes(32), bytes(32), bytes(32), 0, tuple(range(num_tokens)), units, 0, 0
    )


@pytest.mark.parametrize(
    ("num_tokens", "chunks"), [(0, 0), (1, 0), (256, 0), (257, 1), (512, 1), (513, 2)]
)
def test_the_last_prompt_token_is_always_computed(num_tokens, chunks):
    assert usable_chunks(num_tokens, 256) == chunks


@given(st.integers(0, 5000))
def test_probes_cover_every_chunk_once_in_order(num_chunks):
    batches = probe_batches(num_chunks)
    assert [i for batch in batches for i in batch] == list(range(num_chunks))
    assert all(len(batch) <= 32 for batch in batches)


def test_a_miss_costs_one_probe():
    assert probe_batches(1000)[0] == range(1)


def test_units_go_chunk_by_chunk_and_bottom_layers_first():
    target = BlockTarget("a", "g", tuple(range(10, 18)), 128)
    jobs = plan_units([header(), header()], ["x", "y"], target, tokens_per_block=16)
    assert [(j.chunk_index, j.entry.layer_start) for j in jobs] == [(0, 0), (0, 3), (1, 0), (1, 3)]
    assert [j.object_name for j in jobs] == ["x", "x", "y", "y"]


@given(st.integers(1, 6), st.sampled_from([16, 32, 64]))
def test_every_chunk_gets_its_own_blocks(num_chunks, tokens_per_block):
    total = 64 * num_chunks
    ids = tuple(np.random.default_rng(0).permutation(total // tokens_per_block).tolist())
    target = BlockTarget("a", "g", ids, total)
    jobs = plan_units(
        [header()] * num_chunks, ["n"] * num_chunks, target, tokens_per_block=tokens_per_block
    )
    by_chunk = {job.chunk_index: job.target.block_ids for job in jobs}
    assert sum(by_chunk.values(), ()) == ids
    assert all(job.target.num_tokens == 64 for job in jobs)


def test_one_variant_of_a_chunk_is_fetched():
    target = BlockTarget("a", "g", (0, 1, 2, 3), 64)
    jobs = plan_units([header(variants=("640x360", "1280x720"))], ["x"], target, 16)
    assert [job.entry.variant for job in jobs] == ["640x360", "640x360"]
