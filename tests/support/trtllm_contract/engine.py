"""An engine of one or several ranks in threads, its arena's owner, and schedules that it runs."""

import contextlib
import copy
import dataclasses
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from threading import BrokenBarrierError
from types import SimpleNamespace

import numpy as np
import torch

from kvfetcher.engines.connector import entry as trtllm_connector
from kvfetcher.engines.connector.pool import PagedPool
from kvfetcher.engines.connector.server import ConnectorHub, HubSettings
from kvfetcher.engines.paged import contract
from kvfetcher.engines.paged.executor import NewRequest, Rules
from kvfetcher.engines.paged.model import PagedModel
from kvfetcher.memory.leases import tokens_digest
from kvfetcher.memory.split_arena import create_arena
from kvfetcher.spec import HeadRange, heads_of_rank
from support.trtllm_contract import v2
from support.trtllm_contract.loop import (
    ContractLoop,
    GreedySink,
    KeepingLoop,
    NoScheduler,
    NoWorker,
    ScribblingLeases,
)
from support.trtllm_contract.ranks import Exchange, ThreadRanks

BLOCK, PART, CHUNK = 8, 16, 32
STEP_SECONDS = 60
SETTLE_SECONDS = 10


def llm_args(**changes):
    """The part of TorchLlmArgs that matters here."""
    cache = {"enable_block_reuse": True, "enable_partial_reuse": False, "host_cache_size": 0}
    return SimpleNamespace(
        kv_cache_config=SimpleNamespace(**cache | changes.pop("kv_cache_config", {})),
        scheduler_config=SimpleNamespace(
            capacity_scheduler_policy=changes.pop("policy", "GUARANTEED_NO_EVICT")
        ),
        **{"backend": "pytorch", "max_beam_width": 1} | changes,
    )


def arena_of(spec, folder, *, num_ranks, num_blocks):
    """An arena in host memory with a part for the heads of every rank."""
    heads = [
        heads_of_rank(spec.num_kv_heads, rank=i, num_ranks=num_ranks) for i in range(num_ranks)
    ]
    places = dict.fromkeys(heads)
    num_bytes = 4096 * len(places) + num_blocks * BLOCK * spec.bytes_per_token
    return create_arena(
        folder / "arena", spec=spec, tokens_per_block=BLOCK, num_bytes=num_bytes, places=places
    )


def on_rank(loaded):
    """A model that a rank may cut down."""
    return dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))


class Ranked:
    """Ranks in threads, stepped together."""

    def __init__(self, loaded, num_ranks, make):
        self.threads = ThreadPoolExecutor(num_ranks)
        exchange = Exchange(num_ranks)
        self.loops = self._all(
            [
                functools.partial(make, on_rank(loaded), ThreadRanks(exchange, rank))
                for rank in range(num_ranks)
            ]
        )
        self.exchange = exchange

    def _all(self, calls):
        futures = [self.threads.submit(call) for call in calls]
        faults = [future.exception(timeout=STEP_SECONDS) for future in futures]
        for fault in sorted(filter(None, faults), key=lambda f: isinstance(f, BrokenBarrierError)):
            raise fault  # the one that failed first, not those who waited for it
        return [future.result() for future in futures]

    def step(self):
        self._all([functools.partial(self._step, loop) for loop in self.loops])

    def _step(self, loop):
        try:
            with torch.inference_mode():
                loop.step()
        except BaseException:
            self.exchange.barrier.abort()  # the others wait for this one
            raise

    def close(self):
        self.threads.shutdown()


class Reference:
    """Tokens and KV bytes of prompts, computed without any connector."""

    def __init__(self, loaded, *, num_ranks=1, max_tokens=16):
        self._loaded, self._num_ranks, self._max_tokens = loaded, num_ranks, max_tokens
        self._known = {}

    def __call__(self, prompt):
        prompt = tuple(prompt)
        if prompt not in self._known:
            self._known[prompt] = self._compute(prompt)
        return self._known[prompt]

    def _compute(self, prompt):
        sink, parts = GreedySink(), {}

        def make(loaded, ranks):
            model = PagedModel(loaded, ranks=ranks, num_blocks=64, tokens_per_block=BLOCK)
            heads = HeadRange(0, max(1, loaded.spec.num_kv_heads // ranks.size))
            pool = PagedPool(model.kv.pool, spec=loaded.spec, heads=heads, tokens_per_block=BLOCK)

            def keep(blocks):
                whole = pool.parts[0]
                values = torch.cat([pool.view(whole, i, 1, "HND")[0] for i in blocks], dim=3)
                parts[ranks.rank] = values.numpy().view(np.uint16)

            return KeepingLoop(
                model,
                ranks=ranks,
                scheduler=NoScheduler(None) if ranks.rank == 0 else None,
                worker=NoWorker(None),
                rules=Rules(part_tokens=PART, max_batch=4, tokens_per_block=BLOCK, reuse=False),
                sink=sink if ranks.rank == 0 else None,
                keep=keep,
            )

        ranked = Ranked(self._loaded, self._num_ranks, make)
        ranked.loops[0].submit(NewRequest(1, prompt, self._max_tokens, ""))
        while not sink.ends:
            ranked.step()
        ranked.close()
        sharing = max(1, self._num_ranks // self._loaded.spec.num_kv_heads)
        values = np.concatenate([parts[i] for i in range(0, self._num_ranks, sharing)], axis=2)
        return tuple(sink.tokens[1]), values


class ContractEngine:
    """Ranks with the connector under test, and the owner of their arena.

    `copy_seconds` makes every load slow, so that a lease that goes too early is read too late.
    """

    def __init__(
        self,
        loaded,
        folder,
        *,
        num_ranks=1,
        layout="HND",
        async_load_tokens=0,
        reuse=False,
        copy_seconds=0.0,
        tells_salt=True,
        num_blocks=64,
        arena_blocks=96,
        manager=None,
    ):
        self._manager = manager  # of V2: arguments of `V2Loop`
        self._stack = contextlib.ExitStack()
        self.loaded, self.num_ranks = loaded, num_ranks
        self.faults = []
        spec = loaded.spec
        self.arena = arena_of(spec, folder, num_ranks=num_ranks, num_blocks=arena_blocks)
        self._stack.callback(self.arena.close)
        self.leases = ScribblingLeases(num_blocks=self.arena.num_blocks, tokens_per_block=BLOCK)
        self.leases.arena = self.arena
        self.hub = ConnectorHub(
            folder / "c.sock",
            num_ranks=num_ranks,
            arena=self.arena,
            leases=self.leases,
            settings=HubSettings(
                spec=spec,
                tokens_per_block=BLOCK,
                chunk_tokens=CHUNK,
                layout=layout,
                async_load_tokens=async_load_tokens,
                save_timeout_seconds=5.0,
                save_generated=True,
                lease_ttl_seconds=60.0,
            ),
            clock=time.monotonic,
        )
        self._stack.callback(self.hub.close)
        self.sink = GreedySink()
        self.workers, self.schedulers = [], []
        self._copy_seconds = copy_seconds

        def make(cut, ranks):
            return self._make_rank(cut, ranks, layout, num_blocks, reuse, tells_salt)

        self.ranked = Ranked(loaded, num_ranks, make)
        self._stack.callback(self.ranked.close)
        for part in (*self.workers, *self.schedulers):
            self._stack.callback(part.close)
        self._stack.callback(self.hub.expect_end)
        self.hub.wait_ready(10)
        self._next_id = 1
        self.open = {}

    def _make_rank(self, cut, ranks, layout, num_blocks, reuse, tells_salt):
        manager = self._manager
        api, arguments, kind = contract, llm_args(), ContractLoop
        if manager is not None:
            api = v2.interface(tells_cancelled=manager.get("tells_cancelled", True))
            arguments = llm_args(
                kv_cache_config={"use_kv_cache_manager_v2": "auto"}, policy="MAX_UTILIZATION"
            )
            kind = functools.partial(v2.V2Loop, **manager)
        classes = trtllm_connector.bind(
            api,
            place=lambda: trtllm_connector.RankPlace(ranks.rank, ranks.size),
            socket_path=self.hub.path,
        )
        worker = classes.worker(arguments)
        worker.core.fatal = self._fail
        scheduler = classes.scheduler(arguments) if ranks.rank == 0 else None
        self.workers.append(worker)
        if scheduler is not None:
            self.schedulers.append(scheduler)
        loop = kind(
            PagedModel(
                cut, ranks=ranks, num_blocks=num_blocks, tokens_per_block=BLOCK, layout=layout
            ),
            ranks=ranks,
            scheduler=scheduler,
            worker=worker,
            rules=Rules(
                part_tokens=PART,
                max_batch=4,
                tokens_per_block=BLOCK,
                reuse=reuse,
                tells_salt=tells_salt,
            ),
            sink=self.sink if ranks.rank == 0 else None,
        )
        if self._copy_seconds:
            copier = worker.core._copier
            fast = copier.load

            def slow(*args, **kwargs):
                time.sleep(self._copy_seconds)
                return fast(*args, **kwargs)

            copier.load = slow
        return loop

    def _fail(self, reason):
        self.faults.append(reason)

    def lease(self, prompt, tokens, values):
        """What a fetch leaves: a claimed lease with the KV of the prompt's first tokens."""
        lease = self.leases.lease(tokens, 60.0, now=time.monotonic())
        target = self.arena.target(lease.block_ids, tokens)
        self.arena.write(target, 0, np.ascontiguousarray(values[:, :, :, :tokens]))
        now = time.monotonic()
        self.leases.seal(lease.id, tokens, tokens_digest(prompt[:tokens]), now=now)
        return self.leases.claim(lease.id, now=now)

    def submit(self, prompt, *, max_tokens=4, lease=None, save=False, salt=""):
        """Announce and submit; returns the request's id."""
        handle = self.hub.announce(tuple(prompt), cache_salt=salt, lease=lease, save=save)
        assert handle.is_announced.result(timeout=5)
        request_id, self._next_id = self._next_id, self._next_id + 1
        self.open[request_id] = handle
        self.ranked.loops[0].submit(NewRequest(request_id, tuple(prompt), max_tokens, salt))
        return request_id

    def cancel(self, request_id):
        self.ranked.loops[0].cancel(request_id)

    def replay(self, request_id):
        self.ranked.loops[0].replays.append(request_id)

    def step(self):
        self.ranked.step()

    def drain(self, seconds=SETTLE_SECONDS):
        """Step until nothing runs, loads or saves on any rank."""
        deadline = time.monotonic() + seconds
        while any(loop.has_input or not loop.is_idle for loop in self.ranked.loops):
            assert time.monotonic() < deadline, "the engine never came to rest"
            self.step()
        for handle in self.open.values():
            self.hub.settle(handle, save=True)
        return {i: handle.ticket.result(timeout=SETTLE_SECONDS) for i, handle in self.open.items()}

    def close(self):
        self._stack.close()

    # What must hold

    def check_at_rest(self):
        """Nothing is held by anybody, and nothing was wrong on the way."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.leases.usage()["free"] < self.arena.num_blocks or self.hub.num_open:
            assert time.monotonic() < deadline, (self.leases.usage(), self.hub.num_open)
            time.sleep(0.002)
        assert not self.faults
        assert self.schedulers[0].core.counters.faults == 0
        assert not self.schedulers[0].core._tracked
        assert not self.schedulers[0].core._resting
        for loop, worker in zip(self.ranked.loops, self.workers, strict=True):
            assert loop.pool.num_free == loop.pool.num_blocks, "a pool block leaked"
            requests = worker.core._requests
            for left in ("loading", "reported_loading", "saving", "copying", "settled"):
                assert not getattr(requests, left), left


@dataclasses.dataclass(frozen=True)
class Submit:
    prompt: tuple
    lease_tokens: int = 0
    save: bool = True
    max_tokens: int = 4


@dataclasses.dataclass(frozen=True)
class Cancel:
    nth: int


@dataclasses.dataclass(frozen=True)
class Replay:
    nth: int


@dataclasses.dataclass(frozen=True)
class Steps:
    number: int


def run_schedule(engine, reference, schedule):
    """Run a schedule and check every promise; AssertionError names the one that broke."""
    submitted = []
    for action in schedule:
        if isinstance(action, Submit):
            lease = None
            if action.lease_tokens:
                lease = engine.lease(
                    action.prompt, action.lease_tokens, reference(action.prompt)[1]
                )
            submitted.append(
                engine.submit(
                    action.prompt, lease=lease, save=action.save, max_tokens=action.max_tokens
                )
            )
            engine.actions = getattr(engine, "actions", {}) | {submitted[-1]: action}
        elif isinstance(action, Steps):
            for _ in range(action.number):
                engine.step()
        elif submitted:
            request_id = submitted[action.nth % len(submitted)]
            (engine.cancel if isinstance(action, Cancel) else engine.replay)(request_id)
    tickets = engine.drain()
    for request_id in submitted:
        action = engine.actions[request_id]
        tokens, values = reference(action.prompt)
        got = tuple(engine.sink.tokens.get(request_id, ()))
        assert got == tokens[: len(got)], "tokens differ from computing everything"
        assert request_id in engine.sink.ends, "a request never ended"
        if engine.sink.ends[request_id] == "length":
            assert len(got) == action.max_tokens
        _check_ticket(engine, tickets[request_id], action, tokens, values)
        engine.open.pop(request_id)
    engine.check_at_rest()


def _check_ticket(engine, ticket, action, tokens, values):
    if ticket is None:
        return
    assert action.save, "saved what nobody asked to save"
    for number, target in enumerate(ticket.targets, start=ticket.first_chunk_index):
        first = number * CHUNK
        np.testing.assert_array_equal(
            engine.arena.read(target),
            values[:, :, :, first : first + CHUNK],
            err_msg="saved KV differs from what was computed",
        )
    assert ticket.token_ids == (*action.prompt, *tokens)[: len(ticket.token_ids)]
    engine.leases.release(ticket.lease_id, now=time.monotonic())
