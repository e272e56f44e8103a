import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.storage.spans import UNBOUNDED, Span, cover, join, span_of_answer

A, B, C = Span(0, 10, False), Span(10, 20, False), Span(15, 30, True)


@pytest.mark.parametrize(
    ("spans", "start", "end", "expected"),
    [
        ([A], 0, 10, [A]),
        ([A], 3, 7, [A]),
        ([A], 3, 11, None),
        ([A, B], 3, 11, [A, B]),
        ([A, C], 3, 16, None),
        ([A, B, C], 3, 25, [A, B, C]),
        ([A, B, C], 3, 1000, [A, B, C]),
        ([A, B, C], 3, UNBOUNDED, [A, B, C]),
        ([A, B], 3, UNBOUNDED, None),
        ([A, Span(2, 12, False), B], 0, 12, [A, B]),
        ([Span(0, 12, False), A, B], 0, 12, [Span(0, 12, False)]),
        ([C], 30, 40, []),
        ([C], 50, 60, []),
        ([B], 50, 60, None),
        ([Span(0, 0, True)], 0, 5, []),
        ([], 0, 1, None),
    ],
)
def test_a_read_is_covered_by_the_fewest_parts(spans, start, end, expected):
    assert cover(spans, start, end) == expected


@given(
    st.binary(max_size=60),
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), max_size=8),
    st.integers(0, 70),
    st.integers(1, 90),
)
def test_parts_answer_as_the_object_would_or_not_at_all(data, reads, start, length):
    parts = {}
    for begin, size in reads:
        answer = data[begin : begin + size]
        span = span_of_answer(begin, begin + size, len(answer))
        if answer or not begin:  # an empty answer does not tell where the object ends
            parts[span] = answer
    spans = cover(parts, start, start + length)
    if spans is None:
        return
    found = join([(s, parts[s]) for s in spans], start, start + length) if spans else b""
    assert found == data[start : start + length]
