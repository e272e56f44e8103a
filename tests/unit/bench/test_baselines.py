import xml.etree.ElementTree as ET

import numpy as np
import pytest

from kvfetcher.bench import baselines
from kvfetcher.bench.plot import rate_quality_svg
from kvfetcher.spec import KVSpec
from support.calibrations import correlated_values

SPEC = KVSpec(12, 2, 32)


@pytest.fixture(scope="module")
def values():
    return correlated_values(SPEC, 512)


def relative_error(values, out):
    return float(np.sqrt(np.mean((out - values) ** 2) / np.mean(values**2)))


def test_zstd_returns_bfloat16_exactly_and_smaller(values):
    out, bits = baselines.zstd_bfloat16(values)
    expected, raw = baselines.cast(values, "bfloat16")
    np.testing.assert_array_equal(out, expected)
    assert bits < raw == 16 * values.size


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.12)])
def test_uniform_stores_its_bits_and_a_scale_and_minimum_per_channel(values, bits, bound):
    out, size = baselines.uniform(values, bits)
    assert size / values.size == pytest.approx(bits + 32 / 256)
    assert relative_error(values, out) < bound


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.1), (2, 0.4)])
def test_kivi_stores_its_bits_and_a_scale_and_minimum_per_group(values, bits, bound):
    out, size = baselines.kivi(values, bits)
    assert size / values.size == pytest.approx(bits + 1)
    assert relative_error(values, out) < bound


def test_cachegen_has_more_levels_in_its_first_layers(values):
    out, size = baselines.cachegen(values)
    k_levels = [len(np.unique(out[layer, 0, :, 7])) for layer in range(12)]
    v_levels = [len(np.unique(out[layer, 1, :, 7])) for layer in range(12)]
    assert min(k_levels[:10]) > 15 >= max(k_levels[10:])
    assert min(v_levels[:2]) > 15 >= max(v_levels[2:])
    tables = 16 * (32 + 1) / 256
    assert tables < size / values.size < tables + 5


def test_order0_entropy_of_a_fair_coin_is_one_bit():
    coin = np.random.default_rng(0).integers(0, 2, (64, 1000))
    assert baselines.order0_bits(coin) == pytest.approx(64_000, rel=1e-3)
    assert baselines.order0_bits(np.zeros((64, 1000), int)) == 0


def test_plot_is_svg_with_every_lossy_row():
    rows = [
        {"name": "near & far", "family": "ladder", "bits_per_element": 3.0, "kl": 1e-4},
        {"name": "tiny", "family": "ladder", "bits_per_element": 0.6, "kl": 6e-3},
        {"name": "int4", "family": "other", "bits_per_element": 4.1, "kl": 5e-2},
        {"name": "exact", "family": "ours", "bits_per_element": 10.7, "kl": 0.0},
    ]
    root = ET.fromstring(rate_quality_svg(rows, title="t"))
    space = "{http://www.w3.org/2000/svg}"
    labels = {text.text for text in root.iter(f"{space}text")}
    assert {"near & far", "tiny", "int4"} <= labels
    assert "exact" not in labels
    assert len(list(root.iter(f"{space}circle"))) == 3
