"""Permits: only what was sealed here, for this, with these facts, and still holds, is opened."""

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.errors import ConfigError, PermissionDeniedError
from kvfetcher.memory import permits as module
from kvfetcher.memory.permits import KEY_NAME, Permits, run_key

KEY = bytes(range(32))


@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.binary(max_size=8)))
def test_what_was_sealed_is_opened(text, besides):
    permits = Permits(KEY)
    assert permits.open("read", permits.seal("read", text, *besides), *besides) == text


def test_nothing_else_is_opened():
    permits = Permits(KEY)
    sealed = permits.seal("read", "text", b"ab", b"c")
    refused = [
        ("write", sealed, (b"ab", b"c")),
        ("read", sealed, (b"a", b"bc")),  # the same bytes, cut elsewhere
        ("read", sealed, (b"ab",)),
        ("read", sealed, (b"ab", b"c", b"")),
        ("read", sealed + " ", (b"ab", b"c")),
        ("read", sealed.replace("text", "\ud800"), (b"ab", b"c")),
        ("read", "0" + sealed, (b"ab", b"c")),
        ("read", sealed.upper(), (b"ab", b"c")),
        ("read", "", (b"ab", b"c")),
    ]
    for position in range(0, len(sealed) - 5, 7):  # each part of the permit, changed
        other = "0" if sealed[position] != "0" else "1"
        refused.append(("read", sealed[:position] + other + sealed[position + 1 :], (b"ab", b"c")))
    texts = set()
    for right, text, besides in refused:
        with pytest.raises(PermissionDeniedError) as told:
            permits.open(right, text, *besides)
        texts.add(str(told.value))
    assert len(texts) == 1, "one text, whatever is wrong"
    with pytest.raises(PermissionDeniedError):
        Permits(KEY[::-1]).open("read", sealed, b"ab", b"c")
    assert permits.open("read", sealed, b"ab", b"c") == "text"


def test_a_permit_ends():
    now = [100.0]
    permits = Permits(KEY, clock=lambda: now[0])
    sealed, default = permits.seal("save", "x", expires_at=110.0), permits.seal("save", "x")
    now[0] = 109.9
    assert permits.open("save", sealed) == "x"
    now[0] = 110.1
    with pytest.raises(PermissionDeniedError):
        permits.open("save", sealed)
    assert permits.open("save", default) == "x"


def test_what_holds_once_holds_once_and_is_forgotten_when_it_is_over(monkeypatch):
    now = [100.0]
    permits = Permits(KEY, clock=lambda: now[0])
    sealed = permits.seal("save", "x", expires_at=110.0)
    assert permits.open("save", sealed, once=True) == "x"
    for _ in range(2):
        with pytest.raises(PermissionDeniedError):
            permits.open("save", sealed, once=True)
    now[0] = 111.0
    permits.open("save", permits.seal("save", "x"), once=True)
    assert len(permits._used) == 1
    monkeypatch.setattr(module, "_MAX_USED", 1)
    with pytest.raises(PermissionDeniedError):  # full: it refuses, and forgets nothing
        permits.open("save", permits.seal("save", "x"), once=True)


def test_a_tenants_name_needs_the_key():
    assert Permits(KEY).tenant("salt") == Permits(KEY).tenant("salt")
    assert len({Permits(KEY).tenant("a"), Permits(KEY).tenant("b"), Permits(b"k").tenant("a")}) == 3


def test_one_run_has_one_key_that_its_user_alone_reads(tmp_path):
    key = run_key(tmp_path)
    assert len(key) == 32
    assert run_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / KEY_NAME).stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == [KEY_NAME]
    other = tmp_path / "other"
    other.mkdir()
    assert run_key(other) != key


def test_two_processes_that_come_first_get_the_same_key(tmp_path, monkeypatch):
    """Whoever comes second finds the first one's key, though neither saw it before."""
    theirs = run_key(tmp_path)
    module._make_key(tmp_path / KEY_NAME)
    assert run_key(tmp_path) == theirs


def test_a_key_that_others_can_read_or_that_is_none_is_refused(tmp_path):
    run_key(tmp_path)
    path = tmp_path / KEY_NAME
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="only you can read"):
        run_key(tmp_path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="must be 32 bytes"):
        run_key(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="cannot be made or read"):
        run_key(tmp_path)
