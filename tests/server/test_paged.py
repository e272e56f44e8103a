"""The whole graph in front of the paged engine: what is fetched reaches it through the KV connector."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from support.engine_rig import write_model

from .conftest import CHUNK_TOKENS, DOCUMENT, start_server

pytestmark = [pytest.mark.triton, pytest.mark.slow]

QUESTION = DOCUMENT[: 3 * CHUNK_TOKENS + 10]  # one token per byte
ENGINE = {"kind": "paged", "arena_bytes": 64 << 20}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


def ask(running, text=QUESTION, **options):
    return running.client.generate(text, max_tokens=12, min_length=12, **options)


def test_miss_is_saved_and_another_server_hits_it(tiny_model, tmp_path):
    engine = ENGINE | {"model": str(tiny_model)}
    with start_server(tmp_path / "store", engine=engine) as first:
        miss = ask(first)
        assert miss.report.hit_tokens == 0
        assert len(first.settle()) == 3
    with start_server(
        tmp_path / "store", engine=engine, connector={"async_load_tokens": CHUNK_TOKENS}
    ) as second:
        hit = ask(second, kv_policy="fetch")
        assert (hit.report.raw["outcome"], hit.report.hit_tokens) == ("hit", 3 * CHUNK_TOKENS)
        assert hit.report.raw["engine"]["cached_tokens"] == 3 * CHUNK_TOKENS
        assert hit.text == miss.text
        with ThreadPoolExecutor(8) as pool:
            again = list(pool.map(lambda _: ask(second, kv_policy="fetch"), range(8)))
        assert {answer.text for answer in again} == {miss.text}
        second.settle()
