"""Model families on the engines `torch` and `paged`: what docs/models.md says of each, row by row."""

import re
from pathlib import Path

import numpy as np
import pytest
import transformers

from kvfetcher.calibration.capture import CaptureModel
from kvfetcher.codec.profiles import decode_unit, encode_unnamed, make_profile, restore_unit
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.config import CodecConfig
from kvfetcher.engines.hf import loader
from kvfetcher.engines.hf.loader import load_model
from kvfetcher.errors import ConfigError, EngineError
from kvfetcher.format.container import parse_header
from kvfetcher.memory.leases import LeaseClaim
from support import engine_rig
from support.engine_rig import CHUNK, Rig, lease_with, saved_values, some_ids
from support.paged_rig import PagedRig
from support.tiny_models import FAMILIES, WINDOW, write_family

SERVED = [
    "llama",
    "llama-bias",
    "mistral-window",
    "qwen3-qk-norm",
    "qwen3-moe",
    "mixtral-moe",
    "gemma2-window",
    "gemma3-window",
    "gpt-oss-sinks",
    "llama4-chunked",
    "phi-partial-rotary",
    "stablelm-partial-rotary",
    "smollm3-nope",
    "deepseek-v3-mla",
]
STATEFUL = ["qwen3-next-linear", "qwen3-5-linear"]
"""Served by `torch` alone."""
REFUSED = {
    "mamba2": "recurrent layers",
    "jamba-hybrid": "recurrent layers",
    "dynamic-ntk": "rope_type 'dynamic' makes K depend on the total length",
    "longrope": "rope_type 'longrope' makes K depend on the total length",
    "gpt2-absolute": "declares no rope_parameters",
    "deepseek-v32-indexer": r"sparse attention with an indexer \(index_topk\)",
    "gemma3n-shared-kv": r"layers that share the KV of others \(num_kv_shared_layers\)",
}
IDS = some_ids(100)
SHARED = len(IDS) // CHUNK * CHUNK


@pytest.fixture(scope="module")
def loaded_of(tmp_path_factory):
    known = {}

    def load(name):
        if name not in known:
            folder = write_family(tmp_path_factory.mktemp(name), name)
            known[name] = load_model(folder, device="cpu", kv_dtype="bfloat16", chunk_tokens=CHUNK)
        return known[name]

    return load


CASES = [
    pytest.param(kind, name, id=f"{engine}-{name}")
    for engine, kind, names in (("torch", Rig, SERVED + STATEFUL), ("paged", PagedRig, SERVED))
    for name in names
]


@pytest.fixture
def rig_of(tmp_path, loaded_of):
    made = []

    def make(kind, name):
        made.append(kind(loaded_of(name), tmp_path, num_bytes=4 << 20))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def through_the_codec(values, spec, profile="exact"):
    """What a fetch gives back of a chunk that was saved."""
    chunk = encode_unnamed(
        np.ascontiguousarray(values),
        spec=spec,
        profile=make_profile(CodecConfig(profile=profile)),
        first_position=0,
        num_threads=1,
    )
    header, decoder, parts = parse_header(chunk), VideoDecoder(), []
    for unit in header.units_of(header.units[0].variant):
        data = chunk[unit.offset : unit.stop]
        parts.append(restore_unit(data, decode_unit(data, decoder)).values)
    return np.concatenate(parts)


@pytest.mark.parametrize(("kind", "name"), CASES)
async def test_a_hit_is_what_computing_gives(rig_of, loaded_of, kind, name):
    """Saved, coded (`exact`), decoded, loaded: the same tokens, and the same KV bytes behind the hit."""
    rig, spec = rig_of(kind, name), loaded_of(name).spec
    full = await rig.run(IDS, max_tokens=12, min_length=12, save=True)
    values = saved_values(rig, full.ticket)[:, :, :, :SHARED]
    rig.leases.release(full.ticket.lease_id, now=rig.now)
    chunks = [values[:, :, :, i : i + CHUNK] for i in range(0, SHARED, CHUNK)]
    fetched = np.concatenate([through_the_codec(chunk, spec) for chunk in chunks], axis=3)
    np.testing.assert_array_equal(fetched, values)
    # One chunk is longer than the windows, and ends inside one of the next tokens.
    assert CHUNK > WINDOW
    for length in (CHUNK, SHARED):
        lease = lease_with(rig, IDS[:length], fetched[:, :, :, :length])
        claim = LeaseClaim(lease, length, rig.arena.generation)
        hit = await rig.run(IDS, max_tokens=12, min_length=12, save=True, lease=claim)
        assert hit.timings[0].lease_error == ""
        assert hit.timings[0].cached_tokens == length
        assert hit.ids == full.ids
        if length < SHARED:
            behind = saved_values(rig, hit.ticket)[:, :, :, : SHARED - length]
            np.testing.assert_array_equal(behind, values[:, :, :, length:])
            rig.leases.release(hit.ticket.lease_id, now=rig.now)


@pytest.mark.parametrize(("kind", "name"), CASES)
async def test_a_hit_of_other_values_shows(rig_of, kind, name):
    """Or the test above would pass for an engine that looks at nothing it was given."""
    rig = rig_of(kind, name)
    full = await rig.run(IDS, save=True)
    values = saved_values(rig, full.ticket)[:, :, :, :SHARED]
    rig.leases.release(full.ticket.lease_id, now=rig.now)
    wrong = values[:, :, :, :CHUNK].copy()
    wrong[:, :, :, -8:] ^= 0x40  # the newest tokens: inside every window
    lease = lease_with(rig, IDS[:CHUNK], wrong)
    claim = LeaseClaim(lease, CHUNK, rig.arena.generation)
    hit = await rig.run(IDS, save=True, lease=claim)
    assert (saved_values(rig, hit.ticket)[:, :, :, :8] != values[:, :, :, CHUNK : CHUNK + 8]).any()


def test_no_two_families_share_chunks(loaded_of):
    digests = {
        loaded_of(name).identity.digest(profile="exact/1", chunk_tokens=CHUNK)
        for name in SERVED + STATEFUL
    }
    assert len(digests) == len(SERVED + STATEFUL)


@pytest.mark.parametrize("profile", ["exact", "uncalibrated", "paper"])
def test_a_latent_cache_in_every_profile_that_needs_no_calibration(loaded_of, profile):
    spec = loaded_of("deepseek-v3-mla").spec
    assert (spec.kv_factor, spec.num_kv_heads, spec.head_dim) == (1, 1, 24)
    rng = np.random.default_rng(0)
    floats = rng.normal(size=(spec.num_layers, 1, 1, CHUNK, spec.head_dim)).astype(np.float32)
    values = (floats.view(np.uint32) >> 16).astype(np.uint16)
    restored = through_the_codec(values, spec, profile)
    error = (restored.astype(np.uint32) << 16).view(np.float32) - floats
    assert np.abs(error).max() < (0.02 if profile == "exact" else 0.2)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shared_is_refused_before_its_weights_are_read(tmp_path, monkeypatch, name):
    folder = write_family(tmp_path, name)

    def read(*_, **__):
        raise AssertionError("its weights were read")

    monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(EngineError, match=REFUSED[name]):
        load_model(folder, device="cpu", kv_dtype="bfloat16")


@pytest.mark.parametrize("name", STATEFUL)
class TestStates:
    async def test_wrong_states_show(self, rig_of, loaded_of, name):
        """The values of the attention layers are right; only the states are another prefix's."""
        rig, plan = rig_of(Rig, name), loaded_of(name).states
        full = await rig.run(IDS, save=True)
        values = saved_values(rig, full.ticket)[:, :, :, :SHARED]
        rig.leases.release(full.ticket.lease_id, now=rig.now)
        wrong = values[:, :, :, :CHUNK].copy()
        first = plan.attention.num_layers
        wrong[first:] = values[first:, :, :, CHUNK : 2 * CHUNK]
        claim = LeaseClaim(lease_with(rig, IDS[:CHUNK], wrong), CHUNK, rig.arena.generation)
        hit = await rig.run(IDS, save=True, lease=claim)
        behind = saved_values(rig, hit.ticket)
        assert (behind != values[:, :, :, CHUNK:]).any()

    async def test_a_hit_of_the_whole_prompt_leaves_a_chunk_to_compute(self, rig_of, name):
        """States cannot be taken back by a token, so that the last one could be computed again."""
        rig, prompt = rig_of(Rig, name), IDS[:SHARED]
        full = await rig.run(prompt, save=True)
        values = saved_values(rig, full.ticket)
        rig.leases.release(full.ticket.lease_id, now=rig.now)
        for length in (SHARED, CHUNK):
            lease = lease_with(rig, prompt[:length], values[:, :, :, :length])
            hit = await rig.run(prompt, lease=LeaseClaim(lease, length, rig.arena.generation))
            assert hit.ids == full.ids
            assert hit.timings[0].cached_tokens == min(length, SHARED - CHUNK)

    @pytest.mark.parametrize("profile", ["uncalibrated", "paper", "balanced"])
    def test_a_profile_that_rounds_is_refused(
        self, loaded_of, tmp_path, monkeypatch, name, profile
    ):
        monkeypatch.setattr(
            engine_rig, "CodecConfig", lambda **settings: CodecConfig(profile=profile, **settings)
        )
        with pytest.raises(EngineError, match=r"keeps states .* set it to exact or raw"):
            Rig(loaded_of(name), tmp_path)

    def test_the_paged_engine_refuses_by_name(self, loaded_of, tmp_path, name):
        with pytest.raises(EngineError, match=r"set engine\.kind = .torch"):
            PagedRig(loaded_of(name), tmp_path, num_bytes=4 << 20)

    def test_calibration_refuses_by_name(self, tmp_path, name):
        with pytest.raises(ConfigError, match="keeps states"):
            CaptureModel.load(write_family(tmp_path, name))


def test_a_cache_of_an_unknown_kind_is_refused_at_the_first_slice(loaded_of, tmp_path, monkeypatch):
    """A model that hands over other tensors than its configuration means, as sarvam's MLA would."""
    loaded = loaded_of("deepseek-v3-mla")
    update = transformers.cache_utils.Cache.update

    def expanded(self, keys, values, *args, **kwargs):
        return update(
            self, keys.expand(-1, 6, -1, -1), values.expand(-1, 6, -1, -1), *args, **kwargs
        )

    monkeypatch.setattr(transformers.cache_utils.Cache, "update", expanded)
    with pytest.raises(EngineError, match="does not know this kind of cache"):
        Rig(loaded, tmp_path)


def test_the_page_lists_every_family_that_is_tested():
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    rows = dict(re.findall(r"^\| [^|]* \| `([a-z0-9-]+)` \| (yes|no) \|", page, re.MULTILINE))
    assert rows == dict.fromkeys(SERVED + STATEFUL, "yes") | dict.fromkeys(REFUSED, "no")
    assert set(rows) == set(FAMILIES)
