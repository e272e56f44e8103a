"""Values -> pictures in torch: the unit's bytes are the CPU's."""

import numpy as np
import pytest
import torch

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.gpu.forward import UncalibratedForward, units_together
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.spec import KVSpec


def values(spec, tokens):
    """Channels of many sizes, and what a quantiser cannot hold."""
    rng = np.random.default_rng(tokens)
    shape = (spec.num_layers, 2, spec.num_kv_heads, tokens, spec.head_dim)
    channels = (*shape[:3], 1, spec.head_dim)
    data = rng.standard_normal(shape) * rng.lognormal(0, 1, channels) + rng.normal(0, 3, channels)
    data[1, 0, 0, 5, 3], data[2, 1, 1, 7, 2] = np.inf, np.nan
    data[3, 1] = 0  # a step of 0
    data[0, 0, 1, 9, 3], data[0, 0, 1, 50:56, 3] = 400, 9000  # escapes
    return float32_to_bits(data.astype(np.float32), spec.dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("tokens", "first_position", "variant", "unit_layers"),
    [(300, 0, "-", 1), (256, 512, "-", 2), (77, 2, "-", 1), (300, 0, "160x160", 2)],
)
def test_units_are_those_of_the_cpu(dtype, tokens, first_position, variant, unit_layers):
    spec = KVSpec(num_layers=4, num_kv_heads=2, head_dim=64, dtype=dtype)
    bits = values(spec, tokens)
    of_units = bits.view(np.int16).reshape(-1, unit_layers, *bits.shape[1:])
    made = UncalibratedForward(torch.device("cpu")).units(
        torch.from_numpy(of_units), dtype=dtype, first_position=first_position, variant=variant
    )
    depths = set()
    for index, unit in enumerate(made):
        drawn = []

        def encode(planes, *, bit_depth, drawn=drawn, **_):
            drawn.append(planes)
            return [b"packet"] * len(planes)

        start = index * unit_layers
        source = UnitSource(bits[start : start + unit_layers], spec, start, first_position, encode)
        expected = UncalibratedProfile().encode(source, variant)
        found = unit.rest().write(
            [b"packet"] * len(unit.planes),
            spec=spec,
            layer_start=start,
            num_layers=unit_layers,
            num_tokens=tokens,
            first_position=first_position,
        )
        planes = unit.planes.numpy()
        assert np.array_equal(planes if planes.itemsize == 1 else planes.view(np.uint16), drawn[0])
        assert found == expected
        depths.add(unit.bit_depth)
    assert depths <= {8, 10, 12}


def test_more_units_go_together_where_there_is_memory():
    assert units_together(1000, 1) == 1
    assert units_together(1000, 10**6) > 10
