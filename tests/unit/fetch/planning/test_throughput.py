import pytest

from kvfetcher.fetch.planning.throughput import DecodeThroughput, Stretch


def run(decoders, ends, *, waiting):
    """Units that end at `ends`, each predicted at 1 s, while `waiting` more are there; what is told."""
    for _ in range(len(ends) + waiting):
        decoders.begin()
    return [found for now in ends if (found := decoders.end(1.0, now)) is not None]


def test_a_busy_stretch_is_told_with_what_was_predicted_of_it():
    # Two decoders: two units a second predicted; one a second leaves.
    found = run(DecodeThroughput(2), [float(now) for now in range(9)], waiting=2)
    assert found == [Stretch(2.0, 4.0), Stretch(2.0, 4.0)]


def test_ends_in_bursts_count_by_their_stretch():
    ends = [0.0, 1.9, 2.0, 3.9, 4.0]
    (found,) = run(DecodeThroughput(2), ends, waiting=2)
    assert found.actual_seconds / found.predicted_seconds == pytest.approx(2.0)


def test_idle_decoders_say_nothing():
    decoders = DecodeThroughput(2)
    for now in range(20):
        decoders.begin()
        assert decoders.end(1.0, float(now)) is None
        assert not decoders.is_saturated


def test_a_gap_or_a_failure_starts_anew():
    decoders = DecodeThroughput(1)
    assert run(decoders, [0.0], waiting=1) == []
    assert decoders.is_saturated
    decoders.drop()  # nothing is inside now
    assert not decoders.is_saturated
    # The time without work is in no stretch.
    assert run(decoders, [100.0, 101.0, 102.0], waiting=1) == [Stretch(2.0, 2.0)]
