import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.fetch.planning.bandwidth import LinkEstimate
from kvfetcher.fetch.planning.gate import Prompt, decide, join, reconsider, regret
from kvfetcher.fetch.planning.pipeline import ChunkCost, Machine, finish_times
from kvfetcher.prefill_rate import PrefillModel

CHUNK = 256
LEVEL = Prompt(4 * CHUNK + 100, CHUNK, PrefillModel(1e-3, 0.0))  # 1 ms a token
STEEP = Prompt(8 * CHUNK + 1, CHUNK, PrefillModel(1e-5, 1e-6))

models = st.builds(PrefillModel, st.floats(1e-6, 1e-2), st.floats(0, 1e-6))


def finish_at(rate, num_chunks, *, num_bytes=10**6):
    return finish_times(
        [ChunkCost(num_bytes, 0.01, 0.001, 0.001)] * num_chunks,
        link=LinkEstimate(rate, rate, rate, rate, 0.001),
        machine=Machine(num_decoders=2),
    )


def test_a_fast_link_fetches_all():
    decision = decide([0.1, 0.2, 0.3, 0.4], LEVEL, margin=0.1)
    assert (decision.verdict, decision.num_chunks) == ("all", 4)
    assert decision.predicted_fetch_seconds == 0.4
    assert decision.predicted_seconds == pytest.approx(0.5)
    assert decision.predicted_compute_seconds == pytest.approx(1.124)
    # Fetching may cost what computing the same chunks costs, and not more.
    assert decision.deadline_seconds == pytest.approx(1.024)


def test_a_slow_link_fetches_nothing():
    decision = decide([0.3, 0.6, 0.9, 1.2], LEVEL, margin=0.1)
    assert (decision.verdict, decision.num_chunks, decision.deadline_seconds) == ("none", 0, 0.0)
    assert decision.predicted_seconds == decision.predicted_compute_seconds


def test_the_best_fetch_that_was_turned_down_keeps_its_prediction():
    decision = decide([0.3, 0.6, 0.8, 1.2], LEVEL, margin=0.1)
    assert (decision.verdict, decision.considered_chunks) == ("none", 3)
    assert decision.predicted_fetch_seconds == 0.8
    assert decision.predicted_with_fetch_seconds == pytest.approx(0.8 + 0.356)
    assert decision.predicted_all_fetch_seconds == 1.2
    part = decide([0.1, 0.2, 0.9, 1.6], LEVEL, margin=0.1)
    assert (part.considered_chunks, part.predicted_all_fetch_seconds) == (2, 1.6)
    assert part.predicted_with_fetch_seconds == part.predicted_seconds


def test_joining_predicts_what_is_left_of_the_fetch():
    decision = join(3, LEVEL, left_seconds=0.2)
    assert (decision.verdict, decision.num_chunks, decision.considered_chunks) == ("joined", 3, 3)
    assert decision.predicted_fetch_seconds == decision.predicted_all_fetch_seconds == 0.2
    assert decision.predicted_seconds == pytest.approx(0.2 + 0.356)
    assert decision.deadline_seconds == pytest.approx(0.768)


def test_a_gain_within_the_margin_is_not_worth_it():
    finish = [0.24, 0.48, 0.72, 0.96]
    assert decide(finish, LEVEL, margin=0.0).verdict == "all"
    assert decide(finish, LEVEL, margin=0.1).verdict == "none"


def test_a_prefix_whose_later_chunks_are_slow_is_fetched_in_part():
    decision = decide([0.1, 0.2, 0.9, 1.6], LEVEL, margin=0.1)
    assert (decision.verdict, decision.num_chunks) == ("part", 2)
    assert decision.deadline_seconds == pytest.approx(0.512)


def test_nothing_stored_is_computed():
    decision = decide([], LEVEL, margin=0.1)
    assert (decision.verdict, decision.considered_chunks) == ("none", 0)
    assert decision.predicted_fetch_seconds == decision.predicted_all_fetch_seconds == 0


def test_the_gate_can_be_bypassed():
    decision = decide([9.0, 18.0], LEVEL, margin=0.1, bypass=True)
    assert (decision.verdict, decision.num_chunks) == ("forced", 2)
    assert decision.deadline_seconds == math.inf


def test_a_link_that_may_be_fast_is_probed_with_one_chunk():
    slow, fast = [0.3, 0.6, 0.9, 1.2], [0.1, 0.2, 0.3, 0.4]
    decision = decide(slow, LEVEL, margin=0.1, optimistic_seconds=fast)
    assert (decision.verdict, decision.num_chunks) == ("probe", 1)
    assert decision.deadline_seconds == pytest.approx(0.256)
    assert decide(slow, LEVEL, margin=0.1, optimistic_seconds=slow).verdict == "none"
    assert decide(fast, LEVEL, margin=0.1, optimistic_seconds=fast).verdict == "all"


@given(models, st.integers(1, 40), st.floats(1e3, 1e11), st.floats(1.0, 1e3), st.floats(0, 0.5))
def test_a_faster_link_never_fetches_later_or_turns_fetching_down(
    model, num_chunks, rate, factor, margin
):
    prompt = Prompt(num_chunks * CHUNK + 7, CHUNK, model)
    slow = decide(finish_at(rate, num_chunks), prompt, margin=margin)
    fast = decide(finish_at(rate * factor, num_chunks), prompt, margin=margin)
    assert fast.predicted_seconds <= slow.predicted_seconds * (1 + 1e-9)
    assert fast.num_chunks >= slow.num_chunks or fast.num_chunks == 0 == slow.num_chunks
    if slow.num_chunks:
        assert fast.num_chunks


@given(
    models,
    st.lists(st.floats(0, 100), min_size=1, max_size=30).map(sorted),
    st.floats(0, 0.9),
)
def test_the_choice_is_the_best_one_and_never_worse_than_computing(model, finish, margin):
    prompt = Prompt(len(finish) * CHUNK + 1, CHUNK, model)
    decision = decide(finish, prompt, margin=margin)
    totals = [prompt.compute_seconds(0)] + [
        seconds + prompt.compute_seconds(n) for n, seconds in enumerate(finish, start=1)
    ]
    assert decision.predicted_seconds <= decision.predicted_compute_seconds * (1 + 1e-9)
    if decision.num_chunks:
        assert decision.predicted_seconds == pytest.approx(min(totals))
        assert decision.predicted_fetch_seconds <= decision.deadline_seconds * (1 + 1e-6) + 1e-9
    else:
        assert min(totals) >= (1 - margin) * totals[0] * (1 - 1e-9)
    assert decision.predicted_with_fetch_seconds == pytest.approx(min(totals[1:]))
    assert decision.predicted_all_fetch_seconds == finish[-1]


def test_a_fetch_that_goes_well_goes_on():
    assert reconsider([0.1, 0.2], LEVEL, num_ready=2, num_wanted=4, margin=0.05) == 4


def test_a_fetch_that_falls_behind_ends_where_computing_is_faster():
    assert reconsider([0.1, 5.0, 9.0], LEVEL, num_ready=1, num_wanted=4, margin=0.05) == 2
    assert reconsider([5.0, 9.0], LEVEL, num_ready=2, num_wanted=4, margin=0.05) == 2


def test_giving_up_needs_a_clear_gain():
    # Going on: 0.53 + 0.1 s; computing the two chunks: 0.512 + 0.1 s.
    assert reconsider([0.3, 0.53], LEVEL, num_ready=2, num_wanted=4, margin=0.05) == 4
    assert reconsider([0.3, 0.53], LEVEL, num_ready=2, num_wanted=4, margin=0.0) == 2


@given(
    models,
    st.lists(st.floats(0, 100), max_size=20).map(sorted),
    st.integers(0, 10),
    st.floats(0, 0.5),
    st.data(),
)
def test_what_is_ready_is_kept_and_asking_again_changes_nothing(
    model, remaining, num_ready, margin, data
):
    prompt = Prompt((num_ready + len(remaining)) * CHUNK + 1, CHUNK, model)
    wanted = data.draw(st.integers(num_ready, num_ready + len(remaining)))
    kwargs = {"num_ready": num_ready, "margin": margin}
    first = reconsider(remaining, prompt, num_wanted=wanted, **kwargs)
    assert num_ready <= first <= wanted
    assert reconsider(remaining, prompt, num_wanted=first, **kwargs) == first


def test_computing_the_tail_costs_more_than_the_head():
    head = STEEP.compute_seconds(0) - STEEP.compute_seconds(1)
    tail = STEEP.compute_seconds(7) - STEEP.compute_seconds(8)
    assert tail > 5 * head


@given(st.floats(0.01, 10), st.floats(0, 1))
def test_regret_is_zero_for_what_was_predicted(extra, lookup):
    decision = decide([0.1, 0.2, 0.3, 0.4], LEVEL, margin=0.1)
    as_predicted = regret(decision, LEVEL, lookup_seconds=0.0, fetch_seconds=0.4, num_chunks=4)
    assert as_predicted.error_seconds == 0
    assert as_predicted.loss_seconds == pytest.approx(0.5 - 1.124)
    late = regret(decision, LEVEL, lookup_seconds=lookup, fetch_seconds=0.4 + extra, num_chunks=2)
    assert late.error_seconds == pytest.approx(extra)
    assert late.loss_seconds == pytest.approx(as_predicted.loss_seconds + lookup + extra + 0.512)
