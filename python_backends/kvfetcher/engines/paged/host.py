"""The paged engine with its connector, opened together: one process, one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

from kvfetcher.engines.connector import entry as trtllm_connector
from kvfetcher.engines.connector.engine import ConnectedEngine
from kvfetcher.engines.connector.server import open_hub
from kvfetcher.engines.paged import contract
from kvfetcher.engines.paged.executor import PagedExecutor, Rules, Sink
from kvfetcher.engines.paged.model import PagedModel
from kvfetcher.engines.paged.source import PagedSource
from kvfetcher.errors import ConfigError

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable
    from pathlib import Path

    from kvfetcher.config import Config
    from kvfetcher.engines.connector.pool import Layout
    from kvfetcher.engines.hf.loader import LoadedModel
    from kvfetcher.memory.arena import Arena
    from kvfetcher.memory.leases import LeaseTable


@dataclass(frozen=True, slots=True)
class PagedArgs:
    """What the connector looks at before it agrees to run; as in TensorRT-LLM's arguments."""

    kv_cache_config: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            enable_block_reuse=True, enable_partial_reuse=False, host_cache_size=0
        )
    )
    scheduler_config: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(capacity_scheduler_policy="GUARANTEED_NO_EVICT")
    )
    backend: str = "pytorch"


def open_paged_engine(
    loaded: LoadedModel,
    config: Config,
    *,
    folder: Path,
    arena: Arena,
    leases: LeaseTable,
    clock: Callable[[], float],
    closing: contextlib.ExitStack,
    pool_layout: Layout = "HND",
) -> ConnectedEngine:
    """Open hub, connector, executor and engine.

    Args:
        loaded: the model.
        config: the whole configuration.
        folder: for the connector's socket.
        arena: arena of the model's spec.
        leases: over its blocks.
        clock: seconds, monotonic.
        closing: gets what must be closed, in order.
        pool_layout: pool layout of the pool that is made; found again by the probe like any other.

    Raises:
        ConfigError: the pool is too small for one block.
        EngineError: the model cannot run on paged KV.
    """
    block_bytes = loaded.spec.bytes_per_token * config.engine.tokens_per_block
    num_blocks = config.connector.pool_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"connector.pool_bytes = {config.connector.pool_bytes} holds no KV block of"
            f" {block_bytes} bytes; raise it"
        )
    hub = open_hub(
        config,
        loaded.spec,
        folder=folder,
        arena=arena,
        num_ranks=1,
        leases=leases,
        clock=clock,
    )
    closing.callback(hub.close)
    classes = trtllm_connector.bind(
        contract, place=lambda: trtllm_connector.RankPlace(0, 1), socket_path=hub.path
    )
    scheduler, worker = classes.scheduler(PagedArgs()), classes.worker(PagedArgs())
    closing.callback(worker.close)
    closing.callback(scheduler.close)
    ranks = contract.OneRank()

    def make(sink: Sink) -> PagedExecutor:
        model = PagedModel(
            loaded,
            ranks=ranks,
            num_blocks=num_blocks,
            tokens_per_block=config.engine.tokens_per_block,
            layout=pool_layout,
        )
        return PagedExecutor(
            model,
            ranks=ranks,
            scheduler=scheduler,
            worker=worker,
            rules=Rules(
                part_tokens=config.engine.prefill_slice_tokens,
                max_batch=config.engine.max_running_requests,
                tokens_per_block=config.engine.tokens_per_block,
                reuse=config.connector.device_reuse,
            ),
            sink=sink,
        )

    source = PagedSource(make)
    closing.callback(source.close)
    # In one process with Triton's stub: the engine ends, the process and its arena go on.
    worker.core.fatal = source.fail
    return ConnectedEngine(
        "paged",
        loaded,
        config,
        source=source,
        hub=hub,
        arena=arena,
        leases=leases,
        clock=clock,
    )
