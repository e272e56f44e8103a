"""The breaker: pure, so time is a number."""

import pytest

from kvfetcher.storage.breaker import Breaker


def make(**options):
    settings = {
        "window": 10,
        "min_failures": 3,
        "min_backoff_seconds": 1.0,
        "max_backoff_seconds": 8.0,
        "random": lambda: 1.0,
    }
    return Breaker(**settings | options)


def fail(breaker, times, now=0.0):
    for _ in range(times):
        breaker.failed(breaker.admit(now), now)


def test_a_few_failures_among_successes_do_not_open_it():
    breaker = make()
    for _ in range(10):
        breaker.succeeded(breaker.admit(0.0))
        breaker.succeeded(breaker.admit(0.0))
        breaker.failed(breaker.admit(0.0), 0.0)
    assert breaker.state == "closed"


def test_a_dead_store_opens_it_after_min_failures_and_nothing_passes():
    breaker = make()
    fail(breaker, 2)
    assert breaker.state == "closed"
    fail(breaker, 1)
    assert breaker.state == "open"
    assert breaker.admit(0.99) is None
    assert breaker.wait_seconds(0.25) == pytest.approx(0.75)


def test_half_of_the_window_failing_opens_it():
    breaker = make(window=6)
    for _ in range(2):
        breaker.succeeded(breaker.admit(0.0))
        breaker.failed(breaker.admit(0.0), 0.0)
    assert breaker.state == "closed"
    fail(breaker, 1)
    assert breaker.state == "open"


def test_one_probe_passes_and_its_success_closes():
    breaker = make()
    fail(breaker, 3)
    probe = breaker.admit(1.0)
    assert probe is not None
    assert (breaker.state, breaker.admit(1.0)) == ("half-open", None)
    breaker.succeeded(probe)
    assert breaker.state == "closed"
    fail(breaker, 2)
    assert breaker.state == "closed", "old failures are forgotten"


def test_a_failed_probe_doubles_the_back_off_up_to_the_limit():
    breaker, now, pauses = make(), 0.0, []
    fail(breaker, 3)
    for _ in range(5):
        pauses.append(breaker.wait_seconds(now))
        now += pauses[-1]
        breaker.failed(breaker.admit(now), now)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0]


def test_closing_starts_the_back_off_again():
    breaker = make()
    fail(breaker, 3)
    breaker.failed(breaker.admit(1.0), 1.0)
    breaker.succeeded(breaker.admit(3.0))
    fail(breaker, 3, now=4.0)
    assert breaker.wait_seconds(4.0) == 1.0


def test_back_off_is_jittered():
    early, late = make(random=lambda: 0.0), make(random=lambda: 1.0)
    for breaker in (early, late):
        fail(breaker, 3)
    assert (early.wait_seconds(0.0), late.wait_seconds(0.0)) == (0.5, 1.0)


def test_an_abandoned_probe_makes_room_for_the_next():
    breaker = make()
    fail(breaker, 3)
    breaker.abandoned(breaker.admit(1.0))
    assert breaker.state == "half-open"
    assert breaker.admit(1.0) is not None


def test_late_verdicts_of_calls_from_before_change_nothing():
    breaker = make()
    old = [breaker.admit(0.0) for _ in range(3)]
    fail(breaker, 3)
    probe = breaker.admit(1.0)
    breaker.succeeded(old[0])
    breaker.abandoned(old[1])
    assert (breaker.state, breaker.admit(1.0)) == ("half-open", None)
    breaker.failed(old[2], 1.0)
    assert breaker.state == "half-open"
    breaker.succeeded(probe)
    assert breaker.state == "closed"
