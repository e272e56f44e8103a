"""The engine's lease service for asyncio: `control.ControlClient` on a thread of its own."""

from __future__ import annotations

import asyncio
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from kvfetcher.fetch.fetcher import EngineThroughput, FetchFacts
from kvfetcher.memory.control import ControlClient, socket_path
from kvfetcher.prefill_rate import PrefillModel
from kvfetcher.spec import ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.config import Config
    from kvfetcher.memory.arena import BlockTarget

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

# Table look-ups take well under a millisecond; a busy engine process may be late, not silent.
_TIMEOUT_SECONDS = 10.0
# What prefill costs changes slowly.
_PACE_SECONDS = 0.25


class EngineLeases:
    """`LeaseService` over the engine's control socket.

    Facts are asked for once: they are constant while a server runs. One event loop. No thread of
    the loop's executor is used: whatever hangs there, leases are granted and given back.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._client = ControlClient(socket_path(), timeout_seconds=_TIMEOUT_SECONDS)
        # One thread: calls take turns on the connection anyway.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvfetcher-leases")
        self._facts: FetchFacts | None = None
        self._asking: asyncio.Task[EngineThroughput] | None = None
        self._asked_at = 0.0

    async def facts(self) -> FetchFacts:
        if self._facts is None:
            self._facts = await self._call(self._ask_facts)
        return self._facts

    async def throughput(self) -> EngineThroughput:
        """The engine's speed a moment ago: many requests at once ask the engine only once."""
        if self._asking is None or (
            self._asking.done() and time.monotonic() - self._asked_at > _PACE_SECONDS
        ):
            self._asking, self._asked_at = (
                asyncio.create_task(self._ask_throughput()),
                time.monotonic(),
            )
        return await asyncio.shield(self._asking)

    async def lease(self, num_tokens: int, ttl_seconds: float) -> tuple[str, BlockTarget]:
        return await self._call(self._client.lease, num_tokens, ttl_seconds=ttl_seconds)

    async def seal(
        self,
        lease_id: str,
        num_tokens: int,
        tokens_digest: str,
        *,
        num_holders: int,
        tail_is_live: bool,
    ) -> None:
        await self._call(
            self._client.seal,
            lease_id,
            num_tokens=num_tokens,
            digest=tokens_digest,
            num_holders=num_holders,
            tail_is_live=tail_is_live,
        )

    async def share(self, lease_id: str) -> None:
        await self._call(self._client.share, lease_id)

    async def renew(self, lease_id: str) -> None:
        await self._call(self._client.renew, lease_id)

    async def release(self, lease_id: str) -> None:
        await self._call(self._client.release, lease_id)

    async def was_cancelled(self, fetch_id: str) -> bool:
        """Whether the LLM's step saw that the client of this fetch went away."""
        return await self._call(self._client.was_cancelled, fetch_id)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    async def _call(
        self,
        call: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, functools.partial(call, *args, **kwargs)
        )

    async def _ask_throughput(self) -> EngineThroughput:
        stats = await self._call(self._client.stats)
        return EngineThroughput(
            prefill=PrefillModel(**stats["prefill"]),
            arena_tokens=stats["blocks"]["total"] * (await self.facts()).tokens_per_block,
        )

    def _ask_facts(self) -> FetchFacts:
        from kvfetcher.codec.profiles import profile_id

        engine = self._client.describe()
        identity = ModelIdentity.from_dict(engine["identity"])
        codec = self._config.codec
        profile = profile_id(codec, identity.spec, weights=identity.weights)
        return FetchFacts(
            identity_digest=identity.digest(profile=profile, chunk_tokens=codec.chunk_tokens),
            chunk_tokens=codec.chunk_tokens,
            tokens_per_block=engine["tokens_per_block"],
            spec=identity.spec,
            max_prompt_tokens=engine["max_prompt_tokens"],
        )
