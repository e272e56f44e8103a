"""The whole graph in front of the engines behind the KV connector: what is fetched reaches them through it."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import support
from kvfetcher.launcher.repository import find_repository
from support.engine_rig import edit_json, write_model

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
        assert hit.report.hit_tokens == 3 * CHUNK_TOKENS, hit.report.raw
        assert hit.report.raw["engine"]["cached_tokens"] == 3 * CHUNK_TOKENS
        assert hit.text == miss.text
        with ThreadPoolExecutor(8) as pool:
            again = list(pool.map(lambda _: ask(second, kv_policy="fetch"), range(8)))
        assert {answer.text for answer in again} == {miss.text}
        second.settle()


@pytest.fixture
def with_stand_in(tmp_path):
    """The project's models; the stub of the LLM finds a stand-in where TensorRT-LLM would be."""
    folder = tmp_path / "models"
    shutil.copytree(find_repository(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    tests = Path(support.__path__[0])
    path = [str(tests / "trtllm_stand_in"), str(tests.parent)]
    model = folder / "tensorrt_llm" / "1" / "model.py"
    # The stub takes no PYTHONPATH.
    model.write_text(f"import sys\n\nsys.path[:0] = {path!r}\n" + model.read_text())
    return folder


def test_tensorrt_llm_saves_and_another_server_hits_it(tmp_path, tmp_path_factory, with_stand_in):
    """The engine `tensorrt_llm` itself, over a stand-in of its package."""
    folder = write_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)
    edit_json(folder / "config.json", dtype="bfloat16")
    arguments = tmp_path / "llm_args.yaml"
    arguments.write_text("max_batch_size: 4\n")
    engine = ENGINE | {
        "kind": "tensorrt_llm",
        "model": str(folder),
        "llm_args": str(arguments),
        "tokens_per_block": 16,
    }
    options = {"engine": engine, "repository": with_stand_in}
    with start_server(tmp_path / "store", **options) as first:
        miss = ask(first)
        assert miss.report.hit_tokens == 0
        assert miss.report.raw["engine"]["metrics"]["kv_cache_metrics"]["reused_blocks"] == 2
        assert len(first.settle()) == 3
    with start_server(tmp_path / "store", **options) as second:
        hit = ask(second, kv_policy="fetch")
        assert hit.report.raw["outcome"] == "hit", hit.report.raw
        assert hit.report.raw["engine"]["cached_tokens"] == 3 * CHUNK_TOKENS
        assert hit.text == miss.text
        second.settle()
