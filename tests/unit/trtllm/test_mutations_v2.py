"""Deliberate bugs under the second KV cache manager: each must be caught by schedules that the right one passes."""

import pytest

from kvfetcher.engines.connector import pool as pool_module
from kvfetcher.engines.connector.messages import Copied
from kvfetcher.engines.connector.scheduler import ConnectorScheduler
from kvfetcher.engines.connector.worker import ConnectorWorker
from kvfetcher.errors import EngineError
from support.engine_rig import some_ids
from support.trtllm_contract import engine as engine_module
from support.trtllm_contract.engine import (
    Cancel,
    ContractEngine,
    Replay,
    Steps,
    Submit,
    run_schedule,
)

SCHEDULE = [
    *(Submit(tuple(some_ids(64, seed=seed)), 64) for seed in (5, 6, 7)),
    Steps(1),
    *(Cancel(nth) for nth in range(3)),  # some of them asked, and waiting for the answer
    Submit(tuple(some_ids(65, seed=1)), 64),
    Submit(tuple(some_ids(64, seed=2)), 64),
    Submit(tuple(some_ids(97, seed=3)), 96, max_tokens=6),
    Steps(2),
    Replay(3),
    Submit(tuple(some_ids(97, seed=1)), 96, max_tokens=8),
    Steps(1),
    Submit(tuple(some_ids(40, seed=2)), 32),
    Cancel(7),
    Submit(tuple(some_ids(64, seed=1)), 0, max_tokens=6),
    Submit(tuple(some_ids(40, seed=4)), 32, max_tokens=16),
    Steps(4),
    Replay(9),
    Replay(8),
]


def suite(loaded, references, tmp_path_factory, **options):
    """What a mutation has to get past: the same requests under four throws of the dice."""
    for luck in range(4):
        engine = ContractEngine(
            loaded,
            tmp_path_factory.mktemp("mutation"),
            manager={"num_groups": 2, "luck": luck},
            num_blocks=34,
            **options,
        )
        try:
            run_schedule(engine, references[1], SCHEDULE)
        finally:
            engine.close()


@pytest.mark.parametrize("async_load_tokens", [0, 1])
def test_the_connector_as_it_is_passes(loaded, references, tmp_path_factory, async_load_tokens):
    suite(
        loaded,
        references,
        tmp_path_factory,
        async_load_tokens=async_load_tokens,
        copy_seconds=0.005,
    )


@pytest.fixture
def caught(monkeypatch, loaded, references, tmp_path_factory):
    """Run the suite; what it says of the mutation."""
    monkeypatch.setattr(engine_module, "SETTLE_SECONDS", 1.5)

    def run(**options):
        with pytest.raises((AssertionError, EngineError, TimeoutError)) as info:
            suite(loaded, references, tmp_path_factory, **options)
        return str(info.value)

    return run


def test_one_groups_ids_used_for_all_are_caught(monkeypatch, caught):
    right = ConnectorScheduler.update_state_after_alloc_by_layer_group
    monkeypatch.setattr(
        ConnectorScheduler,
        "update_state_after_alloc_by_layer_group",
        lambda self, request, groups: right(self, request, [groups[0]] * len(groups)),
    )
    assert "tokens differ" in caught()


def test_k_and_v_by_their_place_instead_of_their_role_are_caught(monkeypatch, caught):
    """One range holds V before K."""
    monkeypatch.setattr(pool_module, "_ROLES", {"key": 1, "value": 0})
    message = caught()
    assert "tokens differ" in message or "saved KV differs" in message


def test_a_deferred_offer_taken_for_a_fault_is_caught(monkeypatch, caught):
    right = ConnectorScheduler.build_connector_meta

    def wrong(self, output):
        self._is_v2 = False
        return right(self, output)

    monkeypatch.setattr(ConnectorScheduler, "build_connector_meta", wrong)
    caught()


def test_a_preempted_request_saved_as_if_it_had_ended_is_caught(monkeypatch, caught):
    """Its blocks are another's by the time they are read."""
    right = ConnectorScheduler.request_finished_by_layer_group

    def wrong(self, request, groups):
        request.is_finished = True
        return right(self, request, groups)

    monkeypatch.setattr(ConnectorScheduler, "request_finished_by_layer_group", wrong)
    caught()


def test_a_reset_that_is_not_heard_is_caught(monkeypatch, caught):
    """Its load goes into blocks that it has lost."""
    monkeypatch.setattr(ConnectorScheduler, "request_reset", lambda self, request: None)
    caught(async_load_tokens=1, copy_seconds=0.01)


def test_a_cancelled_offer_that_is_not_heard_is_caught(monkeypatch, caught):
    """The lease of a request that never ran is never let go."""
    monkeypatch.setattr(ConnectorScheduler, "cancel_load", lambda self, request, start, end: None)
    caught()


def test_a_lease_that_goes_before_the_copy_is_caught(monkeypatch, caught):
    right = ConnectorWorker._start

    def wrong(self, load, stream):
        self._sender.send(Copied(load.key))
        right(self, load, stream)

    monkeypatch.setattr(ConnectorWorker, "_start", wrong)
    assert "tokens differ" in caught(copy_seconds=0.01)
