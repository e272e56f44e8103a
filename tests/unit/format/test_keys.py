import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.errors import ConfigError, RequestError
from kvfetcher.format.keys import (
    chunk_keys,
    next_key,
    object_name,
    pack_token_ids,
    parse_object_name,
    root_key,
    scope_of,
    tenant_digits,
)
from kvfetcher.storage.base import check_name

IDENTITY = bytes(range(32))
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_keys_of_a_known_prompt_never_change():
    # Written down from the definition in keys.py: a change here orphans every stored chunk.
    root = hashlib.sha256(
        b"kvfetcher root 1\0" + struct.pack("<Q", 32) + IDENTITY + struct.pack("<Q", 4) + b"salt"
    ).digest()
    first = hashlib.sha256(
        b"kvfetcher chunk 1\0" + root + struct.pack("<Q", 2) + struct.pack("<2I", 7, 8)
    ).digest()
    second = hashlib.sha256(
        b"kvfetcher chunk 1\0" + first + struct.pack("<Q", 2) + struct.pack("<2I", 9, 2**32 - 1)
    ).digest()
    keys = chunk_keys([7, 8, 9, 2**32 - 1, 5], 2, IDENTITY, "salt")
    assert [(k.parent, k.key, k.index) for k in keys] == [(root, first, 0), (first, second, 1)]
    assert second.hex() == "6529505a5d2c3f1a99c0cd1da8f5e4397fe7a8deaad0360c19f3aa370e734d63"


def test_only_whole_chunks_have_keys():
    assert chunk_keys([], 4, IDENTITY) == []
    assert chunk_keys([1, 2, 3], 4, IDENTITY) == []
    assert len(chunk_keys(list(range(11)), 4, IDENTITY)) == 2


def test_numpy_tokens_give_the_same_keys():
    tokens = list(range(100))
    for dtype in (np.int32, np.int64, np.uint32):
        assert chunk_keys(np.array(tokens, dtype), 16, IDENTITY) == chunk_keys(tokens, 16, IDENTITY)


@given(TOKENS, TOKENS)
def test_prompts_share_keys_exactly_as_far_as_they_share_chunks(a, b):
    keys_a, keys_b = (chunk_keys(t, 4, IDENTITY, "s") for t in (a, b))
    shared = 0
    while (
        shared < min(len(keys_a), len(keys_b))
        and a[shared * 4 : shared * 4 + 4] == b[shared * 4 : shared * 4 + 4]
    ):
        shared += 1
    assert keys_a[:shared] == keys_b[:shared]
    later = {k.key for k in keys_a[shared:]} & {k.key for k in keys_b[shared:]}
    assert not later


@given(st.text(st.characters(exclude_categories=["Cs"])), st.binary(min_size=32, max_size=32))
def test_salt_or_identity_separates_tenants(salt, identity):
    here = root_key(identity, salt)
    assert (here == root_key(IDENTITY, "")) == (identity == IDENTITY and salt == "")
    assert here != root_key(identity, salt + "\0")


def test_a_root_is_no_chunk():
    assert root_key(IDENTITY, "") != next_key(IDENTITY, [])


def test_a_longer_chunk_is_another_chunk():
    assert next_key(IDENTITY, [1]) != next_key(IDENTITY, [1, 0])


@given(TOKENS)
def test_packed_tokens_are_little_endian_uint32(tokens):
    assert list(struct.unpack(f"<{len(tokens)}I", pack_token_ids(tokens))) == tokens


@pytest.mark.parametrize("token", [-1, 2**32, 1.5, "x", None])
def test_bad_token_is_refused(token):
    with pytest.raises(RequestError, match="token ids must be integers"):
        chunk_keys([1, token], 2, IDENTITY)


def test_bad_salt_is_refused():
    with pytest.raises(RequestError, match="valid Unicode"):
        chunk_keys([1], 1, IDENTITY, "\ud800")


def test_bad_chunk_size_or_identity_is_refused():
    with pytest.raises(ConfigError, match="chunk_tokens must be >= 1, got 0"):
        chunk_keys([1], 0, IDENTITY)
    with pytest.raises(ConfigError, match="identity digest must be 32 bytes, got 3"):
        chunk_keys([1], 1, b"abc")


def test_names_of_a_known_prompt_never_change():
    # As above: written down from the definition in keys.py.
    name = chunk_keys([7, 8], 2, IDENTITY, "salt")[0].name
    tenant = hashlib.sha256(b"kvfetcher tenant 1\0salt").hexdigest()[:16]
    key = chunk_keys([7, 8], 2, IDENTITY, "salt")[0].key.hex()
    assert name == f"0001020304050607/{tenant}/{key[:3]}/{key}"
    assert name == f"{scope_of(IDENTITY, 'salt')}/{key[:3]}/{key}"


@given(st.binary(min_size=32, max_size=32), st.sampled_from(["", "a", "b"]))
def test_a_name_tells_model_tenant_and_key(identity, salt):
    key = chunk_keys([1], 1, identity, salt)[0]
    parts = parse_object_name(check_name(key.name))
    assert (parts.key, parts.scope) == (key.key, key.scope)
    assert parts.model == identity.hex()[:16]
    assert parts.tenant == tenant_digits(salt)


def test_a_tenant_has_the_same_digits_with_every_model():
    assert scope_of(IDENTITY, "t").split("/")[1] == scope_of(bytes(32), "t").split("/")[1]
    assert len({tenant_digits(salt) for salt in ("", "t", "t\0")}) == 3


@pytest.mark.parametrize(
    "name",
    [
        "",
        "ab/cd/" + "abcd" * 16,
        f"{'0' * 16}/{'1' * 16}/abc/{'abc'.ljust(63, '0')}",
        f"{'0' * 16}/{'1' * 16}/abd/{'abc'.ljust(64, '0')}",
        f"{'0' * 16}/{'1' * 16}/abc/{'ABC'.ljust(64, '0')}",
        f"{'0' * 16}/{'1' * 16}/abc/{'abc'.ljust(64, '0')}\n",
    ],
)
def test_other_names_are_not_taken_for_chunks(name):
    assert parse_object_name(name) is None


def test_object_name_needs_a_whole_key():
    with pytest.raises(ConfigError, match="chunk key must be 32 bytes, got 3"):
        object_name("a/b", b"abc")
