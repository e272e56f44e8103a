r"""Token ids -> chained chunk keys.

A chunk's key names its content by everything the content depends on: the identity of the model,
codec and chunk size (``ModelIdentity.digest``), the sender's ``cache_salt``, and every token from
the start of the prompt to the end of the chunk.

    root    = SHA-256("kvfetcher root 1\0"  || u64(len(identity)) || identity
                                            || u64(len(salt)) || salt as UTF-8)
    key_i   = SHA-256("kvfetcher chunk 1\0" || parent_i || u64(num_tokens) || token ids as u32)
    parent_0 = root, parent_i = key_(i-1)

All integers are little-endian. The lengths keep two (identity, salt) pairs from meaning the same
bytes, and the leading labels keep a root from being mistaken for a chunk. Two tenants with
different salts share no key; a reader compares the token ids too (a key is a name, not a proof).

Objects of a store are named so that whatever belongs to one model or one tenant can be listed (and
purged) by the start of its name, without reading it:

    name   = model "/" tenant "/" first 3 digits of the key "/" key         all lower-case hex
    model  = first 16 digits of the identity
    tenant = first 16 digits of SHA-256("kvfetcher tenant 1\0" || salt as UTF-8)

A tenant's digits do not depend on the model. They hide a salt only as far as it is hard to guess,
as the root of its chains does.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvfetcher.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY_BYTES = 32

_ROOT_LABEL = b"kvfetcher root 1\0"
_CHUNK_LABEL = b"kvfetcher chunk 1\0"
_TENANT_LABEL = b"kvfetcher tenant 1\0"
_SCOPE_DIGITS = 16
_FOLDER_DIGITS = 3
_NAME = re.compile(
    rf"(?P<model>[0-9a-f]{{{_SCOPE_DIGITS}}})/(?P<tenant>[0-9a-f]{{{_SCOPE_DIGITS}}})"
    rf"/(?P<folder>[0-9a-f]{{{_FOLDER_DIGITS}}})/(?P<key>(?P=folder)[0-9a-f]{{{2 * KEY_BYTES - _FOLDER_DIGITS}}})"
)


@dataclass(frozen=True, slots=True)
class ChunkKey:
    """One link of the chain.

    Attributes:
        parent: [32 bytes] key of the chunk before, or the root of the chain for index 0.
        key: [32 bytes] this chunk's key.
        index: position in the prompt, in chunks.
        scope: whose chunk it is, ``model/tenant``; see `scope_of`.
    """

    parent: bytes
    key: bytes
    index: int
    scope: str

    @property
    def name(self) -> str:
        """Object name in a store; see `object_name`."""
        return object_name(self.scope, self.key)


class NameParts(NamedTuple):
    """What the name of a chunk object tells."""

    model: str
    tenant: str
    key: bytes

    @property
    def scope(self) -> str:
        return f"{self.model}/{self.tenant}"


def model_digits(identity_digest: bytes) -> str:
    """The first segment of the names of one model's chunks (one model, codec and chunk size).

    Raises:
        ConfigError: `identity_digest` is not 32 bytes.
    """
    return _checked("identity digest", identity_digest).hex()[:_SCOPE_DIGITS]


def tenant_digits(cache_salt: str) -> str:
    """The second segment of the names of one tenant's chunks.

    Raises:
        RequestError: `cache_salt` is not valid Unicode text.

    Example:
        >>> tenant_digits("alice")
        '4a0e45f4cf986375'
    """
    return hashlib.sha256(_TENANT_LABEL + _salt_bytes(cache_salt)).hexdigest()[:_SCOPE_DIGITS]


def scope_of(identity_digest: bytes, cache_salt: str = "") -> str:
    """``model/tenant``: what the names of all chunks of one model and one tenant start with.

    Raises:
        ConfigError: `identity_digest` is not 32 bytes.
        RequestError: `cache_salt` is not valid Unicode text.
    """
    return f"{model_digits(identity_digest)}/{tenant_digits(cache_salt)}"


def object_name(scope: str, key: bytes) -> str:
    """Name of a chunk object: ``model/tenant/abc/abc...``. Exact inverse: `parse_object_name`.

    4096 folders per scope keep every folder of a file store below some ten thousand entries at a
    hundred million chunks of one tenant, without a folder per chunk for small tenants.

    Raises:
        ConfigError: `key` is not 32 bytes.

    Example:
        >>> object_name("0011223344556677/8899aabbccddeeff", bytes(32))
        '0011223344556677/8899aabbccddeeff/000/0000000000000000000000000000000000000000000000000000000000000000'
    """
    text = _checked("chunk key", key).hex()
    return f"{scope}/{text[:_FOLDER_DIGITS]}/{text}"


def parse_object_name(name: str) -> NameParts | None:
    """What the name of a chunk object tells; None where it is not the name of one.

    Example:
        >>> name = object_name("0011223344556677/8899aabbccddeeff", bytes(32))
        >>> parse_object_name(name).tenant
        '8899aabbccddeeff'
        >>> parse_object_name("something/else") is None
        True
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return NameParts(match["model"], match["tenant"], bytes.fromhex(match["key"]))


def root_key(identity_digest: bytes, cache_salt: str = "") -> bytes:
    """Parent of the first chunk: 32 bytes that no other identity or salt yields.

    Raises:
        ConfigError: `identity_digest` is not 32 bytes.
        RequestError: `cache_salt` is not valid Unicode text.
    """
    digest = hashlib.sha256(_ROOT_LABEL)
    for part in (_checked("identity digest", identity_digest), _salt_bytes(cache_salt)):
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.digest()


def next_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of the chunk that holds `token_ids` and follows `parent`.

    Raises:
        RequestError: a token id is not an integer from 0 to 2**32 - 1.
    """
    return hashlib.sha256(
        _CHUNK_LABEL
        + _checked("parent key", parent)
        + struct.pack("<Q", len(token_ids))
        + pack_token_ids(token_ids)
    ).digest()


def chunk_keys(
    token_ids: Sequence[int], chunk_tokens: int, identity_digest: bytes, cache_salt: str = ""
) -> list[ChunkKey]:
    """Keys of the whole chunks of a prompt, first to last; tokens after the last are left out.

    Args:
        token_ids: the prompt (a sequence of int, or a one-dimensional integer array).
        chunk_tokens: tokens of one chunk.
        identity_digest: [32 bytes] ``ModelIdentity.digest``.
        cache_salt: the sender's salt; "" = shared by all requests without one.

    Raises:
        ConfigError: `chunk_tokens` < 1, or the digest is not 32 bytes.
        RequestError: a token id is out of range, or the salt is not Unicode text.

    Example:
        >>> keys = chunk_keys(range(600), 256, bytes(32))
        >>> [key.index for key in keys], keys[1].parent == keys[0].key
        ([0, 1], True)
        >>> keys[0].key == chunk_keys(range(300), 256, bytes(32))[0].key
        True
        >>> keys[0].key == chunk_keys(range(600), 256, bytes(32), "another salt")[0].key
        False
    """
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens must be >= 1, got {chunk_tokens}")
    parent = root_key(identity_digest, cache_salt)
    scope = scope_of(identity_digest, cache_salt)
    keys = []
    for index in range(len(token_ids) // chunk_tokens):
        start = index * chunk_tokens
        key = next_key(parent, token_ids[start : start + chunk_tokens])
        keys.append(ChunkKey(parent=parent, key=key, index=index, scope=scope))
        parent = key
    return keys


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32, the form that keys cover.

    Raises:
        RequestError: a token id is not an integer from 0 to 2**32 - 1.
    """
    try:
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    except struct.error as exc:
        raise RequestError(f"token ids must be integers from 0 to 2**32 - 1: {exc}") from exc


def _salt_bytes(cache_salt: str) -> bytes:
    try:
        return cache_salt.encode()
    except UnicodeEncodeError as exc:
        raise RequestError(
            f"cache_salt must be valid Unicode text, got {cache_salt!r}; lone surrogates have no"
            " UTF-8 form"
        ) from exc


def _checked(what: str, data: bytes) -> bytes:
    if len(data) != KEY_BYTES:
        raise ConfigError(f"{what} must be {KEY_BYTES} bytes, got {len(data)}")
    return data
