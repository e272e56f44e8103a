"""The KV connector that TensorRT-LLM loads into its worker processes.

    kv_connector_config:
      connector_module: kvfetcher.trtllm_connector
      connector_scheduler_class: KVFetcherScheduler
      connector_worker_class: KVFetcherWorker

Both classes are made when they are first asked for, over the abstract classes of the TensorRT-LLM that
is installed. `bind` makes them over any other module with the same interface: the paged torch engine
and the tests run these very classes over `engines.paged.contract`.

They find the process that owns the KV arena through $KVFETCHER_RUN_DIR, or $TRTLLM_KVFETCHER_RUN_DIR
where TensorRT-LLM hands on variables of its own names only; settings come from there (`messages.Welcome`).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from kvfetcher.config import RUN_DIR_VARIABLE
from kvfetcher.engines.connector import checks
from kvfetcher.engines.connector.copies import BlockCopier
from kvfetcher.engines.connector.link import OwnerLink
from kvfetcher.engines.connector.messages import SOCKET_NAME
from kvfetcher.engines.connector.pool import LAYOUTS, LayerGroupPool, PagedPool
from kvfetcher.engines.connector.scheduler import ConnectorScheduler
from kvfetcher.engines.connector.worker import ConnectorWorker
from kvfetcher.errors import ConfigError
from kvfetcher.memory.arena import Arena
from kvfetcher.memory.control import run_dir
from kvfetcher.spec import KVSpec, heads_of_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from kvfetcher.engines.connector.messages import Message

# Newest first: 1.3 moved the module, 1.1 and 1.2 have the old path.
INTERFACES = (
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",
    "tensorrt_llm._torch.pyexecutor.kv_cache_connector",
)

FORWARDED_RUN_DIR_VARIABLE = f"TRTLLM_{RUN_DIR_VARIABLE}"

_CONNECT_SECONDS = 60.0
_MAKING = threading.Lock()

_log = logging.getLogger(__name__)


class ConnectorClasses(NamedTuple):
    """What TensorRT-LLM is given."""

    scheduler: type
    worker: type


class RankPlace(NamedTuple):
    """Which rank of how many a connector object is."""

    rank: int
    num_ranks: int


def find_interface() -> Any:
    """The module with TensorRT-LLM's abstract connector classes.

    Raises:
        ConfigError: TensorRT-LLM is not installed, or has no KV connector.
    """
    reasons = []
    for name in INTERFACES:
        try:
            return importlib.import_module(name)
        except ImportError as exc:
            reasons.append(f"{name}: {exc}")
    raise ConfigError(
        "TensorRT-LLM's KV connector interface cannot be imported; it needs TensorRT-LLM 1.2.1 or later, as in"
        f" the NGC images tritonserver:26.04 to 26.07-trtllm-python-py3 ({'; '.join(reasons)})"
    )


def bind(
    api: Any,
    *,
    place: Callable[[], RankPlace] | None = None,
    socket_path: Path | None = None,
) -> ConnectorClasses:
    """Make the connector classes over the abstract classes in `api`.

    Args:
        api: module with KvCacheConnectorScheduler and KvCacheConnectorWorker.
        place: tells a new worker which rank it is; None = MPI's environment (`place_from_mpi`).
        socket_path: socket of the arena's owner; None = the one in `find_run_folder()`.

    Raises:
        ConfigError: the interface is not one that this build implements.
    """
    checks.check_interface(api)
    locate = place or place_from_mpi
    # Both objects of rank 0 are made at one time in two threads, and share one link.
    shared = _SharedLink(locate, socket_path)

    class KVFetcherScheduler(api.KvCacheConnectorScheduler):
        """Rank 0's half; `core` decides (`engines.connector.scheduler`)."""

        def __init__(self, llm_args: Any) -> None:
            super().__init__(llm_args)
            _refuse(llm_args)
            link = shared.join("scheduler")
            self.core = ConnectorScheduler(
                link,
                tokens_per_block=link.welcome.tokens_per_block,
                async_load_tokens=link.welcome.async_load_tokens,
            )
            shared.listen("scheduler", self.core.receive)
            shared.when_registered(self._begin)

        def _begin(self, is_v2: bool) -> None:
            base = api.KvCacheConnectorScheduler
            self.core.begin(is_v2=is_v2, tells_cancelled=hasattr(base, "cancel_load"))

        def wait_for_initialization(self) -> None:
            """Nothing: the link is up once the object exists."""

        def get_num_new_matched_tokens(
            self, request: Any, num_computed_tokens: int
        ) -> tuple[int, bool]:
            return self.core.get_num_new_matched_tokens(request, num_computed_tokens)

        def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
            self.core.update_state_after_alloc(request, block_ids)

        def update_state_after_alloc_by_layer_group(
            self, request: Any, block_ids_by_layer_group: list[list[int]]
        ) -> None:
            self.core.update_state_after_alloc_by_layer_group(request, block_ids_by_layer_group)

        def cancel_load(self, request: Any, start: int, end: int) -> None:
            self.core.cancel_load(request, start, end)

        def request_reset(self, request: Any) -> None:
            self.core.request_reset(request)

        def build_connector_meta(self, scheduler_output: Any) -> object:
            return self.core.build_connector_meta(scheduler_output)

        def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
            return self.core.request_finished(request, cache_block_ids)

        def request_finished_by_layer_group(
            self, request: Any, cache_block_ids_by_layer_group: list[list[int]]
        ) -> bool:
            return self.core.request_finished_by_layer_group(
                request, cache_block_ids_by_layer_group
            )

        def close(self) -> None:
            """Close the connection (engines in one process; TensorRT-LLM just ends its processes)."""
            shared.leave("scheduler")

    class KVFetcherWorker(api.KvCacheConnectorWorker):
        """Every rank's half; `core` copies (`engines.connector.worker`)."""

        def __init__(self, llm_args: Any) -> None:
            super().__init__(llm_args)
            _refuse(llm_args)
            self._link = shared.join("worker")
            self._arena: Arena | None = None
            welcome = self._link.welcome
            self.core = ConnectorWorker(
                self._link,
                layout=next((name for name in LAYOUTS if name == welcome.layout), None),
                save_timeout_seconds=welcome.save_timeout_seconds,
            )
            shared.listen("worker", self.core.receive)

        def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
            """Check the pool against the owner's facts. Raises: the engine must not start otherwise."""
            if reasons := checks.manager_refusals(self._llm_args, is_v2=False):
                raise ConfigError("; ".join(reasons))
            text = f"{list(kv_cache_tensor.shape)} {kv_cache_tensor.dtype}"
            self._register(PagedPool, kv_cache_tensor, is_v2=False, text=text)

        def register_kv_cache_layout(self, layout: Any) -> None:
            """What the second KV cache manager calls instead. Raises: the engine must not start."""
            groups = [
                f"layers {list(group.layer_ids)} in {len(group.regions)} regions of"
                f" {[region.num_slots for region in group.regions]} blocks"
                for group in layout.groups
            ]
            self._register(LayerGroupPool, layout, is_v2=True, text=f"V2, {'; '.join(groups)}")

        def _register(
            self, kind: Callable[..., PagedPool], memory: Any, *, is_v2: bool, text: str
        ) -> None:
            welcome, (rank, num_ranks) = self._link.welcome, shared.place
            spec = KVSpec(**welcome.spec)
            heads = heads_of_rank(spec.num_kv_heads, rank=rank, num_ranks=num_ranks)
            pool = kind(memory, spec=spec, heads=heads, tokens_per_block=welcome.tokens_per_block)
            self._arena = Arena.attach(welcome.arena, generation=welcome.generation)
            copier = BlockCopier(self._arena, pool)
            facts = (
                f"{_version_text(api)}\n{checks.interface_text(api)}\nrank {rank} of {num_ranks}: pool"
                f" {text} on {pool.device}, KV heads {heads.start} to {heads.stop - 1}"
            )
            _log.info("KV connector: %s", facts)
            shared.registered(is_v2)
            self.core.register(pool, copier, facts=facts)

        def start_load_kv(self, stream: Any) -> None:
            self.core.start_load_kv(self.get_connector_meta(), stream)

        def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
            """Nothing: loads are ordered before the whole pass (a CUDA graph runs no layer hooks)."""

        def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
            """Nothing: a request is saved when it is over."""

        def wait_for_save(self, stream: Any) -> None:
            self.core.wait_for_save(stream)

        def get_finished(
            self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
        ) -> tuple[list[int], list[int]]:
            return self.core.get_finished(finished_gen_req_ids, started_loading_req_ids)

        def close(self) -> None:
            """Close the connection (engines in one process; TensorRT-LLM just ends its processes)."""
            self.core.close()
            shared.leave("worker")
            if self._arena is not None:
                self._arena.close()

    return ConnectorClasses(KVFetcherScheduler, KVFetcherWorker)


def place_from_mpi() -> RankPlace:
    """This process's place among TensorRT-LLM's workers."""
    from tensorrt_llm._utils import mpi_rank, mpi_world_size

    return RankPlace(mpi_rank(), mpi_world_size())


def find_run_folder(environ: Mapping[str, str]) -> Path:
    """The run folder of the server whose worker this is; its own variable comes first.

    Raises:
        ConfigError: as `control.run_dir`.
    """
    chosen = environ.get(RUN_DIR_VARIABLE) or environ.get(FORWARDED_RUN_DIR_VARIABLE, "")
    return run_dir(environ={RUN_DIR_VARIABLE: chosen})


class _SharedLink:
    """One link for the scheduler and the worker of a process, whichever comes first."""

    def __init__(self, locate: Callable[[], RankPlace], path: Path | None) -> None:
        self._locate = locate
        self._path = path
        self._lock = threading.Lock()
        self._link: OwnerLink | None = None
        self._members: set[str] = set()
        self._listeners: dict[str, Callable[[Message], None]] = {}
        self._started = False
        self._is_v2: bool | None = None
        self._begin: Callable[[bool], None] | None = None
        self.place = RankPlace(0, 1)

    def join(self, name: str) -> OwnerLink:
        with self._lock:
            if self._link is None:
                self.place = self._locate()
                path = self._path or find_run_folder(os.environ) / SOCKET_NAME
                self._link = OwnerLink(
                    path,
                    rank=self.place.rank,
                    num_ranks=self.place.num_ranks,
                    timeout_seconds=_CONNECT_SECONDS,
                )
            self._members.add(name)
            return self._link

    def listen(self, name: str, receive: Callable[[Message], None]) -> None:
        with self._lock:
            self._listeners[name] = receive
            link, self._started, was_started = self._link, True, self._started
        if link is not None and not was_started:
            link.start(self._receive)

    def when_registered(self, begin: Callable[[bool], None]) -> None:
        """Call `begin` once the worker has its pool; with whether the second manager made it."""
        with self._lock:
            self._begin = begin
            is_v2 = self._is_v2
        if is_v2 is not None:
            begin(is_v2)

    def registered(self, is_v2: bool) -> None:
        with self._lock:
            self._is_v2 = is_v2
            begin = self._begin
        if begin is not None:
            begin(is_v2)

    def leave(self, name: str) -> None:
        with self._lock:
            self._members.discard(name)
            link = None if self._members else self._link
            if link is not None:
                self._link, self._started, self._listeners = None, False, {}
        if link is not None:
            link.close()

    def _receive(self, message: Message) -> None:
        for receive in tuple(self._listeners.values()):
            receive(message)


def _version_text(api: Any) -> str:
    """Version of the package that `api` is a part of."""
    package = api.__name__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", "of unknown version")
    return f"{package} {version}"


def _refuse(llm_args: Any) -> None:
    if reasons := checks.refusals(llm_args):
        raise ConfigError(
            "the KV connector does not run with these TensorRT-LLM arguments: " + "; ".join(reasons)
        )


def __getattr__(name: str) -> Any:
    """`KVFetcherScheduler` and `KVFetcherWorker` over the TensorRT-LLM that is installed."""
    if name not in ("KVFetcherScheduler", "KVFetcherWorker"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # TensorRT-LLM makes both objects of rank 0 at one time in two threads; they must share one link.
    with _MAKING:
        if name not in globals():
            classes = bind(find_interface())
            globals().update(KVFetcherScheduler=classes.scheduler, KVFetcherWorker=classes.worker)
    return globals()[name]
