"""Who may use which arena blocks: a table of leases. Time is passed in; no I/O, no clock.

A lease goes ``open`` (its holder fills the blocks) -> ``sealed`` (the blocks hold the KV of known
tokens) -> ``claimed`` (the engine copies them) -> gone. `release` ends it. One that is
open or sealed ends by itself when its time is over; a claimed one does not, because the process that
claimed it owns the table too.

Several requests may hold one sealed lease, because its blocks are only read: `seal` and `share` say
how many, each claims and releases for itself, and the last one out frees the blocks.

The writer of an open lease sits in another process and cannot be stopped. Blocks of an open lease
that expired or was abandoned are therefore *resting* for as long again as the lease was meant to
live before anybody else gets them: a restore that comes late writes into memory nobody reads. A
holder calls `release` on an open lease only when no writer is left, `abandon` otherwise.

All methods are thread-safe (the control server and the engine thread share one table).
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvfetcher.errors import ArenaFullError, LeaseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvfetcher.memory.arena import BlockTarget

LeaseState = Literal["open", "sealed", "claimed"]

MAX_TTL_SECONDS = 86400.0


def tokens_digest(token_ids: Sequence[int] | NDArray[Any]) -> str:
    """SHA-256, hex, over the ids as little-endian int32: what a sealed lease says it holds."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i4").tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease as its holder sees it. ``block_ids`` hold ``num_tokens`` tokens, in order."""

    id: str
    block_ids: tuple[int, ...]
    num_tokens: int
    state: LeaseState
    tokens_digest: str
    """"" until sealed."""
    expires_at: float
    """Seconds on the clock of the table's caller."""


@dataclass(frozen=True, slots=True)
class LeaseClaim:
    """What a request carries (`kv_lease`): the first `num_tokens` tokens lie in this sealed lease."""

    lease_id: str
    num_tokens: int
    generation: str
    """Generation of the arena, so that a claim does not outlive an engine restart."""

    def to_json(self) -> str:
        return json.dumps(
            {
                "lease_id": self.lease_id,
                "num_tokens": self.num_tokens,
                "generation": self.generation,
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> LeaseClaim | None:
        """Parse; "" is None (no lease).

        Raises:
            LeaseError: the text is not a claim.
        """
        if not text:
            return None
        try:
            data = json.loads(text)
            claim = cls(**data)
        except (ValueError, TypeError, RecursionError) as exc:
            raise LeaseError(f"kv_lease must be a lease claim as JSON, got {text[:80]!r}") from exc
        if (
            not isinstance(claim.lease_id, str)
            or not isinstance(claim.generation, str)
            or type(claim.num_tokens) is not int
            or claim.num_tokens < 1
        ):
            raise LeaseError(f"kv_lease has a field of the wrong type or range: {text[:160]!r}")
        return claim


@dataclass(slots=True)
class _Entry:
    block_ids: tuple[int, ...]
    num_tokens: int
    ttl_seconds: float
    expires_at: float
    is_open: bool = True
    digest: str = ""
    unclaimed: int = 1
    """Holders that have not claimed it."""
    claims: int = 0
    """Holders that read it now."""

    @property
    def state(self) -> LeaseState:
        if self.is_open:
            return "open"
        return "sealed" if self.unclaimed else "claimed"


@dataclass(slots=True)
class _Resting:
    block_ids: tuple[int, ...]
    until: float


@dataclass(slots=True)
class LeaseCounts:
    """Totals since the start, for metrics."""

    leased: int = 0
    sealed: int = 0
    claimed: int = 0
    released: int = 0
    expired: int = 0
    abandoned: int = 0
    refused_full: int = 0


@dataclass(slots=True)
class LeaseTable:
    """Leases over `num_blocks` blocks of `tokens_per_block` tokens."""

    num_blocks: int
    tokens_per_block: int
    counts: LeaseCounts = field(default_factory=LeaseCounts)
    _free: list[int] = field(init=False)
    _entries: dict[str, _Entry] = field(init=False, default_factory=dict)
    _resting: list[_Resting] = field(init=False, default_factory=list)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        # Last in, first out: blocks just given back are warm in the CPU's caches.
        self._free = list(range(self.num_blocks - 1, -1, -1))

    def lease(self, num_tokens: int, ttl_seconds: float, *, now: float) -> Lease:
        """Take blocks for `num_tokens` tokens, for at most `ttl_seconds` until claimed.

        Raises:
            ArenaFullError: too few free blocks.
            LeaseError: `num_tokens` < 1, or `ttl_seconds` not within (0, MAX_TTL_SECONDS].
        """
        if num_tokens < 1 or not 0 < ttl_seconds <= MAX_TTL_SECONDS:
            raise LeaseError(
                f"a lease is for at least 1 token and 0 to {MAX_TTL_SECONDS:.0f} seconds, got"
                f" {num_tokens} tokens, {ttl_seconds} seconds"
            )
        needed = -(-num_tokens // self.tokens_per_block)
        with self._lock:
            self._expire(now)
            if needed > len(self._free):
                self.counts.refused_full += 1
                raise ArenaFullError(
                    f"{num_tokens} tokens need {needed} arena blocks, {len(self._free)} of"
                    f" {self.num_blocks} are free; try again later or raise engine.arena_bytes"
                )
            ids = tuple(self._free[-needed:][::-1])
            del self._free[-needed:]
            lease_id = secrets.token_hex(16)
            entry = _Entry(ids, num_tokens, ttl_seconds, now + ttl_seconds)
            self._entries[lease_id] = entry
            self.counts.leased += 1
            return _view(lease_id, entry)

    def seal(
        self,
        lease_id: str,
        num_tokens: int,
        digest: str,
        *,
        now: float,
        num_holders: int = 1,
        tail_is_live: bool = False,
    ) -> Lease:
        """Say that the first `num_tokens` tokens are filled, and of which tokens they are.

        A lease may be sealed with fewer tokens than leased: the blocks behind are given back.
        The time to live starts again.

        Args:
            lease_id: an open one.
            num_tokens: filled from the start on.
            digest: `tokens_digest` of them.
            now: seconds.
            num_holders: number of holders that will claim it (or release it unclaimed), >= 1.
            tail_is_live: somebody may still write to the blocks behind: they rest before reuse.

        Raises:
            LeaseError: unknown, expired, not open, or a number is out of its range.
        """
        with self._lock:
            self._expire(now)
            entry = self._get(lease_id, "open", "seal")
            if not 1 <= num_tokens <= entry.num_tokens:
                raise LeaseError(
                    f"lease {lease_id} is for 1 to {entry.num_tokens} tokens, sealed with"
                    f" {num_tokens}"
                )
            if num_holders < 1:
                raise LeaseError(f"lease {lease_id} needs at least 1 holder, got {num_holders}")
            used = -(-num_tokens // self.tokens_per_block)
            tail = entry.block_ids[used:]
            if tail_is_live and tail:
                self._resting.append(_Resting(tail, now + entry.ttl_seconds))
            else:
                self._free.extend(tail)
            entry.block_ids, entry.num_tokens = entry.block_ids[:used], num_tokens
            entry.is_open, entry.digest = False, digest
            entry.unclaimed = num_holders
            entry.expires_at = now + entry.ttl_seconds
            self.counts.sealed += 1
            return _view(lease_id, entry)

    def share(self, lease_id: str, *, now: float) -> Lease:
        """One more holder of a lease that is sealed or being read. Its time starts again.

        Raises:
            LeaseError: unknown, already gone, or still open.
        """
        with self._lock:
            self._expire(now)
            entry = self._get(lease_id, None, "share")
            if entry.is_open:
                raise LeaseError(f"cannot share lease {lease_id}: it is open, not sealed")
            entry.unclaimed += 1
            entry.expires_at = now + entry.ttl_seconds
            return _view(lease_id, entry)

    def claim(self, lease_id: str, *, now: float) -> Lease:
        """Take a sealed lease for reading, as one of its holders; a claim does not expire.

        Raises:
            LeaseError: unknown, expired, or not sealed.
        """
        with self._lock:
            self._expire(now)
            entry = self._get(lease_id, "sealed", "claim")
            entry.unclaimed -= 1
            entry.claims += 1
            self.counts.claimed += 1
            return _view(lease_id, entry)

    def renew(self, lease_id: str, *, now: float) -> Lease:
        """Start an open or sealed lease's time to live again.

        Also the proof of who reads a sealed lease from another process: it copies first and renews
        (or releases) after; when that succeeds the blocks were the lease's own all the while.

        Raises:
            LeaseError: unknown or already gone.
        """
        with self._lock:
            self._expire(now)
            entry = self._get(lease_id, None, "renew")
            entry.expires_at = now + entry.ttl_seconds
            return _view(lease_id, entry)

    def release(self, lease_id: str, *, now: float, is_claimer: bool = False) -> None:
        """End one holder's part; the last one gives the blocks back at once.

        The holder of an open lease vouches that nobody writes its blocks any more.

        Args:
            lease_id: in any state; one whose holders have all claimed only with `is_claimer`, since
                its blocks are being read.
            now: seconds.
            is_claimer: the caller is the engine, which claimed it.

        Raises:
            LeaseError: unknown, already gone, or claimed by others.
        """
        with self._lock:
            self._expire(now)
            entry = self._get(lease_id, None, "release")
            if is_claimer and entry.claims:
                entry.claims -= 1
            elif entry.unclaimed:
                entry.unclaimed -= 1
            else:
                raise LeaseError(f"lease {lease_id} is claimed; only its claimer releases it")
            self.counts.released += 1
            if not entry.unclaimed and not entry.claims:
                del self._entries[lease_id]
                self._free.extend(reversed(entry.block_ids))

    def abandon(self, lease_id: str, *, now: float) -> None:
        """Give up an open lease whose writers may still run: its blocks rest before reuse.

        The blocks of a sealed lease, which nobody writes, are free at once, as after `release`.

        Raises:
            LeaseError: unknown, already gone, or claimed.
        """
        with self._lock:
            self._expire(now)
            entry = self._get(lease_id, None, "abandon")
            if not entry.unclaimed:
                raise LeaseError(f"lease {lease_id} is claimed; only its claimer releases it")
            self.counts.abandoned += 1
            entry.unclaimed -= 1
            if not entry.unclaimed and not entry.claims:
                self._end(lease_id, entry, now)

    def expire(self, now: float) -> int:
        """End what is over. Every other method does so first; this one is for a timer.

        Returns:
            How many leases ended.
        """
        with self._lock:
            return self._expire(now)

    def usage(self) -> dict[str, int]:
        """Blocks by state, for metrics: total, free, open, sealed, claimed, resting."""
        with self._lock:
            result = {"total": self.num_blocks, "free": len(self._free)}
            for state in ("open", "sealed", "claimed"):
                result[state] = sum(
                    len(e.block_ids) for e in self._entries.values() if e.state == state
                )
            result["resting"] = sum(len(r.block_ids) for r in self._resting)
            return result

    def _get(self, lease_id: str, state: LeaseState | None, verb: str) -> _Entry:
        entry = self._entries.get(lease_id)
        if entry is None:
            raise LeaseError(
                f"cannot {verb} lease {lease_id!r}: unknown, expired or released; lease again"
            )
        if state is not None and entry.state != state:
            raise LeaseError(f"cannot {verb} lease {lease_id}: it is {entry.state}, not {state}")
        return entry

    def _expire(self, now: float) -> int:
        over = [
            (lease_id, entry)
            for lease_id, entry in self._entries.items()
            if entry.unclaimed and entry.expires_at <= now
        ]
        for lease_id, entry in over:
            entry.unclaimed = 0
            if not entry.claims:  # else it is still being read
                # The rest counts from when it ended, not from when somebody noticed.
                self._end(lease_id, entry, entry.expires_at)
        self.counts.expired += len(over)
        rested = [r for r in self._resting if r.until <= now]
        if rested:
            self._resting = [r for r in self._resting if r.until > now]
            for resting in rested:
                self._free.extend(resting.block_ids)
        return len(over)

    def _end(self, lease_id: str, entry: _Entry, ended_at: float) -> None:
        del self._entries[lease_id]
        if entry.is_open:
            self._resting.append(_Resting(entry.block_ids, ended_at + entry.ttl_seconds))
        else:
            self._free.extend(entry.block_ids)


def _view(lease_id: str, entry: _Entry) -> Lease:
    return Lease(
        lease_id, entry.block_ids, entry.num_tokens, entry.state, entry.digest, entry.expires_at
    )


@dataclass(frozen=True, slots=True)
class SaveTicket:
    """KV ready to be encoded and stored: it lies sealed in the arena until the saver lets go.

    The saver copies a chunk out, calls ``ControlClient.renew(lease_id)`` and only when that
    succeeds uses the copy; it calls ``release(lease_id)`` when done.
    """

    lease_id: str
    targets: tuple[BlockTarget, ...]
    """One per chunk, in order."""
    first_chunk_index: int
    """Of ``targets[0]``; the chunks before it came from the lease and are in the store."""
    token_ids: tuple[int, ...]
    """From position 0 to the end of the last chunk (the key chain needs them all)."""
    cache_salt: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "lease_id": self.lease_id,
            "targets": [target.to_dict() for target in self.targets],
            "first_chunk_index": self.first_chunk_index,
            "token_ids": list(self.token_ids),
            "cache_salt": self.cache_salt,
        }


def chunks_to_save(*, cached_tokens: int, tokens_with_kv: int, chunk_tokens: int) -> range:
    """Indices of the whole chunks that were computed here.

    A chunk that came from a lease, even in part, is not among them.
    """
    return range(-(-cached_tokens // chunk_tokens), tokens_with_kv // chunk_tokens)
