"""Identity: equal models agree, whatever differs in KV differs in the identity."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    Cohere2Config,
    Exaone4Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Mamba2Config,
    SmolLM3Config,
    StableLmConfig,
)

from kvfetcher.engines.hf.loader import choose_device, load_model
from kvfetcher.errors import ConfigError, EngineError
from kvfetcher.models import identity
from kvfetcher.models.identity import (
    DIGEST_FILE,
    config_rope_facts,
    rope_facts,
    rope_text,
    tokenizer_digest,
    weights_digest,
)
from support.engine_rig import edit_json, write_model

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
HYBRID = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 16,
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.fixture
def folder(model_folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy, ignore=shutil.ignore_patterns(DIGEST_FILE))
    return copy


def test_digest_does_not_depend_on_how_tensors_are_spread(folder):
    before = weights_digest(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    for index, part in enumerate((names[:3], names[3:])):
        save_file({n: tensors[n] for n in part}, folder / f"model-{index}.safetensors")
    assert weights_digest(folder) == before


def test_one_flipped_bit_changes_the_digest(folder):
    before = weights_digest(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert weights_digest(folder) != before


def test_configuration_counts_but_its_savers_version_does_not(folder):
    before = weights_digest(folder)
    edit_json(folder / "config.json", transformers_version="9.9", dtype="bfloat16")
    assert weights_digest(folder) == before
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    assert weights_digest(folder) != before


def test_a_change_that_keeps_size_and_times_changes_the_digest(folder, monkeypatch):
    """As `cp -p`, `tar` and `rsync -t` leave files: another model's KV would be hit."""
    monkeypatch.setattr(identity, "_SETTLED_SECONDS", 0.0)
    before = weights_digest(folder)
    path = folder / "model.safetensors"
    times, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert weights_digest(folder) != before


def test_a_file_that_was_changed_a_moment_ago_is_hashed_again(folder):
    os.utime(folder / "model.safetensors")
    weights_digest(folder)
    assert not (folder / DIGEST_FILE).exists()


def test_a_model_that_changes_while_it_is_hashed_is_refused(folder, monkeypatch):
    real = identity._file_parts

    def changing(path, start, end):
        os.utime(path, ns=(7, 7))
        yield from real(path, start, end)

    monkeypatch.setattr(identity, "_file_parts", changing)
    with pytest.raises(EngineError, match="changed while it was read"):
        weights_digest(folder)


def test_kept_digest_is_used_and_dropped_when_files_change(folder, monkeypatch):
    monkeypatch.setattr(identity, "_SETTLED_SECONDS", 0.0)
    weights_digest(folder)
    kept = folder / DIGEST_FILE
    edit_json(kept, sha256="f" * 64)
    assert weights_digest(folder) == "f" * 64
    os.utime(folder / "model.safetensors", ns=(5, 5))
    assert weights_digest(folder) != "f" * 64
    kept.write_text("nonsense")
    assert len(weights_digest(folder)) == 64


def test_digest_needs_no_writable_folder(folder, monkeypatch):
    monkeypatch.setattr(identity, "_SETTLED_SECONDS", 0.0)
    expected = weights_digest(folder)
    (folder / DIGEST_FILE).unlink()
    (folder / DIGEST_FILE).mkdir()  # nothing can be put in its place
    assert weights_digest(folder) == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:4],
        lambda b: b"\xff" * 8 + b[8:],
        lambda b: b[:8] + b"[" + b[9:],
        lambda b: b[:-1],
    ],
    ids=["short", "length", "json", "cut"],
)
def test_damaged_weights_are_named(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(EngineError, match=r"model\.safetensors is damaged"):
        weights_digest(folder)


def test_folder_without_weights_or_tokenizer_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(EngineError, match="save_pretrained"):
        weights_digest(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match=r"tokenizer\.json"):
        tokenizer_digest(folder)
    with pytest.raises(EngineError, match="save_pretrained"):
        load_model(folder, device="cpu", kv_dtype="bfloat16")


def test_unreadable_configuration_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(EngineError, match=r"config\.json cannot be read"):
        weights_digest(folder)


def test_rope_text_is_canonical_and_sees_every_parameter():
    default = rope_text(LlamaConfig())
    assert json.loads(default)["rope_type"] == "default"
    other = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    assert rope_text(LlamaConfig(rope_parameters=other)) != default


def test_rope_that_depends_on_later_tokens_is_refused():
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(EngineError, match="prefixes cannot be shared"):
        rope_text(LlamaConfig(rope_parameters=parameters))


def test_identity_covers_dtype_and_geometry(loaded, model_folder):
    other = load_model(model_folder, device="cpu", kv_dtype="float8_e4m3fn")
    one, two = loaded.identity, other.identity
    assert one.weights == two.weights
    assert one.digest(profile="p", chunk_tokens=32) != two.digest(profile="p", chunk_tokens=32)


def test_rope_facts_are_the_models_numbers(loaded):
    expected = [10000.0 ** (-2 * i / 8) for i in range(4)]
    assert loaded.rope.inv_freq[0] == pytest.approx(expected, rel=1e-6)
    assert loaded.rope.attention_scaling == (1.0, 1.0, 1.0)


def test_scaled_rope_shows_in_the_facts(tmp_path, loaded):
    parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    scaled = load_model(
        write_model(tmp_path, rope_parameters=parameters), device="cpu", kv_dtype="bfloat16"
    )
    assert scaled.rope.inv_freq[0] == pytest.approx(
        [f / 4 for f in loaded.rope.inv_freq[0]], rel=1e-6
    )


def test_rope_facts_of_a_model_with_two_bases():
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    )  # fmt: skip
    facts = rope_facts(model, num_layers=3, head_dim=8)
    assert facts.inv_freq[0] == facts.inv_freq[2] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert facts.inv_freq[1] == pytest.approx([1e6 ** (-i / 4) for i in range(4)])


@pytest.mark.parametrize(
    ("config", "rotated"),
    [
        (SmolLM3Config(**SMALL, no_rope_layers=[1, 1, 0], pad_token_id=0), [4, 4, 0]),
        (Cohere2Config(**SMALL, **HYBRID), [4, 0, 4]),
        (Exaone4Config(**SMALL, **HYBRID), [4, 0, 4]),
        (StableLmConfig(**SMALL, rope_parameters=PARTIAL), [2, 2, 2]),
    ],
    ids=["SmolLM3", "Cohere 2", "EXAONE 4", "StableLM"],
)
def test_rope_facts_of_layers_that_rotate_less_or_not_at_all(config, rotated):
    facts = config_rope_facts(config, num_layers=3, head_dim=8)
    assert [len(row) for row in facts.inv_freq] == rotated


def test_rope_facts_of_layers_with_two_amplitudes():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    config = Gemma3TextConfig(
        **SMALL,
        **HYBRID,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {**yarn, "original_max_position_embeddings": 16},
        },
    )
    facts = config_rope_facts(config, num_layers=3, head_dim=8)
    assert facts.attention_scaling == pytest.approx((1, 1 + 0.1 * np.log(4), 1))


def test_models_without_softmax_attention_are_refused(folder):
    Mamba2Config(
        num_hidden_layers=4, hidden_size=32, vocab_size=257, num_heads=8, head_dim=8
    ).save_pretrained(folder)
    with pytest.raises(EngineError, match="recurrent layers"):
        load_model(folder, device="cpu", kv_dtype="bfloat16")


@pytest.mark.parametrize("text", ["tpu", "meta", "cuda:99", "cpu:x"])
def test_senseless_device_is_a_config_error(text):
    with pytest.raises(ConfigError, match=r"engine\.device"):
        choose_device(text)


def test_file_parts_cover_a_range_once(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_HASH_STEP", 7)
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    assert b"".join(identity._file_parts(path, 3, 60)) == bytes(range(3, 60))
