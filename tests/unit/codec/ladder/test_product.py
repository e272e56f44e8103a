import numpy as np
import pytest

from kvfetcher.codec.ladder import product
from kvfetcher.codec.quant import float32_to_bits

SPECIAL = np.array(
    [
        0,
        -0.0,
        1e-40,
        -1e-45,
        1.00390625,
        1.01171875,
        3.4e38,
        -3.4e38,
        np.inf,
        -np.inf,
        65519,
        65520,
    ],
    np.float32,
)


@pytest.fixture(params=["torch", "numpy"])
def backend(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(product, "_torch", lambda: None)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_rounding_is_that_of_quant(dtype):
    rng = np.random.default_rng(0)
    values = np.concatenate([SPECIAL, rng.normal(0, 30, 5000).astype(np.float32)])
    bits = product.round_to_bits(values, dtype)
    np.testing.assert_array_equal(bits, float32_to_bits(values, dtype))


@pytest.mark.usefixtures("backend")
def test_product_takes_transposed_operands():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40, 30)).astype("f4"), rng.normal(size=(50, 40)).astype("f4")
    np.testing.assert_allclose(product.multiply(a.T, b.T), a.T @ b.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(product.multiply(b, a), b @ a, rtol=1e-4, atol=1e-5)
