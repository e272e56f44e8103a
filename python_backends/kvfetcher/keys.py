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
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfetcher.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY_BYTES = 32

_ROOT_LABEL = b"kvfetcher root 1\0"
_CHUNK_LABEL = b"kvfetcher chunk 1\0"


@dataclass(frozen=True, slots=True)
class ChunkKey:
    """One link of the chain.

    Attributes:
        parent: [32 bytes] key of the chunk before, or the root of the chain for index 0.
        key: [32 bytes] this chunk's key.
        index: position in the prompt, in chunks.
    """

    parent: bytes
    key: bytes
    index: int

    @property
    def name(self) -> str:
        """Object name in a store; see `object_name`."""
        return object_name(self.key)


def object_name(key: bytes) -> str:
    """Name of a chunk object: ``ab/cd/abcd...`` (lower-case hex).

    Two levels of folders keep every folder of a file store below a few thousand entries at
    hundreds of millions of chunks.

    Raises:
        ConfigError: `key` is not 32 bytes.
    """
    text = _checked("chunk key", key).hex()
    return f"{text[:2]}/{text[2:4]}/{text}"


def root_key(identity_digest: bytes, cache_salt: str = "") -> bytes:
    """Parent of the first chunk: 32 bytes that no other identity or salt yields.

    Raises:
        ConfigError: `identity_digest` is not 32 bytes.
        RequestError: `cache_salt` is not valid Unicode text.
    """
    try:
        salt = cache_salt.encode()
    except UnicodeEncodeError as exc:
        raise RequestError(
            f"cache_salt must be valid Unicode text, got {cache_salt!r}; lone surrogates have no"
            " UTF-8 form"
        ) from exc
    digest = hashlib.sha256(_ROOT_LABEL)
    for part in (_checked("identity digest", identity_digest), salt):
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
        cache_salt: the sender's salt; "" = shared by all who send none.

    Raises:
        ConfigError: `chunk_tokens` < 1, or the digest is not 32 bytes.
        RequestError: a token id is out of range, or the salt is not Unicode text.
    """
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens must be >= 1, got {chunk_tokens}")
    parent = root_key(identity_digest, cache_salt)
    keys = []
    for index in range(len(token_ids) // chunk_tokens):
        start = index * chunk_tokens
        key = next_key(parent, token_ids[start : start + chunk_tokens])
        keys.append(ChunkKey(parent=parent, key=key, index=index))
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


def _checked(what: str, data: bytes) -> bytes:
    if len(data) != KEY_BYTES:
        raise ConfigError(f"{what} must be {KEY_BYTES} bytes, got {len(data)}")
    return data
