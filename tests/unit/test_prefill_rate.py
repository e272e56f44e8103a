import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.prefill_rate import PrefillEstimator, PrefillModel


def learn(model, positions, *, noise=lambda i: 1.0, slice_tokens=256):
    estimator = PrefillEstimator(prior_tokens_per_second=100.0)
    for index, start in enumerate(positions):
        seconds = model.seconds(start, start + slice_tokens) * noise(index)
        estimator.observe(start, slice_tokens, seconds)
    return estimator.model()


def test_nothing_seen_is_the_prior():
    model = PrefillEstimator(prior_tokens_per_second=200.0).model()
    assert model == PrefillModel(0.005, 0.0, 0)
    assert model.seconds(0, 400) == pytest.approx(2.0)


def test_seconds_add_up_whatever_the_slices():
    model = PrefillModel(1e-4, 1e-8)
    parts = sum(model.seconds(s, s + 100) for s in range(0, 10_000, 100))
    assert parts == pytest.approx(model.seconds(0, 10_000))
    assert model.seconds(500, 500) == model.seconds(500, 100) == 0.0


@given(st.floats(1e-6, 1e-2), st.floats(0, 1e-6))
def test_a_line_is_found(base, slope):
    found = learn(PrefillModel(base, slope), range(0, 8192, 256))
    assert found.seconds(0, 16384) == pytest.approx(
        PrefillModel(base, slope).seconds(0, 16384), rel=1e-3
    )
    assert found.num_slices == 32


def test_slices_that_waited_for_others_count_little():
    true = PrefillModel(1e-3, 1e-7)
    found = learn(true, range(0, 16384, 256), noise=lambda i: 6.0 if i % 7 == 3 else 1.0)
    assert found.seconds(0, 16384) == pytest.approx(true.seconds(0, 16384), rel=0.05)


@pytest.mark.parametrize("positions", [[0] * 9, [4096]])
def test_slices_at_one_position_give_a_rate(positions):
    true = PrefillModel(1e-3, 1e-7)
    found = learn(true, positions)
    assert found.slope_seconds == 0
    start = positions[0]
    assert found.seconds(start, start + 256) == pytest.approx(true.seconds(start, start + 256))


def test_a_falling_line_is_kept_level_and_a_steep_one_from_the_origin():
    estimator = PrefillEstimator(prior_tokens_per_second=1.0)
    for start, seconds in ((0, 2.0), (1000, 1.0)):
        estimator.observe(start, 100, seconds)
    assert estimator.model().slope_seconds == 0
    estimator = PrefillEstimator(prior_tokens_per_second=1.0)
    for start, seconds in ((1000, 0.001), (2000, 1.0), (1500, 0.5)):
        estimator.observe(start, 100, seconds)
    model = estimator.model()
    assert model.base_seconds > 0
    assert model.slope_seconds > 0


def test_useless_slices_are_ignored():
    estimator = PrefillEstimator(prior_tokens_per_second=1.0)
    estimator.observe(0, 0, 1.0)
    estimator.observe(0, 100, 0.0)
    assert estimator.model().num_slices == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(1, 4096), st.floats(1e-6, 100.0)),
        min_size=1,
        max_size=50,
    )
)
def test_any_slices_give_a_valid_model(slices):
    estimator = PrefillEstimator(prior_tokens_per_second=1.0)
    for start, tokens, seconds in slices:
        estimator.observe(start, tokens, seconds)
    assert estimator.model().seconds(0, 1000) > 0


def test_impossible_models_are_refused():
    with pytest.raises(ValueError, match="base > 0"):
        PrefillModel(0.0, 1.0)
