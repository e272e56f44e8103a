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
