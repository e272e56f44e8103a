import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.codec.ladder.rope import LayerRope, Rope, rotate_keys, unrotate_keys
from kvfetcher.errors import ConfigError
from support.examples import examples

TABLE = tuple(float(f) for f in 1.0 / 10000 ** (np.arange(4) / 4))


def keys(num_layers, dim, num_tokens=9, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_layers, 2, num_tokens, dim)).astype(np.float32)


def test_half_style_is_the_rotation_of_llama():
    k = keys(1, 8)
    rotated = k.copy()
    rotate_keys(rotated, Rope((LayerRope(TABLE),)), 5)
    angle = (np.arange(5, 14)[:, None] * np.array(TABLE)).astype(np.float32)
    cos, sin = np.tile(np.cos(angle), 2), np.tile(np.sin(angle), 2)
    turned = np.concatenate([-k[..., 4:], k[..., :4]], axis=-1)
    np.testing.assert_allclose(rotated, k * cos + turned * sin, atol=1e-6)


def test_interleaved_style_rotates_neighbouring_dims():
    k = keys(1, 8)
    rotated = k.copy()
    rotate_keys(rotated, Rope((LayerRope(TABLE, "interleaved"),)), 3)
    pairs = (k[..., 0::2] + 1j * k[..., 1::2]) * np.exp(
        1j * np.arange(3, 12)[:, None] * np.array(TABLE)
    )
    np.testing.assert_allclose(rotated[..., 0::2], pairs.real, atol=1e-5)
    np.testing.assert_allclose(rotated[..., 1::2], pairs.imag, atol=1e-5)


def test_dims_outside_the_rotation_stay():
    k = keys(1, 12)
    rotated = k.copy()
    rotate_keys(rotated, Rope((LayerRope(TABLE, offset=2),)), 100)
    np.testing.assert_array_equal(rotated[..., :2], k[..., :2])
    np.testing.assert_array_equal(rotated[..., 10:], k[..., 10:])
    assert np.abs(rotated[..., 2:10] - k[..., 2:10]).max() > 0.1


@examples(50)
@given(
    style=st.sampled_from(["half", "interleaved"]),
    amplitude=st.floats(0.1, 4),
    offset=st.integers(0, 4),
    position=st.integers(0, 1 << 17),
    unrotated_layer=st.booleans(),
)
def test_unrotate_undoes_rotate(style, amplitude, offset, position, unrotated_layer):
    first = LayerRope() if unrotated_layer else LayerRope(TABLE, style, amplitude, offset)
    rope = Rope((first, LayerRope(TABLE, style, amplitude, offset)))
    k = keys(2, 12)
    there = k.copy()
    rotate_keys(there, rope, position)
    unrotate_keys(there, rope, position)
    np.testing.assert_allclose(there, k, atol=2e-6)


def test_facts_survive_json_and_share_equal_layers():
    rope = Rope((LayerRope(TABLE), LayerRope(), LayerRope(TABLE)))
    data = rope.to_dict()
    assert len(data["kinds"]) == 2
    assert Rope.from_dict(data) == rope
    assert rope.slice(1, 2).layers == rope.layers[1:]


@pytest.mark.parametrize(
    "data",
    [
        {},
        None,
        {"kinds": [], "layers": [0]},
        {
            "kinds": [{"inv_freq": ["x"], "style": "half", "amplitude": 1, "offset": 0}],
            "layers": [],
        },
        {"kinds": [{"inv_freq": [1], "style": "odd", "amplitude": 1, "offset": 0}], "layers": [0]},
        {"kinds": [{"inv_freq": [1], "style": "half", "amplitude": 0, "offset": 0}], "layers": [0]},
    ],
)
def test_facts_of_another_structure_are_refused(data):
    with pytest.raises(ConfigError):
        Rope.from_dict(data)


def test_more_rotated_dims_than_the_head_has_are_refused():
    with pytest.raises(ConfigError, match="head of 4"):
        rotate_keys(keys(1, 4), Rope((LayerRope(TABLE),)), 0)


def test_number_of_layers_must_agree():
    with pytest.raises(ConfigError, match="L = 2"):
        rotate_keys(keys(1, 8), Rope((LayerRope(TABLE), LayerRope())), 0)
