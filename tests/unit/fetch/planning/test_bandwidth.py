import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.fetch.planning.bandwidth import LinkEstimate, LinkEstimator

MBYTE = 1 << 20


def make(prior=1e9, rtt=1e-3, half_life=1.0):
    return LinkEstimator(
        prior_bytes_per_second=prior, prior_rtt_seconds=rtt, half_life_seconds=half_life
    )


def transfers(estimator, rates, *, size=MBYTE, concurrency=1, rtt=1e-3, now=0.0):
    """Rounds of transfers side by side over a link of the given rates; the time at the end."""
    for rate in rates:
        tokens = [estimator.begin(now, size) for _ in range(concurrency)]
        now += rtt + concurrency * size / rate
        for token in tokens:
            estimator.end(token, now)
    return now


def test_nothing_seen_is_the_prior_widely_spread():
    found = make(prior=4e8, rtt=5e-3).estimate(0.0)
    assert (found.bytes_per_second, found.rtt_seconds, found.num_transfers) == (4e8, 5e-3, 0)
    assert found.low_bytes_per_second == 1e8
    assert found.high_bytes_per_second == 16e8
    assert found.age_seconds == math.inf


@pytest.mark.parametrize("concurrency", [1, 2, 8])
@pytest.mark.parametrize("rate", [1e8, 2e9])
def test_rate_of_the_link_does_not_depend_on_how_many_share_it(rate, concurrency):
    estimator = make()
    now = transfers(estimator, [rate] * 200, concurrency=concurrency)
    # Where all wait for their round trips at one time, that is what can be reached.
    busy = concurrency * MBYTE / rate
    reached = rate if concurrency == 1 else rate * busy / (busy + 1e-3)
    assert 0.95 * reached <= estimator.estimate(now).bytes_per_second <= 1.05 * rate


@pytest.mark.parametrize("in_turn", [True, False], ids=["in turn", "side by side"])
def test_a_steady_link_is_not_taken_for_one_that_scatters(in_turn):
    """A burst of reads that a link serves one after the other, or all at one time."""
    rate, size, num_reads = 125e6, 2 << 20, 8
    estimator, now = make(prior=rate), 0.0
    for _ in range(5):
        tokens = [estimator.begin(now, size) for _ in range(num_reads)]
        now += 1e-3
        for number, token in enumerate(tokens):
            done = (number + 1 if in_turn else num_reads) * size / rate
            estimator.end(token, now + done)
        now += num_reads * size / rate + 0.1
    found = estimator.estimate(now)
    assert found.bytes_per_second == pytest.approx(rate, rel=0.02)
    assert found.low_bytes_per_second > 0.95 * rate
    assert found.high_bytes_per_second < 1.05 * rate
    assert found.recent_bytes_per_second == pytest.approx(rate, rel=0.02)


def test_a_short_transfer_after_a_pause_does_not_slow_a_fast_link_down():
    estimator = make(prior=1e9)
    now = transfers(estimator, [1e9] * 50, size=16 * MBYTE) + 7.0
    token = estimator.begin(now, 256 << 10)  # the headers of a look-up, in 0.26 ms and a round trip
    estimator.end(token, now + 0.26e-3 + 2e-3)
    assert estimator.estimate(now + 2.3e-3).bytes_per_second == pytest.approx(1e9, rel=0.05)


def test_a_short_transfer_may_show_that_the_link_is_faster():
    estimator = make(prior=1e8)
    token = estimator.begin(0.0, MBYTE)
    estimator.end(token, 1e-3 + MBYTE / 2e9)
    assert estimator.estimate(0.01).bytes_per_second == pytest.approx(2e9, rel=0.05)


def test_a_transfer_as_short_as_a_round_trip_still_bounds_the_rate_from_below():
    estimator = make(prior=1e8, rtt=2e-3)
    token = estimator.begin(0.0, 2 * MBYTE)
    estimator.end(token, 1.6e-3)
    assert estimator.estimate(0.01).bytes_per_second == pytest.approx(2 * MBYTE / 1.6e-3, rel=0.05)


def test_a_transfer_that_took_long_tells_that_the_link_is_slow():
    estimator = make(prior=1e9)
    now = transfers(estimator, [1e9] * 50, size=16 * MBYTE) + 7.0
    now = transfers(estimator, [2e7], size=256 << 10, now=now)
    assert estimator.estimate(now).bytes_per_second < 1e8


def test_small_objects_tell_the_round_trip_and_not_the_rate():
    estimator = make(prior=1e9, rtt=1e-3)
    now = transfers(estimator, [1e9] * 50)
    for index in range(50):
        token = estimator.begin(now, 8192)
        now += 0.02 + (0.5 if index % 10 == 0 else 0.0)  # some are stuck for long
        estimator.end(token, now)
    found = estimator.estimate(now)
    assert found.rtt_seconds == pytest.approx(0.02, rel=0.01)
    assert found.bytes_per_second == pytest.approx(1e9, rel=0.05)


def test_a_slow_link_with_short_transfers_is_measured_too():
    estimator = make(prior=1e9, rtt=1e-3)
    now = transfers(estimator, [1e6] * 50, size=60_000)
    assert estimator.estimate(now).bytes_per_second == pytest.approx(1e6, rel=0.05)


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=6), st.randoms())
def test_single_outliers_move_the_estimate_little(factors, random):
    estimator = make()
    rates = [1e8] * 120
    for factor in factors:
        rates[random.randrange(len(rates))] = 1e8 * factor
    now = 0.0
    for rate in rates:  # one transfer of each rate, eight in flight, a slow one holds up no other
        now = transfers(estimator, [1e8], concurrency=7, now=now)
        token = estimator.begin(now, MBYTE)
        now += min(MBYTE / rate, 0.5)
        estimator.end(token, now)
    found = estimator.estimate(now).bytes_per_second
    assert 0.6e8 < found < 1.5e8


@pytest.mark.parametrize("in_turn", [True, False], ids=["in turn", "side by side"])
@pytest.mark.parametrize("before", [1.0, 0.5, 4.0], ids=["as before", "faster", "slower"])
def test_the_first_of_several_ends_and_the_others_are_given_up(before, in_turn):
    """As after a look-up that tells that computing is faster: a request's reads are cancelled."""
    rate, size, num_reads = 6e6, 650_000, 4
    estimator = make(rtt=2e-3)
    now = transfers(estimator, [before * rate] * 20, size=size, rtt=2e-3) + 5.0
    tokens = [estimator.begin(now, size) for _ in range(num_reads)]
    took = (1 if in_turn else num_reads) * size / rate
    now += 2e-3 + took
    first, *others = tokens
    estimator.end(first, now)
    told = [estimator.estimate(now)]
    for token in others:
        estimator.end(token, now + 1e-3, ok=False)
    told.append(estimator.estimate(now + 1e-3))
    # The link did this much, and as much as if it had served all of them.
    slowest, fastest = 0.5 * size / took, 1.05 * num_reads * size / took
    for found in told:
        assert slowest < found.recent_bytes_per_second <= fastest
        assert min(slowest, before * rate) < found.bytes_per_second
        assert found.bytes_per_second <= max(fastest, before * rate)
        if before == 1.0:
            assert found.bytes_per_second == pytest.approx(rate, rel=0.05)
            assert found.recent_bytes_per_second == pytest.approx(rate, rel=0.05)


def test_a_lone_stalled_transfer_does_not_slow_the_link():
    estimator = make()
    stalled = estimator.begin(0.0, MBYTE)
    now = transfers(estimator, [1e9] * 400, concurrency=4)
    estimator.end(stalled, now)
    # Four share the link with one that takes nothing: what they reached is within their share.
    assert estimator.estimate(now).bytes_per_second > 0.6e9


def test_a_step_is_seen_at_once_by_the_recent_rate_and_later_by_the_long_one():
    estimator = make(half_life=1.0)
    now = transfers(estimator, [2e9] * 2000)
    before = estimator.estimate(now)
    now = transfers(estimator, [2e8] * 40, now=now)  # 0.2 s
    after = estimator.estimate(now)
    assert after.recent_bytes_per_second == pytest.approx(2e8, rel=0.1)
    assert 2e8 < after.bytes_per_second < before.bytes_per_second
    assert after.rate_for(MBYTE) < 0.5 * after.rate_for(10_000 * MBYTE)
    now = transfers(estimator, [2e8] * 800, now=now)  # 4 s more
    assert estimator.estimate(now).bytes_per_second == pytest.approx(2e8, rel=0.3)


def test_a_link_that_falls_silent_is_slow_before_anything_finishes():
    estimator = make()
    now = transfers(estimator, [1e9] * 400)
    for _ in range(4):
        estimator.begin(now, MBYTE)
    assert estimator.estimate(now + 0.002).recent_bytes_per_second > 5e8
    silent = estimator.estimate(now + 2.0)
    assert silent.recent_bytes_per_second < 1e7
    assert silent.rate_for(MBYTE) < 0.2e9
    assert silent.bytes_per_second == pytest.approx(1e9, rel=0.1)


def test_the_recent_rate_fades_and_the_spread_grows_with_time():
    estimator = make()
    now = transfers(estimator, [2e9] * 1000)
    now = transfers(estimator, [2e8] * 20, now=now)
    soon, later, old = (estimator.estimate(now + s) for s in (0.0, 2.0, 600.0))
    assert soon.recent_bytes_per_second < later.recent_bytes_per_second
    assert later.recent_bytes_per_second == pytest.approx(later.bytes_per_second, rel=0.01)
    assert old.high_bytes_per_second == 4 * soon.high_bytes_per_second
    assert old.low_bytes_per_second == soon.low_bytes_per_second / 4
    assert old.age_seconds == pytest.approx(600.0)


def test_failed_transfers_teach_nothing():
    estimator = make(prior=1e9)
    token = estimator.begin(0.0, MBYTE)
    estimator.end(token, 10.0, ok=False)
    assert estimator.estimate(10.0).num_transfers == 0
    assert estimator.num_in_flight == 0


def test_a_clock_that_stands_still_divides_nothing_by_zero():
    estimator = make(prior=1e9)
    estimator.end(estimator.begin(5.0, MBYTE), 5.0)
    assert estimator.estimate(5.0).bytes_per_second == 1e9


@given(
    st.lists(
        st.tuples(st.integers(1, 1 << 24), st.floats(1e-6, 5.0), st.booleans()),
        min_size=1,
        max_size=40,
    )
)
def test_any_history_gives_a_usable_estimate(history):
    estimator, now, tokens = make(), 0.0, []
    for size, seconds, ends in history:
        tokens.append(estimator.begin(now, size))
        now += seconds
        if ends:
            estimator.end(tokens.pop(0), now)
        found = estimator.estimate(now)
        assert 0 < found.low_bytes_per_second <= found.bytes_per_second
        assert found.bytes_per_second <= found.high_bytes_per_second < math.inf
        assert found.recent_bytes_per_second >= 0
        assert found.rate_for(1) > 0
        assert found.at_best().rate_for(1 << 30) == found.high_bytes_per_second


def test_estimates_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="low <= rate <= high"):
        LinkEstimate(1.0, 1.0, 2.0, 3.0, 0.0)


@pytest.mark.parametrize(("old", "new"), [(2.5e6, 6e8), (6e8, 2.5e6)])
def test_a_link_that_changed_while_it_was_idle_is_learnt_from_a_few_transfers(old, new):
    """Busy time alone would take the slow link's history for hours of the fast one's."""
    estimator = make(half_life=5.0)
    now = transfers(estimator, [old] * 30)
    for _ in range(10):
        now = transfers(estimator, [new], now=now + 2.0)
    assert estimator.estimate(now + 0.5).bytes_per_second == pytest.approx(new, rel=0.3)


def test_small_objects_after_a_pause_do_not_erase_what_is_known():
    estimator = make(prior=1e9)
    now = transfers(estimator, [2.5e6] * 30) + 120.0
    now = transfers(estimator, [2.5e6] * 5, size=8192, now=now)
    assert estimator.estimate(now).age_seconds > 100, "nor do they make it look fresh"
    assert estimator.estimate(now).bytes_per_second == pytest.approx(2.5e6, rel=0.1)


def test_a_slow_look_up_after_a_pause_says_nothing_of_the_link():
    estimator = make()
    now = transfers(estimator, [1e8] * 30)
    now = transfers(estimator, [1e6], size=32 << 10, now=now + 10.0)
    assert estimator.estimate(now).bytes_per_second == pytest.approx(1e8, rel=0.1)


def test_a_busy_link_keeps_its_history():
    estimator = make(half_life=5.0)
    now = transfers(estimator, [1e8] * 100)
    now = transfers(estimator, [1e9], now=now + 0.1)
    assert estimator.estimate(now + 0.5).bytes_per_second < 1.2e8


def test_a_fall_is_remembered_through_pauses_and_forgotten_by_and_by():
    estimator = make(prior=1e9)
    now = transfers(estimator, [1e9] * 200, rtt=0.0)
    assert estimator.estimate(now).fallen_to > 0.95
    now = transfers(estimator, [1e8] * 6, rtt=0.0, now=now)
    fell = estimator.estimate(now).fallen_to
    assert 0.1 < fell < 0.4
    now = transfers(estimator, [1e9] * 500, rtt=0.0, now=now + 20)
    later = estimator.estimate(now)
    assert later.bytes_per_second > 0.9e9
    assert later.fallen_to == pytest.approx(fell, rel=0.15)
    assert estimator.estimate(now + 600).fallen_to > 1.5 * fell
    assert estimator.estimate(now + 6000).fallen_to > 0.99


def test_a_moment_is_no_fall():
    estimator = make(prior=1e9)
    now = transfers(estimator, [1e9] * 100 + [1e8], rtt=0.0)  # 10 ms
    now = transfers(estimator, [1e9] * 100, rtt=0.0, now=now)
    assert estimator.estimate(now).fallen_to > 0.6
