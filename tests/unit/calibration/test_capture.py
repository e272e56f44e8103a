"""The rotation is found by measurement on tiny random models of every variant."""

import numpy as np
import pytest
import torch
import transformers

from kvfetcher.calibration.capture import CaptureModel
from kvfetcher.codec.ladder.rope import unrotate_keys
from kvfetcher.errors import ConfigError, EngineError
from support.tiny_models import write_family

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDING = ["sliding_attention"] * 3 + ["full_attention"]
HYBRID = {"layer_types": SLIDING, "sliding_window": 16}
TABLE = 1e4 ** (-np.arange(4) / 4)


def config(kind, rope=None, **more):
    if rope is not None:
        more["rope_parameters"] = {"rope_theta": 1e4, **rope}
    return getattr(transformers, f"{kind}Config")(**SMALL, **more)


def build(settings):
    torch.manual_seed(0)
    return CaptureModel(transformers.AutoModelForCausalLM.from_config(settings).float(), None)


def yarn():
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def llama3():
    return {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip


HALF = {"rope_type": "default", "partial_rotary_factor": 0.5}

VARIANTS = {
    # (configuration, style, pairs of every layer, amplitude)
    "plain": (config("Llama", {"rope_type": "default"}), "half", [4] * 4, 1),
    "linear": (config("Llama", {"rope_type": "linear", "factor": 2.0}), "half", [4] * 4, 1),
    "YaRN": (config("Llama", yarn()), "half", [4] * 4, 1 + 0.1 * np.log(4)),
    "Llama 3": (config("Llama", llama3()), "half", [4] * 4, 1),
    "partial, half": (config("StableLm", HALF, num_key_value_heads=2), "half", [2] * 4, 1),
    "partial, interleaved": (config("Glm", HALF, head_dim=8), "interleaved", [2] * 4, 1),
    "GPT-NeoX": (config("GPTNeoX", HALF), "half", [2] * 4, 1),
    "two bases": (config("Gemma3Text", head_dim=8, **HYBRID), "half", [4] * 4, 1),
    "some not rotated": (config("SmolLM3", no_rope_layers=[1, 0, 1, 0]), "half", [4, 0, 4, 0], 1),
    "norm on K": (config("Qwen3", head_dim=8, num_key_value_heads=2), "half", [4] * 4, 1),
    "soft caps": (config("Gemma2", head_dim=8, **HYBRID), "half", [4] * 4, 1),
    "chunks": (
        config(
            "Llama4Text",
            head_dim=8,
            num_key_value_heads=2,
            num_local_experts=2,
            intermediate_size_mlp=64,
            attention_chunk_size=16,
            no_rope_layers=[1, 1, 1, 0],
        ),
        "interleaved",
        [4, 4, 4, 0],
        1,
    ),
    "experts": (
        config("Mixtral", head_dim=8, num_key_value_heads=2, num_local_experts=4),
        "half",
        [4] * 4,
        1,
    ),
    "full ones not rotated": (config("Cohere2", **HYBRID), "interleaved", [4, 4, 4, 0], 1),
}


@pytest.mark.parametrize(
    ("settings", "style", "pairs", "amplitude"), VARIANTS.values(), ids=VARIANTS
)
def test_rotation_of_every_variant_is_measured(settings, style, pairs, amplitude):
    model = build(settings)
    rope = model.measure_rope()
    assert [len(layer.inv_freq) for layer in rope.layers] == pairs
    rotated = [layer for layer in rope.layers if layer.inv_freq]
    assert {layer.style for layer in rotated} == {style}
    assert [layer.amplitude for layer in rotated] == pytest.approx([amplitude] * len(rotated))
    # Keys of equal tokens far along the sequence are those at its start, once unrotated.
    keys = model.prefill([5] * 400).to_array()[:, 0]
    unrotate_keys(keys, rope, 0)
    np.testing.assert_allclose(keys[:, :, 300:], keys[:, :, 4:104], atol=2e-3 * np.abs(keys).max())


def test_tables_are_the_models_own():
    (linear,) = set(build(VARIANTS["linear"][0]).measure_rope().layers)
    assert linear.inv_freq == pytest.approx(TABLE / 2)
    (scaled,) = set(build(VARIANTS["Llama 3"][0]).measure_rope().layers)
    assert scaled.inv_freq[0] == 1
    assert scaled.inv_freq[-1] == pytest.approx(TABLE[-1] / 8)
    (yarned,) = set(build(VARIANTS["YaRN"][0]).measure_rope().layers)
    assert yarned.inv_freq[-1] == pytest.approx(TABLE[-1] / 4)
    near, *_, far = build(VARIANTS["two bases"][0]).measure_rope().layers
    assert near.inv_freq == pytest.approx(TABLE)
    assert far.inv_freq == pytest.approx(1e6 ** (-np.arange(4) / 4))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 128,
        },
    ],
    ids=["dynamic NTK", "LongRoPE"],
)  # fmt: skip
def test_rotation_that_changes_with_the_length_is_refused(rope):
    with pytest.raises(EngineError, match="K depend on the total length"):
        build(config("Llama", rope)).measure_rope()


def test_sinks_are_refused_since_they_make_keys_of_equal_tokens_differ():
    model = build(
        config("GptOss", yarn(), head_dim=8, num_key_value_heads=2, num_local_experts=4, **HYBRID)
    )
    with pytest.raises(ConfigError, match="use `exact` for this model"):
        model.measure_rope()


def test_a_latent_cache_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"one latent per token .MLA.* use `exact`"):
        CaptureModel.load(write_family(tmp_path, "deepseek-v3-mla"))


def test_learned_positions_are_refused():
    settings = transformers.GPT2Config(
        vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="use `exact` for this model"):
        build(settings).measure_rope()
