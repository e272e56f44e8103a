"""Which chunks to ask a store for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.fetch.planning.plan import probe_batches, usable_chunks


@pytest.mark.parametrize(
    ("num_tokens", "chunks"), [(0, 0), (1, 0), (256, 0), (257, 1), (512, 1), (513, 2)]
)
def test_the_last_prompt_token_is_always_computed(num_tokens, chunks):
    assert usable_chunks(num_tokens, 256) == chunks


@given(st.integers(0, 5000), st.sampled_from([1, 32, 33, 128]))
def test_probes_cover_every_chunk_once_in_order(num_chunks, batch_size):
    batches = probe_batches(num_chunks, batch_size)
    assert [i for batch in batches for i in batch] == list(range(num_chunks))
    assert all(0 < len(batch) <= batch_size for batch in batches)


def test_a_miss_costs_one_probe():
    assert probe_batches(1000)[0] == range(1)


@pytest.mark.parametrize(("num_chunks", "round_trips"), [(1, 1), (5, 2), (21, 3), (53, 4)])
def test_a_long_hit_takes_few_round_trips(num_chunks, round_trips):
    assert len(probe_batches(num_chunks)) == round_trips


@pytest.mark.parametrize(("num_chunks", "round_trips"), [(1, 1), (128, 1), (129, 2), (256, 2)])
def test_a_store_that_answers_many_in_one_request_is_asked_for_many_at_once(
    num_chunks, round_trips
):
    assert len(probe_batches(num_chunks, 128)) == round_trips
