"""The connector under the loop of the second KV cache manager: named schedules, then any schedule."""

import contextlib

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from tests.unit.trtllm.test_contract import PROMPTS, schedules

from support.trtllm_contract.engine import ContractEngine, Submit, run_schedule


@contextlib.contextmanager
def engine_of(loaded, tmp_path_factory, **options):
    options.setdefault("manager", {})
    engine = ContractEngine(loaded, tmp_path_factory.mktemp("contract"), **options)
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("async_load_tokens", [0, 1])
def test_load_and_save(loaded, references, tmp_path_factory, num_groups, layout, async_load_tokens):
    manager = {"num_groups": num_groups, "luck": None}
    with engine_of(
        loaded,
        tmp_path_factory,
        layout=layout,
        async_load_tokens=async_load_tokens,
        manager=manager,
        num_blocks=161,  # enough for all, so that nothing is preempted
    ) as engine:
        schedule = [Submit(p, len(p) // 32 * 32, max_tokens=14) for p in PROMPTS[:10]]
        run_schedule(engine, references[1], schedule)
        counters = engine.schedulers[0].core.counters
        assert counters.loads == 8
        assert counters.loaded_tokens == 2 * (32 + 56 + 64 + 96)
        assert engine.hub.counters.tickets == 2  # 20 prompt tokens and 12 of the answer


@pytest.mark.parametrize(
    "options",
    [
        {"manager": {"luck": 1}, "num_blocks": 18},
        {"manager": {"luck": 2, "num_groups": 2}, "async_load_tokens": 1, "num_blocks": 18},
        {"manager": {"luck": 3}, "async_load_tokens": 40, "reuse": True, "num_blocks": 18},
        {"manager": {"luck": 4, "tells_cancelled": False}, "num_blocks": 18, "layout": "NHD"},
        {"manager": {"luck": 5, "num_groups": 2}, "num_ranks": 2, "num_blocks": 18},
    ],
    ids=["sync", "async", "reuse", "older", "2-ranks"],
)
def test_any_schedule(loaded, references, tmp_path_factory, options):
    with engine_of(loaded, tmp_path_factory, **options) as engine:

        @settings(
            max_examples=40,
            phases=[Phase.generate],
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(schedules)
        def run(schedule):
            run_schedule(engine, references[options.get("num_ranks", 1)], schedule)

        run()
        assert engine.schedulers[0].core.counters.loads >= 3
        assert engine.hub.counters.tickets >= 3
        counts = engine.ranked.loops[0].counts
        assert counts["deferred"]
        assert counts["short"] + counts["refused"]
        assert counts["preempted"]
