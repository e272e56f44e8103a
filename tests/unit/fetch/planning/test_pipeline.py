import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.fetch.planning.bandwidth import LinkEstimate
from kvfetcher.fetch.planning.pipeline import ChunkCost, Machine, finish_times

costs = st.lists(
    st.builds(
        ChunkCost,
        num_bytes=st.integers(0, 10**8),
        decode_seconds=st.floats(0, 10),
        tail_seconds=st.floats(0, 0.1),
        restore_seconds=st.floats(0, 0.1),
    ),
    max_size=20,
)


def link(rate, rtt=0.0):
    return LinkEstimate(rate, rate, rate, rate, rtt)


def finish(chunks, rate=1e6, rtt=0.0, **machine):
    return finish_times(
        chunks, link=link(rate, rtt), machine=Machine(**{"num_decoders": 2, **machine})
    )


def test_the_slowest_stage_sets_the_pace():
    network_bound = [ChunkCost(10**6, 0.2, 0.05, 0.01)] * 3
    assert finish(network_bound) == pytest.approx([1.06, 2.06, 3.06])
    decode_bound = [ChunkCost(10**6, 4.0, 0.05, 0.01)] * 3
    assert finish(decode_bound) == pytest.approx([2.01, 4.01, 6.01])
    restore_bound = [ChunkCost(10**6, 0.2, 0.05, 5.0)] * 2
    assert finish(restore_bound) == pytest.approx([6.05, 11.05])


def test_the_round_trip_is_paid_once_and_not_behind_other_transfers():
    chunks = [ChunkCost(10**6, 0.0, 0.0, 0.0)] * 2
    assert finish(chunks, rtt=0.5) == pytest.approx([1.5, 2.5])
    assert finish(chunks, rtt=0.5, network_queue_bytes=10**6) == pytest.approx([2.0, 3.0])


def test_what_is_queued_comes_first():
    chunks = [ChunkCost(10**6, 0.2, 0.0, 0.0)]
    assert finish(chunks, decode_queue_seconds=7.0) == pytest.approx([7.1])


@given(costs, st.floats(1e3, 1e10), st.floats(1.0, 100.0))
def test_times_rise_and_a_faster_link_is_never_later(chunks, rate, factor):
    slow, fast = finish(chunks, rate), finish(chunks, rate * factor)
    assert slow == sorted(slow)
    assert all(f <= s * (1 + 1e-9) for f, s in zip(fast, slow, strict=True))


@given(costs, st.integers(1, 8), st.floats(0, 10), st.integers(0, 10**9))
def test_more_in_the_way_is_never_earlier(chunks, decoders, queue, num_bytes):
    free = finish(chunks, num_decoders=decoders)
    held_up = finish(
        chunks,
        num_decoders=decoders,
        decode_queue_seconds=queue,
        network_queue_bytes=num_bytes,
    )
    assert all(f <= h * (1 + 1e-9) + 1e-9 for f, h in zip(free, held_up, strict=True))
