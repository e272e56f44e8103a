"""`kv_fetch`: the fetcher with Triton's `kv_pipeline` as its decoder; units without video go to `kv_restore`."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher import wire
from kvfetcher.backend.leases import EngineLeases
from kvfetcher.backend.metrics import FETCH_SERIES, Metrics, count_unit, store_observer
from kvfetcher.backend.params import seal_options
from kvfetcher.backend.respond import unit_error
from kvfetcher.backend.tags import compare, unit_tag
from kvfetcher.backend.tenants import TenantLimits
from kvfetcher.backend.tensors import bytes_tensor, text_tensor
from kvfetcher.backend.watching import ClientWatch, Watches
from kvfetcher.codec.gpu.instances import decode_instances, nvdec_engines, parallel_decoders
from kvfetcher.config import cache_home
from kvfetcher.errors import (
    DecoderUnavailableError,
    MixedUpError,
    RequestCancelledError,
)
from kvfetcher.fetch.fetcher import Fetched, Fetcher, UnitStatus
from kvfetcher.fetch.planning.decode_times import H100_NVDEC, cpu_table, load_table
from kvfetcher.format.unit import has_video
from kvfetcher.memory.control import run_dir
from kvfetcher.memory.permits import Permits
from kvfetcher.storage import TieredStore, open_store
from kvfetcher.storage.keyring import load_keyring

if TYPE_CHECKING:
    from kvfetcher.backend.params import ClientRequest
    from kvfetcher.config import Config
    from kvfetcher.fetch.fetcher import FetchLoad
    from kvfetcher.fetch.planning.decode_times import DecodeTable
    from kvfetcher.fetch.report import FetchReport
    from kvfetcher.memory.arena import BlockTarget

# Checks of what was read, and names that are looked up.
_OTHER_THREADS = 8
# So often gauges are brought up to date while something is fetched.
_SHOW_SECONDS = 0.5

# An empty tensor does not pass every version of Triton.
_NO_PLANES = np.zeros((1, 1, 1, 1, 1), np.uint8)

_KEPT_TARGETS = 64

_log = logging.getLogger(__name__)


class FetchService:
    """The fetcher and what it borrows; made in `initialize`, used on the stub's event loop."""

    def __init__(self, config: Config, pb_utils: Any) -> None:
        self._config = config
        self._pb_utils = pb_utils
        self._leases = EngineLeases(config)
        self.permits = Permits.of_run()
        self._limits = TenantLimits(config.trust)
        # All units of a chunk have the same target.
        self._sealed = functools.lru_cache(maxsize=_KEPT_TARGETS)(self._seal_target)
        self.ring = load_keyring(config.store.keys) if config.store.keys else None
        self._metrics = Metrics(pb_utils)
        self._metrics.start(FETCH_SERIES)
        self._watches = Watches()
        self._fetcher: Fetcher | None = None
        self._num_fetching = 0
        self._showing: asyncio.Task[None] | None = None

    async def fetch(self, *args: Any, **kwargs: Any) -> Fetched:
        """See `Fetcher.fetch`."""
        salt = kwargs.get("cache_salt", "")
        self._limits.admit(salt)
        if self._fetcher is None:  # its semaphores belong to the running loop
            self._fetcher = self._open()
        if self._showing is None:
            self._showing = asyncio.create_task(self._show_while_fetching(self._fetcher))
        self._num_fetching += 1
        try:
            fetched = await self._fetcher.fetch(*args, **kwargs)
        except RequestCancelledError:
            self._metrics.add("kvfetcher_fetches_total", outcome="cancelled", reason="")
            raise
        finally:
            self._num_fetching -= 1
            self._show(self._fetcher.load())
        self._limits.charge(salt, fetched.report.bytes_fetched)
        self._count(fetched.report)
        return fetched

    def _open(self) -> Fetcher:
        # Every unit in a decoder, and every one that needs none, holds a thread of the loop's executor
        # (Triton's async_exec blocks one). Store, copies near by and leases have threads of their own.
        units = self._config.fetch.units_in_flight(decode_instances(self._config))
        threads = 2 * units + _OTHER_THREADS
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))
        observe = store_observer(self._metrics, "kvfetcher_store")
        store = open_store(self._config.store, observe=observe)
        return Fetcher(
            store=store,
            local=store if isinstance(store, TieredStore) else None,
            # Object stores limit each connection, and are fast over many.
            one_read_fills_link=self._config.store.kind != "s3",
            leases=self._leases,
            run_unit=self._run_unit,
            config=replace(self._config.fetch, max_inflight_units=units),
            table=_decode_table(self._config),
            num_decoders=parallel_decoders(self._config),
        )

    def seal(self, asked: ClientRequest, lease: str) -> str:
        """What `tensorrt_llm` is to do after the fetch, with a permit where the request has one."""
        if not asked.is_internal and not lease:
            return asked.options.to_json()
        return seal_options(asked.options, self.permits, input_ids=asked.input_ids, lease=lease)

    def watch(self, request: Any, sender: Any) -> ClientWatch:
        """A watch on the request's client.

        Only the ensemble passes the client's text on to `kv_fetch`.
        """
        text = self._pb_utils.get_input_tensor_by_name(request, wire.TEXT_INPUT)
        return ClientWatch(
            self._watches,
            sender,
            self._pb_utils,
            was_cancelled=self._leases.was_cancelled,
            permits=self.permits,
            in_ensemble=text is not None,
        )

    def _count(self, report: FetchReport) -> None:
        count = self._metrics.add
        count("kvfetcher_fetches_total", outcome=report.outcome, reason=report.reason)
        count("kvfetcher_prompt_tokens_total", report.prompt_tokens)
        count("kvfetcher_hit_tokens_total", report.hit_tokens)
        count("kvfetcher_fetched_bytes_total", report.bytes_fetched)
        count("kvfetcher_shared_fetches_total", int(report.shared))
        for stage, milliseconds in report.stages_ms.items():
            self._metrics.observe("kvfetcher_fetch_stage_seconds", milliseconds / 1e3, stage=stage)
        gate = report.gate
        if gate is None:
            return
        count("kvfetcher_gate_decisions_total", verdict=gate.verdict)
        if gate.error_ms is not None and gate.loss_ms is not None:
            self._metrics.observe("kvfetcher_gate_error_seconds", abs(gate.error_ms) / 1e3)
            count("kvfetcher_gate_lost_seconds_total", gate.loss_ms / 1e3)
            count("kvfetcher_gate_gained_seconds_total", -gate.loss_ms / 1e3)

    async def _show_while_fetching(self, fetcher: Fetcher) -> None:
        # Also after the last fetch: reads that it gave up may still be on their way.
        while self._num_fetching or fetcher.load().inflight_bytes:
            self._show(fetcher.load())
            await asyncio.sleep(_SHOW_SECONDS)
        self._showing = None
        self._show(fetcher.load())

    def _show(self, load: FetchLoad) -> None:
        self._metrics.set("kvfetcher_fetches_waiting", load.num_waiting)
        self._metrics.set("kvfetcher_inflight_bytes", load.inflight_bytes)
        self._metrics.set("kvfetcher_link_bytes_per_second", load.bytes_per_second)

    def _seal_target(self, target: BlockTarget) -> str:
        named = replace(target, tenant=self.permits.tenant(target.tenant))
        return self.permits.seal("write", named.to_json(), expires_at=target.expires_at)

    async def _run_unit(self, unit: bytes, target: BlockTarget) -> UnitStatus:
        pb_utils = self._pb_utils
        sealed = self._sealed(target)
        model, inputs = unit_request(unit, sealed, pb_utils)
        response = await pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=[wire.KV_STATUS],
            inputs=inputs,
        ).async_exec()
        if response.has_error():
            raise unit_error(model, response.error().message())
        status = pb_utils.get_output_tensor_by_name(response, wire.KV_STATUS).as_numpy()
        facts = json.loads(status.reshape(-1)[0])
        expected = unit_tag(unit, sealed)
        try:
            compare(facts.get("tag", ""), expected, model=wire.KV_RESTORE, run_folder=run_dir())
        except MixedUpError as exc:
            raise DecoderUnavailableError(str(exc)) from exc
        count_unit(self._metrics, facts)
        return UnitStatus(facts["decoder"], facts["decode_ms"], facts["restore_ms"])

    def close(self) -> None:
        """Close the connection to the engine and drop the series."""
        self._metrics.close()
        self._leases.close()


def unit_request(unit: bytes, sealed_target: str, pb_utils: Any) -> tuple[str, list[Any]]:
    """The model that turns a unit into KV values of a sealed `BlockTarget`, and its inputs."""
    inputs = [
        bytes_tensor(wire.UNIT, unit, pb_utils, batched=True),
        text_tensor(wire.KV_TARGET, sealed_target, pb_utils, batched=True),
    ]
    if has_video(unit):
        return wire.KV_PIPELINE, inputs
    # It would wait for a decoder behind pictures.
    return wire.KV_RESTORE, [*inputs, pb_utils.Tensor(wire.PLANES, _NO_PLANES)]


def _decode_table(config: Config) -> DecodeTable:
    """What `kvfetcher doctor` measured here, else what is known of such decoders."""
    fallback = H100_NVDEC if nvdec_engines(config) else cpu_table(decode_instances(config))
    table = load_table(cache_home(), fallback=fallback)
    if table.decoder != fallback.decoder:
        _log.info(
            "decode times measured with %s do not serve here; kvfetcher doctor measures %s",
            table.decoder,
            fallback.decoder,
        )
        return fallback
    return table


def build_fetcher(config: Config, pb_utils: Any) -> FetchService:
    """The service of `kv_fetch`."""
    return FetchService(config, pb_utils)
