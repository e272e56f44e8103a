"""What the fetcher needs of the engine: facts, its throughput, and leases on its arena."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvfetcher.memory.arena import BlockTarget
    from kvfetcher.prefill_rate import PrefillModel
    from kvfetcher.spec import KVSpec


@dataclass(frozen=True, slots=True)
class FetchFacts:
    """What the fetcher must know of the engine and the profile; constant while it runs."""

    identity_digest: bytes
    chunk_tokens: int
    tokens_per_block: int
    spec: KVSpec
    max_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class EngineThroughput:
    """What changes while the engine runs: the cost of computing, as learnt, and its arena."""

    prefill: PrefillModel
    arena_tokens: int
    """That the whole arena holds."""


class LeaseService(Protocol):
    """The engine's side: facts and leases (`control.ControlClient` behind threads)."""

    async def facts(self) -> FetchFacts: ...

    async def throughput(self) -> EngineThroughput: ...

    async def lease(self, num_tokens: int, ttl_seconds: float) -> tuple[str, BlockTarget]: ...

    async def seal(
        self,
        lease_id: str,
        num_tokens: int,
        tokens_digest: str,
        *,
        num_holders: int,
        tail_is_live: bool,
    ) -> None: ...

    async def share(self, lease_id: str) -> None: ...

    async def renew(self, lease_id: str) -> None: ...

    async def release(self, lease_id: str) -> None: ...
