"""Which pool block belongs to whom: allocation, sharing of equal prefixes, and reuse after the end.

Full blocks are named by the hash chain of their tokens. A block that nobody holds stays findable until
it is needed for something else (least recently freed first). Pure bookkeeping: no tensors, no I/O.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence


def block_hashes(token_ids: Sequence[int], tokens_per_block: int, salt: str = "") -> list[bytes]:
    """SHA-256 chain over the full blocks of a sequence; different salts share nothing."""
    parent = hashlib.sha256(b"paged blocks\0" + salt.encode()).digest()
    hashes = []
    for first in range(0, len(token_ids) // tokens_per_block * tokens_per_block, tokens_per_block):
        block = np.asarray(token_ids[first : first + tokens_per_block], dtype="<i4")
        parent = hashlib.sha256(parent + block.tobytes()).digest()
        hashes.append(parent)
    return hashes


@dataclass(slots=True)
class BlockPool:
    """`num_blocks` blocks with reference counts. Not thread-safe."""

    num_blocks: int
    reuse: bool
    """Off = nothing is found again."""
    _unused: list[int] = field(init=False)
    _cached: OrderedDict[int, bytes] = field(init=False, default_factory=OrderedDict)
    _held: dict[int, int] = field(init=False, default_factory=dict)
    _by_hash: dict[bytes, int] = field(init=False, default_factory=dict)
    _hash_of: dict[int, bytes] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._unused = list(range(self.num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._unused) + len(self._cached)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix; the caller now holds them."""
        found: list[int] = []
        for digest in hashes if self.reuse else ():
            block = self._by_hash.get(digest)
            if block is None:
                break
            found.append(block)
        for block in found:
            self._cached.pop(block, None)
            self._held[block] = self._held.get(block, 0) + 1
        return found

    def allocate(self, number: int) -> list[int]:
        """Fresh blocks, held by the caller.

        Raises:
            EngineError: too few are free.
        """
        if number > self.num_free:
            raise EngineError(
                f"{number} KV blocks are needed, {self.num_free} of {self.num_blocks} are free"
            )
        taken = []
        for _ in range(number):
            if self._unused:
                block = self._unused.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._held[block] = 1
            taken.append(block)
        return taken

    def store(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Say what full blocks hold, so that `find` finds them. A known hash keeps its block."""
        if self.reuse:
            for block, digest in zip(blocks, hashes, strict=False):
                if digest not in self._by_hash and block not in self._hash_of:
                    self._by_hash[digest] = block
                    self._hash_of[block] = digest

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of blocks held."""
        for block in reversed(blocks):  # the end of a prefix is evicted before its beginning
            left = self._held[block] - 1
            if left:
                self._held[block] = left
                continue
            del self._held[block]
            if block in self._hash_of:
                self._cached[block] = self._hash_of[block]
            else:
                self._unused.append(block)

    def _forget(self, block: int) -> None:
        del self._by_hash[self._hash_of.pop(block)]
