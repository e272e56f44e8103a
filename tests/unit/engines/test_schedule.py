"""Slices, chunks and the line, as plain numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.engines.schedule import WaitingLine, slice_end
from kvfetcher.errors import EngineBusyError
from kvfetcher.memory.leases import chunks_to_save


def slices(start, prompt, step):
    result = []
    while start < prompt:
        end = slice_end(start, prompt, step)
        result.append((start, end))
        start = end
    return result


def test_slices_end_at_absolute_multiples():
    assert slices(0, 40, 16) == [(0, 16), (16, 32), (32, 40)]
    assert slices(20, 40, 16) == [(20, 32), (32, 40)]


@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 8))
def test_after_a_hit_the_slices_are_those_of_a_full_computation(prompt, step, hit):
    start = min(hit * step, prompt)
    assert slices(start, prompt, step) == [s for s in slices(0, prompt, step) if s[0] >= start]


@pytest.mark.parametrize(
    ("cached", "held", "expected"),
    [(0, 255, range(0)), (0, 256, range(1)), (256, 800, range(1, 3)), (300, 800, range(2, 3)),
     (511, 512, range(2, 2))],
)  # fmt: skip
def test_only_whole_chunks_computed_here_are_saved(cached, held, expected):
    got = chunks_to_save(cached_tokens=cached, tokens_with_kv=held, chunk_tokens=256)
    assert list(got) == list(expected)


def test_line_is_first_come_first_served_and_bounded():
    line = WaitingLine(max_running=2, max_waiting=1)
    for item in "abc":
        line.check_room(0)
        line.add(item)
    with pytest.raises(EngineBusyError, match="0 requests run and 3 wait"):
        line.check_room(0)
    assert line.admit(0) == ["a", "b"]
    assert line.admit(2) == []
    assert line.admit(1) == ["c"]
    line.add("d")
    assert line.clear() == ["d"]
    assert len(line) == 0
