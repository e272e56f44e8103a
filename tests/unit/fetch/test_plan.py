"""Which chunks to ask a store for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.fetch.plan import probe_batches, usable_chunks


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


@pytest.mark.parametrize(("num_chunks", "round_trips"), [(1, 1), (5, 2), (21, 3), (53, 4)])
def test_a_long_hit_takes_few_round_trips(num_chunks, round_trips):
    assert len(probe_batches(num_chunks)) == round_trips
