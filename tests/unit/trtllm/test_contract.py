"""The connector under the documented loop: named schedules, then any schedule."""

import contextlib
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvfetcher.engines.hf.loader import load_model
from kvfetcher.engines.paged.model import PagedModel
from kvfetcher.errors import EngineError
from support.engine_rig import some_ids, write_model
from support.trtllm_contract.engine import (
    Cancel,
    ContractEngine,
    Reference,
    Replay,
    Steps,
    Submit,
    on_rank,
    run_schedule,
)

PROMPTS = tuple(
    tuple(some_ids(length, seed=seed)) for seed in range(1, 5) for length in (20, 40, 64, 65, 97)
)


@contextlib.contextmanager
def engine_of(loaded, tmp_path_factory, **options):
    engine = ContractEngine(loaded, tmp_path_factory.mktemp("contract"), **options)
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("async_load_tokens", [0, 1])
def test_load_and_save(loaded, references, tmp_path_factory, num_ranks, layout, async_load_tokens):
    with engine_of(
        loaded,
        tmp_path_factory,
        num_ranks=num_ranks,
        layout=layout,
        async_load_tokens=async_load_tokens,
    ) as engine:
        schedule = [Submit(p, len(p) // 32 * 32, max_tokens=14) for p in PROMPTS[:10]]
        run_schedule(engine, references[num_ranks], schedule)
        counters = engine.schedulers[0].core.counters
        assert counters.loads == 8
        # 40, 65, 97: all of the lease; 64: but for the last block.
        assert counters.loaded_tokens == 2 * (32 + 56 + 64 + 96)
        assert engine.hub.counters.tickets == 2  # 20 prompt tokens and 12 of the answer


schedules = st.lists(
    st.one_of(
        st.builds(
            Submit,
            prompt=st.sampled_from(PROMPTS),
            lease_tokens=st.just(0),
            save=st.booleans(),
            max_tokens=st.integers(1, 6),
        ),
        st.sampled_from(PROMPTS).flatmap(
            lambda prompt: st.builds(
                Submit,
                prompt=st.just(prompt),
                lease_tokens=st.sampled_from([32 * i for i in range(len(prompt) // 32 + 1)]),
                save=st.booleans(),
                max_tokens=st.integers(1, 6),
            )
        ),
        st.builds(Cancel, st.integers(0, 7)),
        st.builds(Replay, st.integers(0, 7)),
        st.builds(Steps, st.integers(1, 4)),
    ),
    min_size=4,
    max_size=12,
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_load_tokens": 1, "copy_seconds": 0.003},
        {"async_load_tokens": 40, "reuse": True, "num_blocks": 14},
        {"num_ranks": 2, "async_load_tokens": 1, "copy_seconds": 0.002},
        {"num_ranks": 2, "reuse": True, "num_blocks": 14, "layout": "NHD"},
    ],
    ids=["sync", "async", "reuse", "2-ranks-async", "2-ranks-reuse"],
)
def test_any_schedule(loaded, references, tmp_path_factory, options):
    with engine_of(loaded, tmp_path_factory, **options) as engine:

        @settings(
            max_examples=40,
            phases=[Phase.generate],  # shrinking took ten minutes
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(schedules)
        def run(schedule):
            run_schedule(engine, references[options.get("num_ranks", 1)], schedule)

        run()
        assert engine.schedulers[0].core.counters.loads >= 3
        assert engine.hub.counters.tickets >= 3


@pytest.mark.parametrize(("num_kv_heads", "num_parts"), [(1, 1), (2, 2), (4, 4), (8, 4)], ids=str)
def test_4_ranks_each_with_the_part_of_its_heads(tmp_path_factory, num_kv_heads, num_parts):
    """With fewer KV heads than ranks, neighbours share a head and its part."""
    folder = write_model(
        tmp_path_factory.mktemp("shared"),
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=num_kv_heads,
    )
    loaded = load_model(folder, device="cpu", kv_dtype="bfloat16")
    reference = Reference(loaded, num_ranks=4)
    with engine_of(loaded, tmp_path_factory, num_ranks=4) as engine:
        assert len(engine.arena.parts) == num_parts
        schedule = [Submit(p, len(p) // 32 * 32, max_tokens=14) for p in PROMPTS[:5]]
        run_schedule(engine, reference, schedule)
        assert engine.schedulers[0].core.counters.loads == 4


def test_query_heads_that_cannot_be_dealt_out(loaded):
    ranks = SimpleNamespace(rank=0, size=4)  # 3 query heads for each of 2 KV heads
    with pytest.raises(EngineError, match="3 query heads of a KV head"):
        PagedModel(on_rank(loaded), ranks=ranks, num_blocks=4, tokens_per_block=8)
