import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.codec.ladder import artifact, product
from kvfetcher.codec.ladder.inverse import LEADING_STEPS, SplitInverse
from kvfetcher.codec.symbols import Corrections
from kvfetcher.errors import FormatError
from kvfetcher.spec import KVSpec
from support.calibrations import make_calibration
from support.examples import examples

NOTHING = Corrections(np.zeros(0, np.int64), np.zeros(0, np.float32))


@pytest.fixture(params=["torch", "numpy"])
def library(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(product, "_torch", lambda: None)


def parts(split):
    """The inverse that a split one multiplies with, in float64."""
    return np.concatenate([split.leading, split.trailing * split.scale]).astype(np.float64)


@examples(60)
@given(
    seed=st.integers(0, 99),
    rows=st.integers(1, 40),
    tokens=st.sampled_from([1, 7, 32]),
    leading=st.integers(0, 40),
    bit_depth=st.sampled_from([8, 10, 12]),
    num_corrections=st.integers(0, 30),
)
def test_restored_vectors_are_the_product_with_every_integer(
    seed, rows, tokens, leading, bit_depth, num_corrections
):
    rng = np.random.default_rng(seed)
    split = SplitInverse.split(
        rng.normal(size=(rows, 24)).astype(np.float32),
        rng.normal(size=24).astype(np.float32),
        num_leading=min(leading, rows),
    )
    dtype = np.uint8 if bit_depth == 8 else np.uint16
    samples = rng.integers(0, 1 << bit_depth, size=(rows, tokens)).astype(dtype)
    neutral = 1 << (bit_depth - 1)
    integers = samples.astype(np.float64) - neutral
    positions = np.sort(rng.permutation(samples.size)[:num_corrections])
    amounts = rng.integers(-5000, 5000, size=len(positions))
    integers.reshape(-1)[positions] += amounts
    corrections = Corrections(positions, amounts.astype(np.float32))
    restored = split.restore(samples, neutral, np.float32(0.01), corrections)
    expected = 0.01 * (integers.T @ parts(split)) + split.mean
    size = 0.01 * (np.abs(integers).T @ np.abs(parts(split)))
    assert (np.abs(restored - expected) <= 1e-5 * size + 1e-4).all()


def test_8_bit_rows_are_within_half_a_scale_and_zero_columns_stay_zero():
    inverse = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    inverse[:, 3] = 0
    split = SplitInverse.split(inverse, np.zeros(16, np.float32), num_leading=20)
    np.testing.assert_array_equal(split.leading, inverse[:20])
    error = np.abs(parts(split) - inverse)[20:]
    assert (error <= 0.501 * split.scale).all()
    assert not error[:, 3].any()


def test_products_do_not_depend_on_the_library(library):
    rng = np.random.default_rng(1)
    split = SplitInverse.split(
        rng.normal(size=(300, 64)).astype(np.float32), np.ones(64, np.float32), num_leading=30
    )
    samples = rng.integers(100, 156, size=(300, 32)).astype(np.uint8)
    restored = split.restore(samples, 128, np.float32(1), NOTHING)
    expected = (samples.astype(np.float64) - 128).T @ parts(split) + 1
    np.testing.assert_allclose(restored, expected, rtol=1e-4, atol=1e-3)


def test_8_bit_product_is_exact_at_the_ends_of_its_range():
    if not product.has_int8_product():
        pytest.skip("this CPU does not multiply 8-bit integers")
    a, b = np.full((3, 4096), -128, np.int8), np.full((4096, 5), -128, np.int8)
    out = np.zeros((3, 5), np.float32)
    product.add_scaled_product_int8(out, a, b, np.ones(5, np.float32))
    np.testing.assert_array_equal(out, np.float32(4096 << 14))


def test_splitting_adds_under_one_percent_to_the_noise():
    rng = np.random.default_rng(4)
    rows = np.linalg.qr(rng.normal(size=(512, 512)))[0].astype(np.float32)
    # Deviations in steps, as of SmolLM2-135M at `balanced`: few large ones, a long tail.
    sigma = np.geomspace(300, 0.25, 512) ** 1.3 / 8
    count = int(np.count_nonzero(sigma > LEADING_STEPS))
    assert 64 < count < 256
    split = SplitInverse.split(rows, np.zeros(512, np.float32), num_leading=count)
    added = (sigma[:, None] ** 2 * (parts(split) - rows) ** 2).sum()
    assert 0 < added < 0.01 * (rows.astype(np.float64) ** 2).sum() / 12


def test_calibration_splits_where_8_bit_products_are_fast(monkeypatch):
    monkeypatch.setattr(artifact, "MIN_TRAILING", 4)
    calibration = make_calibration(KVSpec(3, 2, 8))
    sigma = calibration.bases[0, 0].sigma
    step, rank = float(sigma[5]) / LEADING_STEPS, len(sigma)
    monkeypatch.setattr(artifact, "has_int8_product", lambda: True)
    assert len(calibration.inverse((0, 0), rank, step).leading) == 5
    assert len(calibration.inverse((0, 0), 6, step).leading) == 6
    monkeypatch.setattr(artifact, "has_int8_product", lambda: False)
    assert len(calibration.inverse((0, 0), rank, step).leading) == rank


def test_inverses_of_one_profile_are_always_kept():
    calibration = make_calibration(KVSpec(5, 2, 8), heads=1)
    keys = list(calibration.bases)
    for _ in range(2):
        for rank in range(1, 9):  # what hostile units may ask for
            calibration.inverse(keys[0], rank, 1e-9)
        kept = {
            key: calibration.inverse(key, len(basis.sigma), 1e-9)
            for key, basis in calibration.bases.items()
        }
        for key, inverse in kept.items():
            assert calibration.inverse(key, len(calibration.bases[key].sigma), 1e-9) is inverse


def test_inverses_are_bounded_in_bytes_and_the_last_used_stay():
    calibration = make_calibration(KVSpec(3, 2, 8))
    first = calibration.inverse((0, 0), 1, 0.1)
    for rank in range(1, len(calibration.bases[0, 0].sigma) + 1):
        inverse = calibration.inverse((0, 0), rank, 0.1)
        assert calibration.inverse((0, 0), rank, 0.1) is inverse
        assert calibration.inverse((0, 0), 1, 0.1) is first
        kept = sum(part.nbytes for found in calibration._inverses.values() for part in found)
        assert kept <= calibration.inverse_bytes
    assert len(calibration._inverses) < rank


@pytest.mark.parametrize("rank", [0, 10_000])
def test_inverse_of_components_that_are_not_there_is_refused(rank):
    with pytest.raises(FormatError, match="components"):
        make_calibration(KVSpec(3, 2, 8)).inverse((0, 0), rank, 0.1)


def test_encoding_makes_no_inverse(monkeypatch):
    calibration = make_calibration(KVSpec(3, 2, 8))
    monkeypatch.setattr(artifact, "_inverses", None)
    first = calibration.forward((0, 0), 5)
    assert calibration.forward((0, 0), 5) is first
    monkeypatch.undo()
    np.testing.assert_array_equal(first.matrix, calibration.matrices((0, 0), 5).forward)
