"""Deliberate bugs in the connector: each must be caught by the schedules that the right one passes."""

import pytest

from kvfetcher.engines.connector import entry as trtllm_connector
from kvfetcher.engines.connector import scheduler as scheduler_module
from kvfetcher.engines.connector.messages import Copied
from kvfetcher.engines.connector.scheduler import ConnectorScheduler
from kvfetcher.engines.connector.worker import ConnectorWorker
from kvfetcher.errors import EngineError, LayoutError
from kvfetcher.memory.split_arena import SplitArena
from kvfetcher.spec import HeadRange
from support.engine_rig import some_ids
from support.trtllm_contract.engine import ContractEngine, Steps, Submit, run_schedule

SCHEDULE = [
    Submit(tuple(some_ids(65, seed=1)), 64),
    Submit(tuple(some_ids(64, seed=2)), 64),
    Steps(2),
    Submit(tuple(some_ids(97, seed=1)), 96),
    Submit(tuple(some_ids(40, seed=2)), 32),
    Submit(tuple(some_ids(64, seed=1)), 0, max_tokens=6),
]


def suite(loaded, references, tmp_path_factory, **options):
    """What a mutation has to get past: the same requests, twice, with loads made slow."""
    options = {"copy_seconds": 0.01} | options
    engine = ContractEngine(loaded, tmp_path_factory.mktemp("mutation"), **options)
    try:
        for _ in range(2):
            run_schedule(engine, references[options.get("num_ranks", 1)], SCHEDULE)
    finally:
        engine.close()


@pytest.fixture(params=[1, 2], ids=["1-rank", "2-ranks"])
def num_ranks(request):
    return request.param


@pytest.mark.parametrize("async_load_tokens", [0, 1])
def test_the_connector_as_it_is_passes(
    loaded, references, tmp_path_factory, num_ranks, async_load_tokens
):
    suite(
        loaded,
        references,
        tmp_path_factory,
        num_ranks=num_ranks,
        async_load_tokens=async_load_tokens,
    )


def caught(loaded, references, tmp_path_factory, **options):
    """Whether the suite notices, and by which promise."""
    with pytest.raises((AssertionError, EngineError)) as info:
        suite(loaded, references, tmp_path_factory, **options)
    return str(info.value)


def test_off_by_one_block_is_caught(monkeypatch, loaded, references, tmp_path_factory, num_ranks):
    right = ConnectorScheduler.update_state_after_alloc

    def wrong(self, request, block_ids):
        right(self, request, [*block_ids[1:], block_ids[0]])

    monkeypatch.setattr(ConnectorScheduler, "update_state_after_alloc", wrong)
    assert "tokens differ" in caught(loaded, references, tmp_path_factory, num_ranks=num_ranks)


def test_stale_metadata_executed_twice_is_caught(
    monkeypatch, loaded, references, tmp_path_factory, num_ranks
):
    right = ConnectorWorker.start_load_kv

    def wrong(self, metadata, stream):
        self._executed = 0
        right(self, metadata, stream)

    monkeypatch.setattr(ConnectorWorker, "start_load_kv", wrong)
    assert caught(loaded, references, tmp_path_factory, num_ranks=num_ranks)


def test_offer_of_the_whole_prompt_is_caught(
    monkeypatch, loaded, references, tmp_path_factory, num_ranks
):
    monkeypatch.setattr(
        scheduler_module,
        "usable_tokens",
        lambda lease_tokens, *, prompt_tokens, computed, block: lease_tokens - computed,
    )
    message = caught(loaded, references, tmp_path_factory, num_ranks=num_ranks)
    assert "at least one token must be left" in message


@pytest.mark.parametrize("async_load_tokens", [0, 1])
def test_lease_that_goes_before_the_copy_is_caught(
    monkeypatch, loaded, references, tmp_path_factory, num_ranks, async_load_tokens
):
    right = ConnectorWorker._start

    def wrong(self, load, stream):
        self._sender.send(Copied(load.key))
        right(self, load, stream)

    monkeypatch.setattr(ConnectorWorker, "_start", wrong)
    message = caught(
        loaded,
        references,
        tmp_path_factory,
        num_ranks=num_ranks,
        async_load_tokens=async_load_tokens,
    )
    assert "tokens differ" in message


def test_wrong_head_slice_is_refused_before_the_engine_starts(
    monkeypatch, loaded, references, tmp_path_factory
):
    """The arena's part says whose heads it holds, and it is not the ones that the rank takes for its own."""
    monkeypatch.setattr(
        trtllm_connector,
        "heads_of_rank",
        lambda num_kv_heads, *, rank, num_ranks: HeadRange(0, num_kv_heads // num_ranks),
    )
    with pytest.raises(LayoutError, match=r"start=1, stop=2.* the pool needs .*start=0, stop=1"):
        suite(loaded, references, tmp_path_factory, num_ranks=2)


def test_heads_restored_into_another_ranks_part_are_caught(
    monkeypatch, loaded, references, tmp_path_factory
):
    right = SplitArena.write

    def wrong(self, target, layer_start, values):
        right(self, target, layer_start, values[:, :, ::-1])

    monkeypatch.setattr(SplitArena, "write", wrong)
    message = caught(loaded, references, tmp_path_factory, num_ranks=2)
    assert "tokens differ" in message or "saved KV differs" in message


def test_heads_saved_from_another_ranks_part_are_caught(
    monkeypatch, loaded, references, tmp_path_factory
):
    right = SplitArena.read

    def wrong(self, target, layer_start=0, num_layers=None):
        return right(self, target, layer_start, num_layers)[:, :, ::-1]

    monkeypatch.setattr(SplitArena, "read", wrong)
    assert "saved KV differs" in caught(loaded, references, tmp_path_factory, num_ranks=2)
