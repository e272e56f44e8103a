"""A real server under supervision, prompts whose right answers are known, and what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from kvfetcher.chaos.stores import free_port
from kvfetcher.config import Config, load_config
from kvfetcher.errors import KVFetcherError, ServerError
from kvfetcher.launcher import Supervisor, TritonServer
from kvfetcher.launcher.rundir import SHARED_MEMORY, processes_of, shared_memory_prefix
from kvfetcher.memory.control import ControlClient, socket_path
from kvfetcher.storage import open_backend
from kvfetcher_client import Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.chaos.stores import ChaosStore
    from kvfetcher.storage.base import Store

CHUNK_TOKENS = 64
MAX_TOKENS = 4
DEADLINE_SECONDS = 90.0
"""No request may take longer, whatever happens to the server meanwhile."""

_LEASE_SECONDS = 10.0
_HEAL_SECONDS = 180.0
_LOOK_SECONDS = 0.1
_MEBIBYTE = 1 << 20
# Beyond what it was after the start: what one unit and one connection take for a moment.
_MAX_MORE_SHARED = 64 * _MEBIBYTE
_MAX_MORE_MEMORY = 1024 * _MEBIBYTE
_MAX_MORE_DESCRIPTORS = 128
_WORDS = [
    "the",
    "a",
    "one",
    "this",
    "river",
    "harbour",
    "winter",
    "letter",
    "engine",
    "number",
    "garden",
    "colour",
    "teacher",
    "music",
    "answer",
    "opens",
    "closes",
    "carries",
    "measures",
    "writes",
    "finds",
    "keeps",
    "between",
    "under",
    "before",
    "after",
    "without",
    "quiet",
    "narrow",
    "bright",
    "early",
    "late",
    "seven",
    "forty",
    "clear",
    "heavy",
    "slow",
    "and",
    "but",
    "because",
    "while",
    "where",
]

_log = logging.getLogger(__name__)


def make_prompt(seed: str, num_words: int = 220) -> str:
    """Text that no other seed gives, of about three chunks."""
    source = random.Random(seed)
    words = [source.choice(_WORDS) for _ in range(num_words)]
    return f"Report {seed}: {' '.join(words)}. Then"


class Holding(NamedTuple):
    """What a server holds now."""

    shared_bytes: int
    memory_bytes: int
    descriptors: int


@dataclass(slots=True)
class Asked:
    """One request: what it asked, and what came."""

    prompt: str
    future: Future[Any]
    may_fail: bool = True

    def ids(self) -> tuple[int, ...] | None:
        """Token ids of the answer; None = a clean error."""
        error = self.future.exception()
        if error is None:
            return tuple(self.future.result().output_ids)
        if isinstance(error, KVFetcherError):
            return None
        raise error


class World:
    """One server over one store; a context manager.

    Args:
        store: running.
        model: `engine.model`.
        num_prompts: prompts that the store holds whole.
    """

    def __init__(self, store: ChaosStore, *, model: str, num_prompts: int = 3) -> None:
        self.store = store
        self.prompts = tuple(make_prompt(f"{store.kind}-{n}") for n in range(num_prompts))
        self.expected: dict[str, tuple[int, ...]] = {}
        self.originals: dict[str, bytes] = {}
        """Every object that the store held once the prompts were saved."""
        self._config = _config(store, model)
        self._server = TritonServer(self._config)
        self._pool = ThreadPoolExecutor(16, thread_name_prefix="kvfetcher-chaos")
        self._stop = threading.Event()
        self._is_up = threading.Event()
        self._failure: BaseException | None = None
        self._baseline: Holding | None = None
        self._baseline_of = Path()
        """Run folder of the server whose holding that is."""
        self._thread = threading.Thread(target=self._serve, name="kvfetcher-chaos-server")

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._wait(self._is_up.is_set, "the server is not up")
            for prompt in self.prompts:
                self.expected[prompt] = self.compute(prompt)
                self.ask(prompt).future.result(DEADLINE_SECONDS)
            self.settle()
            self.originals = dict(self.on_store(_read_all))
            if len(self.originals) < 2 * len(self.prompts):
                raise ServerError(f"only {len(self.originals)} objects were saved before the run")
            self._note_baseline(self.holding())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def url(self) -> str:
        return self._server.grpc_url

    @property
    def config(self) -> Config:
        return self._config

    def ask(self, prompt: str, **options: Any) -> Asked:
        """Send a request; its answer comes later."""
        options = {"max_tokens": MAX_TOKENS, **options}

        def run() -> Any:
            with Client(self.url, timeout_seconds=DEADLINE_SECONDS) as client:
                return client.generate(prompt, **options)

        return Asked(prompt, self._pool.submit(run))

    def compute(self, prompt: str) -> tuple[int, ...]:
        """The right answer: computed, with nothing from the store."""
        if prompt not in self.expected:
            asked = self.ask(prompt, kv_policy="recompute", cache_salt="computed")
            self.expected[prompt] = tuple(asked.future.result(DEADLINE_SECONDS).output_ids)
        return self.expected[prompt]

    def processes(self, model: str) -> list[int]:
        """Of a model; "" = tritonserver's."""
        if not self._server.is_started():
            return []
        if not model:
            return [self._server.process_id]
        return [stub.process_id for stub in self._server.stubs() if stub.model == model]

    def control(self) -> ControlClient:
        """A connection to the engine."""
        return ControlClient(socket_path(self._server.run_dir), timeout_seconds=5.0)

    def heal(self) -> None:
        """Wait until requests are answered again.

        Raises:
            ServerError: they are not.
        """

        def works() -> bool:
            asked = self.ask(self.prompts[0], kv_policy="no_store", max_tokens=1)
            return asked.future.exception(DEADLINE_SECONDS) is None

        self._wait(works, "requests are not answered again")

    def settle(self) -> None:
        """Wait until nothing runs and every lease is back.

        Raises:
            ServerError: some are not.
        """

        def is_idle() -> bool:
            try:
                with self.control() as control:
                    stats = control.stats()
            except (KVFetcherError, OSError):
                return False
            blocks = stats["blocks"]
            return not stats["running"] and blocks["free"] == blocks["total"]

        self._wait(is_idle, "leases are not given back")

    def leaks(self) -> str:
        """What the server holds more than after its start; "" = nothing to speak of."""
        now, before = self.holding(), self._baseline
        if before is None or self._server.run_dir != self._baseline_of:
            self._note_baseline(now)  # it was started anew
            return self._left_behind()
        more = [
            f"{name} {was} -> {is_now}"
            for name, was, is_now, most in (
                ("shared memory", before.shared_bytes, now.shared_bytes, _MAX_MORE_SHARED),
                ("memory", before.memory_bytes, now.memory_bytes, _MAX_MORE_MEMORY),
                ("descriptors", before.descriptors, now.descriptors, _MAX_MORE_DESCRIPTORS),
            )
            if is_now > was + most
        ]
        return "; ".join([*more, *filter(None, [self._left_behind()])])

    def holding(self) -> Holding:
        """What the server's processes hold now."""
        run_dir = self._server.run_dir
        files = SHARED_MEMORY.glob(f"{shared_memory_prefix(run_dir)}*")
        memory = descriptors = 0
        for process in processes_of(run_dir):
            folder = Path(f"/proc/{process}")
            with contextlib.suppress(OSError):
                descriptors += len(list((folder / "fd").iterdir()))
                pages = int((folder / "statm").read_text().split()[1])
                memory += pages * os.sysconf("SC_PAGE_SIZE")
        return Holding(sum(f.stat().st_blocks * 512 for f in files), memory, descriptors)

    def on_store(self, call: Callable[[Store], Any]) -> Any:
        """Await `call(store)` on the store itself, past the link's faults being none."""

        async def run() -> Any:
            store = open_backend(self._config.store)
            try:
                return await call(store)
            finally:
                await store.close()

        return asyncio.run(run())

    def restore_objects(self) -> None:
        """Bring every object of the beginning back."""

        async def restore(store: Store) -> None:
            for name, data in self.originals.items():
                await store.delete(name)
                await store.put(name, data)

        self.on_store(restore)

    def _note_baseline(self, holding: Holding) -> None:
        self._baseline, self._baseline_of = holding, self._server.run_dir

    def _left_behind(self) -> str:
        """Files of servers of this process that do not run any more."""
        own = f"kvfetcher-{os.getpid()}-"
        current = shared_memory_prefix(self._server.run_dir)
        stray = [
            path.name for path in SHARED_MEMORY.glob(f"{own}*") if not path.name.startswith(current)
        ]
        return f"files of an ended server: {', '.join(stray[:3])}" if stray else ""

    def _serve(self) -> None:
        """The thread that starts the server and repairs it (`Supervisor` wants one thread)."""
        try:
            with self._server:
                supervisor = Supervisor(self._server)
                self._is_up.set()
                try:
                    while not self._stop.wait(_LOOK_SECONDS):
                        supervisor.look()
                finally:
                    supervisor.close()
        except BaseException as exc:  # noqa: BLE001 - told by `_wait`
            self._failure = exc
            _log.error("the server under test is given up: %s", exc)

    def _wait(self, is_done: Callable[[], bool], problem: str) -> None:
        deadline = time.monotonic() + _HEAL_SECONDS
        while not is_done():
            if self._failure is not None:
                raise ServerError(f"{problem}: {self._failure}")
            if time.monotonic() > deadline:
                raise ServerError(f"{problem} after {_HEAL_SECONDS:g} s")
            time.sleep(0.1)


async def _read_all(store: Store) -> list[tuple[str, bytes]]:
    names = [info.name async for info in store.list_prefix()]
    return [(name, await store.get(name)) for name in names]


def _config(store: ChaosStore, model: str) -> Config:
    config = load_config(environ={})
    server = replace(
        config.server,
        http_port=free_port(),
        grpc_port=free_port(),
        metrics_port=free_port(),
        max_repairs=1000,
        probe_seconds=2.0,
        stop_timeout_seconds=30.0,
    )
    engine = replace(
        config.engine,
        model=model,
        arena_bytes=128 * _MEBIBYTE,
        prefill_slice_tokens=CHUNK_TOKENS,
    )
    fetch = replace(
        config.fetch,
        min_hit_tokens=CHUNK_TOKENS,
        deadline_seconds=_LEASE_SECONDS,
        lease_ttl_seconds=_LEASE_SECONDS,
    )
    codec = replace(config.codec, profile="exact", chunk_tokens=CHUNK_TOKENS)
    return replace(
        config, server=server, engine=engine, fetch=fetch, codec=codec, store=store.config
    )
