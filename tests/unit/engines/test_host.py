"""The host: one call opens everything another process needs, one call leaves nothing behind."""

from types import SimpleNamespace

import numpy as np
import pytest

from kvfetcher.config import CodecConfig, Config, EngineConfig
from kvfetcher.engines.base import GenerateRequest, SamplingParams
from kvfetcher.engines.host import EngineHost
from kvfetcher.errors import ArenaError, EngineError
from kvfetcher.memory.control import ControlClient, socket_path
from kvfetcher.memory.leases import LeaseClaim, tokens_digest
from kvfetcher.memory.split_arena import attach_arena
from kvfetcher.spec import ModelIdentity, RopeFacts
from support.engine_rig import BLOCK, CHUNK, SLICE, collect, some_ids


def config_of(model_folder, **engine):
    settings = {
        "model": str(model_folder),
        "device": "cpu",
        "prefill_slice_tokens": SLICE,
        "tokens_per_block": BLOCK,
        "arena_bytes": 1 << 20,
    }
    return Config(engine=EngineConfig(**settings | engine), codec=CodecConfig(chunk_tokens=CHUNK))


def open_host(tmp_path, config):
    for name in ("run", "shm"):
        (tmp_path / name).mkdir(exist_ok=True)
    return EngineHost(config, run_folder=tmp_path / "run", arena_folder=tmp_path / "shm")


async def test_a_saver_and_a_fetcher_work_through_the_socket(tmp_path, model_folder):
    """What kv_save and kv_fetch do, with nothing but the control socket and the arena file."""
    ids = tuple(some_ids(80))
    with (
        open_host(tmp_path, config_of(model_folder)) as host,
        ControlClient(socket_path(tmp_path / "run"), timeout_seconds=10) as client,
    ):
        facts = client.describe()
        assert ModelIdentity.from_dict(facts["identity"]).spec == host.arena.spec
        assert [len(row) for row in RopeFacts.from_dict(facts["rope"]).inv_freq] == [4, 4, 4]
        arena = attach_arena(facts["arena"], generation=facts["generation"])

        request = GenerateRequest(ids, SamplingParams(max_tokens=6), save=True, cache_salt="s")
        full = await collect(host.engine.generate(request))
        ticket = full.ticket
        assert ticket.to_dict()["cache_salt"] == "s"
        chunks = [arena.read(target) for target in ticket.targets]
        client.renew(ticket.lease_id)
        client.release(ticket.lease_id)

        lease_id, target = client.lease(64, ttl_seconds=30)
        for layer in range(3):
            values = np.concatenate(chunks, axis=3)[layer : layer + 1]
            arena.write(target, layer, values)
        client.seal(lease_id, num_tokens=64, digest=tokens_digest(ids[:64]))
        claim = LeaseClaim.from_json(LeaseClaim(lease_id, 64, facts["generation"]).to_json())
        request = GenerateRequest(ids, SamplingParams(max_tokens=6), lease=claim)
        hit = await collect(host.engine.generate(request))
        assert hit.ids == full.ids
        assert hit.timings[0].cached_tokens == 64
        stats = client.stats()
        assert stats["leases_used"] == 1
        assert stats["blocks"]["free"] == stats["blocks"]["total"]
        arena.close()
    assert list((tmp_path / "run").iterdir()) == []
    assert list((tmp_path / "shm").iterdir()) == []


def test_failed_start_leaves_nothing(tmp_path, model_folder):
    with pytest.raises(EngineError, match="neither a built-in model"):
        open_host(tmp_path, config_of(tmp_path / "none"))
    with pytest.raises(ArenaError, match="cannot be created"):
        EngineHost(
            config_of(model_folder), run_folder=tmp_path / "run", arena_folder=tmp_path / "none"
        )
    with pytest.raises(ArenaError, match="cannot be written"):
        EngineHost(
            config_of(model_folder), run_folder=tmp_path / "none", arena_folder=tmp_path / "shm"
        )
    assert list((tmp_path / "run").iterdir()) == []
    assert list((tmp_path / "shm").iterdir()) == []


def test_arenas_of_the_dead_are_swept_and_those_of_the_living_left(tmp_path, model_folder):
    with open_host(tmp_path, config_of(model_folder)) as first:
        dead = [tmp_path / "shm" / f"kvfetcher-1-dead-arena{end}" for end in ("", ".0", ".11")]
        for file in dead:
            file.write_bytes(b"left behind")
        (tmp_path / "shm" / "somebody-elses").touch()
        (tmp_path / "other").mkdir()
        with EngineHost(
            config_of(model_folder), run_folder=tmp_path / "other", arena_folder=tmp_path / "shm"
        ) as second:
            assert not any(file.exists() for file in dead)
            assert first.arena.path.exists()
            assert second.arena.path.exists()
    assert [p.name for p in (tmp_path / "shm").iterdir()] == ["somebody-elses"]


@pytest.mark.parametrize("is_broken", [False, True])
def test_an_engine_is_lost_with_a_gpu_of_its_own(tmp_path, model_folder, is_broken):
    with open_host(tmp_path, config_of(model_folder)) as host:
        assert host._contexts == [], "it has no GPU"
        assert not host.is_lost()
        host._contexts = [
            SimpleNamespace(is_lost=lambda broken=broken: broken) for broken in (False, is_broken)
        ]
        assert host.is_lost() is is_broken
