"""When a second read is worth it: pure."""

import pytest

from kvfetcher.storage.hedging import HedgePolicy


def seen(policy, *seconds, num_bytes=1000):
    for each in seconds:
        policy.record(num_bytes, each)
    return policy


def test_nothing_is_known_of_reads_of_a_size_not_seen():
    policy = seen(HedgePolicy(fraction=0.1), *[0.1] * 20)
    assert policy.delay_seconds(1000) == pytest.approx(0.2)
    assert policy.delay_seconds(1 << 20) is None
    assert seen(HedgePolicy(fraction=0.1), *[0.1] * 15).delay_seconds(1000) is None


def test_a_few_stalls_do_not_move_the_delay():
    policy = seen(HedgePolicy(fraction=0.1), *[0.1] * 62, 30.0, 30.0)
    assert policy.delay_seconds(1000) == pytest.approx(0.2)


def test_a_network_that_became_slower_moves_it():
    policy = seen(HedgePolicy(fraction=0.1), *[0.1] * 64, *[0.4] * 60)
    assert policy.delay_seconds(1000) == pytest.approx(0.8)


def test_very_short_latencies_leave_room_for_the_event_loop():
    assert seen(HedgePolicy(fraction=0.1), *[1e-4] * 20).delay_seconds(1000) == 0.02


def test_the_budget_is_a_fraction_of_the_reads():
    policy = HedgePolicy(fraction=0.05)
    taken = 0
    for _ in range(1000):
        policy.record(1000, 0.1)
        taken += policy.take()
    assert 45 <= taken <= 50


def test_unused_budget_is_saved_up_to_a_bound():
    policy = seen(HedgePolicy(fraction=0.5), *[0.1] * 1000)
    assert [policy.take() for _ in range(6)] == [True] * 4 + [False] * 2


def test_no_fraction_no_hedges():
    policy = seen(HedgePolicy(fraction=0.0), *[0.1] * 64)
    assert policy.delay_seconds(1000) is None
    assert not policy.take()


def test_a_read_is_stalled_only_after_many_times_its_usual_latency():
    assert seen(HedgePolicy(fraction=0.0), *[0.5] * 20).stalled_seconds(1000) == 2.5
    assert seen(HedgePolicy(fraction=0.0), *[0.01] * 20).stalled_seconds(1000) == 1.0
    assert HedgePolicy(fraction=0.0).stalled_seconds(1000) is None
