"""The paged loop's own rules: what a connector may not answer, and who runs first."""

import pytest

from kvfetcher.engines.paged.contract import OneRank
from kvfetcher.engines.paged.executor import NewRequest, PagedExecutor, PagedRequest, Rules
from kvfetcher.engines.paged.model import PagedModel
from kvfetcher.errors import EngineError
from support.engine_rig import some_ids
from support.trtllm_contract.loop import GreedySink, NoScheduler, NoWorker


def executor_of(loaded, *, offer=(0, False), num_blocks=32, **rules):
    class Scheduler(NoScheduler):
        def get_num_new_matched_tokens(self, request, num_computed_tokens):
            return offer

    return PagedExecutor(
        PagedModel(loaded, ranks=OneRank(), num_blocks=num_blocks, tokens_per_block=8),
        ranks=OneRank(),
        scheduler=Scheduler(None),
        worker=NoWorker(None),
        rules=Rules(**{"part_tokens": 16, "max_batch": 4, "tokens_per_block": 8} | rules),
        sink=GreedySink(),
    )


def run(executor):
    while executor.has_input or not executor.is_idle:
        executor.step()


@pytest.mark.parametrize(
    ("offer", "message"),
    [
        ((0, True), "offered nothing, asynchronously"),
        ((24, False), "at least one token must be left"),
    ],
)
def test_connector_that_breaks_the_rules_ends_the_loop(loaded, offer, message):
    executor = executor_of(loaded, offer=offer)
    executor.submit(NewRequest(1, tuple(some_ids(24)), 4, ""))
    with pytest.raises(EngineError, match=message):
        executor.step()


def test_there_is_one_beam():
    request = PagedRequest(1, 2, 3, "", [5, 6])
    assert request.get_tokens(0) == [5, 6]
    with pytest.raises(EngineError, match="one beam"):
        request.get_tokens(1)


def test_scheduler_and_sink_are_rank_0s(loaded):
    with pytest.raises(EngineError, match="belong on rank 0"):
        PagedExecutor(
            PagedModel(loaded, ranks=OneRank(), num_blocks=4, tokens_per_block=8),
            ranks=OneRank(),
            scheduler=None,
            worker=NoWorker(None),
            rules=Rules(part_tokens=16, max_batch=4, tokens_per_block=8),
            sink=None,
        )


def test_request_waits_until_it_can_run_to_its_end(loaded):
    executor = executor_of(loaded, num_blocks=6, reuse=False)
    assert executor.fits(40, 8)
    assert not executor.fits(41, 8)
    for number in range(3):
        executor.submit(NewRequest(number, tuple(some_ids(20, seed=number)), 10, ""))
    executor.step()
    assert [r.is_allocated for r in executor.requests.values()] == [True, False, False]
    run(executor)
    assert [len(executor._sink.tokens[number]) for number in range(3)] == [10] * 3
    assert executor.pool.num_free == 6


def test_cancelled_before_it_ran(loaded):
    executor = executor_of(loaded, num_blocks=6)
    for number in range(2):
        executor.submit(NewRequest(number, tuple(some_ids(20, seed=number)), 20, ""))
    executor.step()
    executor.cancel(1)
    executor.cancel(99)  # nobody
    run(executor)
    assert executor._sink.ends == {1: "cancelled", 0: "length"}
    assert executor.pool.num_free == 6


def test_decode_goes_on_while_a_long_prompt_is_computed(loaded):
    executor = executor_of(loaded)
    executor.submit(NewRequest(1, tuple(some_ids(10)), 12, ""))
    executor.step()
    executor.submit(NewRequest(2, tuple(some_ids(160)), 4, ""))
    for _ in range(5):
        executor.step()
    assert len(executor._sink.tokens[1]) == 6
    assert executor.requests[2].position == 80
    run(executor)
