"""Small chunk objects with real headers and digests, for tests of what stores hold."""

from __future__ import annotations

import hashlib

from kvfetcher.format.container import UnitData, build_chunk
from kvfetcher.format.keys import chunk_keys
from kvfetcher.spec import KVSpec

CHUNK_TOKENS = 4
IDENTITY = bytes(range(32))
SPEC = KVSpec(num_layers=2, num_kv_heads=1, head_dim=4, kv_factor=2, dtype="bfloat16")


def chain(token_ids, *, salt="", identity=IDENTITY, unit_bytes=100) -> dict[str, bytes]:
    """The chunks of a prompt, first to last: object name -> bytes (units are no video)."""
    objects = {}
    for key in chunk_keys(token_ids, CHUNK_TOKENS, identity, salt):
        first = key.index * CHUNK_TOKENS
        noise = hashlib.sha256(key.key).digest() * (unit_bytes // 32 + 1)
        objects[key.name] = build_chunk(
            [UnitData(layer, 1, "-", noise[:unit_bytes]) for layer in range(2)],
            spec=SPEC,
            profile="exact/1",
            identity=identity,
            chunk_key=key.key,
            parent_key=key.parent,
            first_position=first,
            token_ids=token_ids[first : first + CHUNK_TOKENS],
        )
    return objects
