"""Lines between the arena's owner and the connector."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.engines.connector import messages
from kvfetcher.errors import RequestError

KINDS = [kind for kind in messages._KINDS.values() if kind is not messages.Welcome]
WELCOME = messages.Welcome("a", "b", {"num_layers": 1}, 8, "", 0, 1.5)


@given(st.just(WELCOME) | st.sampled_from(KINDS).flatmap(st.from_type))
def test_line_round_trip(message):
    line = messages.to_line(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert messages.from_line(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x",
        b"[]",
        b"3",
        b"{}",
        b'{"kind": "nothing"}',
        b'{"kind": "copied"}',
        b'{"kind": "copied", "key": 3}',
        b'{"kind": "copied", "key": "a", "more": 1}',
        b'{"kind": "saved", "key": "a", "ok": 1}',
        b'{"kind": "saved", "key": "a", "ok": true, "reason": null}',
        b'{"kind": "room", "key": "a", "request_id": 1, "pool_blocks": ["x"], "arena_blocks": []}',
        b"[" * 100_000,
    ],
)
def test_anything_else_is_refused(line):
    with pytest.raises(RequestError, match="is not a known message"):
        messages.from_line(line)


@given(st.binary(max_size=200))
def test_bytes_never_do_more_than_that(line):
    with pytest.raises(RequestError):
        messages.from_line(line)
