import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.codec.ladder.groups import Grouping, from_vectors, to_vectors
from kvfetcher.errors import ConfigError
from kvfetcher.spec import KVSpec


@given(
    layers=st.integers(1, 40),
    heads=st.integers(1, 9),
    layers_per_group=st.integers(1, 12),
    heads_per_group=st.integers(0, 9),
)
def test_groups_cover_every_layer_and_head_once(layers, heads, layers_per_group, heads_per_group):
    spec = KVSpec(layers, heads, 4)
    grouping = Grouping.even(spec, layers=layers_per_group, heads=min(heads_per_group, heads))
    assert sum(grouping.layer_counts) == layers
    assert max(grouping.layer_counts) <= layers_per_group
    assert max(grouping.layer_counts) - min(grouping.layer_counts) <= 1
    assert [h for a, b in grouping.head_ranges for h in range(a, b)] == list(range(heads))
    total = sum(
        grouping.dimension(a, b)
        for a in range(len(grouping.layer_counts))
        for b in range(len(grouping.head_ranges))
    )
    assert total == spec.elements_per_token


def test_vectors_are_layer_kv_head_dim_and_go_back():
    values = np.arange(2 * 2 * 3 * 5 * 4, dtype=np.float32).reshape(2, 2, 3, 5, 4)
    vectors = to_vectors(values, (1, 3))
    assert vectors.shape == (5, 2 * 2 * 2 * 4)
    assert vectors[3, 4 * (2 * (2 * 1 + 0) + 1) + 2] == values[1, 0, 2, 3, 2]
    back = values.copy()
    back[:, :, 1:3] = -1
    from_vectors(vectors, back, (1, 3))
    np.testing.assert_array_equal(back, values)


def test_groups_that_do_not_cover_the_model_are_refused():
    with pytest.raises(ConfigError, match="cover"):
        Grouping(KVSpec(4, 2, 8), (2, 1), 2)


def test_transforms_have_a_largest_size():
    with pytest.raises(ConfigError, match="fewer layers"):
        Grouping.even(KVSpec(32, 32, 128), layers=32)
