"""The graph over remote stores: real servers, copies near by, and what happens when they die."""

from __future__ import annotations

import pytest

from support.engine_rig import write_model
from support.servers import RedisServer, S3Server

from .conftest import CHUNK_TOKENS, DOCUMENT, start_server

pytestmark = [pytest.mark.triton, pytest.mark.slow]

QUESTION = DOCUMENT[: 3 * CHUNK_TOKENS + 10]  # one token per byte


@pytest.fixture
def remote(request, tmp_path, monkeypatch):
    """A store server of this test's own and the settings that name it."""
    if request.param == "redis":
        with RedisServer(tmp_path / "redis", options=["--requirepass", "s3cret"]) as server:
            monkeypatch.setenv("KVFETCHER_STORE_PASSWORD", "s3cret")
            yield server, {"kind": "redis", "url": server.url}
    else:
        with S3Server(tmp_path / "s3") as server:
            for name, value in S3Server.environment.items():
                monkeypatch.setenv(name, value)
            yield server, {"kind": "s3", "url": "s3://chunks/kv", "endpoint": server.endpoint}


@pytest.mark.parametrize(
    "remote", [pytest.param("redis", marks=pytest.mark.redis), "s3"], indirect=True
)
def test_a_remote_store_and_copies_near_by_that_outlive_it(remote, tmp_path):
    server, store = remote
    store = {
        **store,
        "timeout_seconds": 5.0,
        "tier_disk_bytes": 100_000_000,
        "tier_path": str(tmp_path / "tier"),
    }
    engine = {"model": str(write_model(tmp_path / "model", max_position_embeddings=4096))}
    with start_server(tmp_path / "unused", store=store, engine=engine) as running:
        miss = running.client.generate(QUESTION, max_tokens=8)
        assert miss.report.raw["outcome"] == "miss"
        running.settle()
        hit = running.generate_hit(QUESTION, max_tokens=8)
        assert hit.report.hit_tokens == 3 * CHUNK_TOKENS
        assert hit.output_ids == miss.output_ids
        server.kill()
        near = running.client.generate(QUESTION, max_tokens=8, kv_policy="fetch")
        assert near.report.hit_tokens == 3 * CHUNK_TOKENS
        assert near.output_ids == miss.output_ids
        far = running.client.generate(f"Other {QUESTION}", max_tokens=8, kv_policy="fetch")
        assert (far.report.raw["outcome"], far.report.hit_tokens) == ("miss", 0)
        assert far.report.raw["reason"] in ("store_error", "store_unavailable")
        log = running.server.log_path.read_text(errors="replace")
        assert "s3cret" not in log
        assert S3Server.environment["AWS_SECRET_ACCESS_KEY"] not in log
