"""`kv_fetch`: the fetcher with Triton's `kv_pipeline` as its decoder."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from kvfetcher import wire
from kvfetcher.errors import CodecError
from kvfetcher.fetch.fetcher import Fetched, Fetcher, UnitStatus
from kvfetcher.serving.leases import EngineLeases
from kvfetcher.serving.metrics import Metrics
from kvfetcher.serving.tensors import bytes_tensor, text_tensor
from kvfetcher.storage import open_store

if TYPE_CHECKING:
    from kvfetcher.arena import BlockTarget
    from kvfetcher.config import Config
    from kvfetcher.fetch.report import FetchReport

_OTHER_THREADS = 32


class FetchService:
    """The fetcher and what it borrows; made in `initialize`, used on the stub's event loop."""

    def __init__(self, config: Config, pb_utils: Any) -> None:
        self._config = config
        self._pb_utils = pb_utils
        self._leases = EngineLeases(config)
        self._metrics = Metrics(pb_utils)
        self._fetcher: Fetcher | None = None

    async def fetch(self, *args: Any, **kwargs: Any) -> Fetched:
        """See `Fetcher.fetch`."""
        if self._fetcher is None:  # its semaphores belong to the running loop
            # Every unit in a decoder holds a thread of the loop's executor (Triton's async_exec
            # blocks one), and so do store and lease calls: look-ups must never wait for decoders.
            threads = self._config.fetch.max_inflight_units + _OTHER_THREADS
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))
            self._fetcher = Fetcher(
                store=open_store(self._config.store),
                leases=self._leases,
                run_unit=self._run_unit,
                config=self._config.fetch,
            )
        fetched = await self._fetcher.fetch(*args, **kwargs)
        self._count(fetched.report)
        return fetched

    def _count(self, report: FetchReport) -> None:
        count = self._metrics.add
        count("kvfetcher_fetches_total", outcome=report.outcome, reason=report.reason)
        count("kvfetcher_prompt_tokens_total", report.prompt_tokens)
        count("kvfetcher_hit_tokens_total", report.hit_tokens)
        count("kvfetcher_fetched_bytes_total", report.bytes_fetched)

    async def _run_unit(self, unit: bytes, target: BlockTarget) -> UnitStatus:
        pb_utils = self._pb_utils
        response = await pb_utils.InferenceRequest(
            model_name=wire.KV_PIPELINE,
            requested_output_names=[wire.KV_STATUS],
            inputs=[
                bytes_tensor(wire.UNIT, unit, pb_utils, batched=True),
                text_tensor(wire.KV_TARGET, target.to_json(), pb_utils, batched=True),
            ],
        ).async_exec()
        if response.has_error():
            raise CodecError(f"kv_pipeline: {response.error().message()}")
        status = pb_utils.get_output_tensor_by_name(response, wire.KV_STATUS).as_numpy()
        facts = json.loads(status.reshape(-1)[0])
        return UnitStatus(facts["decoder"], facts["decode_ms"], facts["restore_ms"])

    def close(self) -> None:
        """Close the connection to the engine and drop the series."""
        self._metrics.close()
        self._leases.close()


def build_fetcher(config: Config, pb_utils: Any) -> FetchService:
    """The service of `kv_fetch`."""
    return FetchService(config, pb_utils)
