from kvfetcher.engines.streams import Streams


def test_a_running_answer_can_be_cancelled_by_name_once_it_is_over_not():
    streams = Streams()
    with streams.open() as (first, first_gone), streams.open() as (second, second_gone):
        assert first != second
        assert streams.cancel(first)
        assert first_gone.is_set()
        assert not second_gone.is_set()
    assert not streams.cancel(first)
    assert not streams.cancel("never was")


def test_what_runs_elsewhere_is_remembered_as_cancelled_for_a_while():
    streams = Streams()
    assert not streams.was_cancelled("a fetch")
    assert not streams.cancel("a fetch")
    assert streams.was_cancelled("a fetch")
    with streams.open() as (stream_id, _):
        streams.cancel(stream_id)
        assert not streams.was_cancelled(stream_id)
    for number in range(5000):
        streams.cancel(f"later {number}")
    assert not streams.was_cancelled("a fetch"), "memory is bounded"
