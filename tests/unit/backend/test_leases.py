"""The engine's lease service over a real control socket: what is asked, and how often."""

import asyncio
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvfetcher.backend.leases import EngineLeases
from kvfetcher.config import Config
from kvfetcher.errors import EngineError
from kvfetcher.memory.arena import Arena
from kvfetcher.memory.control import ControlServer, socket_path
from kvfetcher.memory.leases import LeaseTable
from kvfetcher.spec import KVSpec

PREFILL = {"base_seconds": 0.001, "slope_seconds": 1e-6, "num_slices": 3}


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFETCHER_RUN_DIR", str(tmp_path))
    arena = Arena.create(
        tmp_path / "arena",
        spec=KVSpec(num_layers=1, num_kv_heads=1, head_dim=8),
        tokens_per_block=16,
        num_bytes=1 << 20,
    )
    table = LeaseTable(num_blocks=arena.num_blocks, tokens_per_block=16)
    asked = []

    def stats():
        asked.append(1)
        return {"prefill": PREFILL}

    server = ControlServer(
        socket_path(),
        arena=arena,
        leases=table,
        describe=dict,
        stats=stats,
        was_cancelled=lambda fetch_id: fetch_id == "gone",
    )
    leases = EngineLeases(Config())
    leases._facts = types.SimpleNamespace(tokens_per_block=16)
    yield types.SimpleNamespace(leases=leases, asked=asked, arena=arena, table=table, server=server)
    leases.close()
    server.close()
    arena.close()


async def test_many_requests_at_once_ask_for_the_pace_once(engine, monkeypatch):
    paces = await asyncio.gather(*(engine.leases.throughput() for _ in range(50)))
    assert len(engine.asked) == 1
    assert {pace.arena_tokens for pace in paces} == {engine.arena.num_blocks * 16}
    assert paces[0].prefill.seconds(0, 1) == pytest.approx(0.001)
    monkeypatch.setattr("kvfetcher.backend.leases._PACE_SECONDS", 0.0)
    await engine.leases.throughput()
    assert len(engine.asked) == 2


async def test_an_engine_that_is_gone_is_asked_again_later(engine, monkeypatch):
    monkeypatch.setattr("kvfetcher.backend.leases._PACE_SECONDS", 0.0)
    engine.server.close()
    for _ in range(2):
        with pytest.raises(EngineError, match="did not answer"):
            await engine.leases.throughput()


async def test_a_lease_is_sealed_for_several_and_shared(engine):
    leases = engine.leases
    lease_id, _ = await leases.lease(64, 30.0)
    await leases.seal(lease_id, 32, "digest", num_holders=2, tail_is_live=True)
    await leases.share(lease_id)
    assert engine.table.usage()["sealed"] == engine.table.usage()["resting"] == 2
    for _ in range(3):
        await leases.release(lease_id)
    assert engine.table.usage()["sealed"] == 0


async def test_who_went_away_is_asked_of_the_engine_process(engine):
    assert await engine.leases.was_cancelled("gone")
    assert not await engine.leases.was_cancelled("there")


async def test_leases_are_granted_while_every_thread_of_the_loop_hangs(engine):
    loop, end = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(2))
    hanging = [asyncio.create_task(asyncio.to_thread(end.wait)) for _ in range(8)]
    try:
        async with asyncio.timeout(5):
            lease_id, _ = await engine.leases.lease(64, 30.0)
            await engine.leases.throughput()
            await engine.leases.release(lease_id)
    finally:
        end.set()
        await asyncio.gather(*hanging)
