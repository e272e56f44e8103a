"""The torch engine on CUDA in bfloat16: a hit is indistinguishable from computing."""

import numpy as np
import pytest

from kvfetcher.backend.coding import UnitDecoder
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.profiles import encode_chunk, restore_unit
from kvfetcher.engines.hf.loader import load_model
from kvfetcher.format.container import parse_header
from kvfetcher.memory.leases import LeaseClaim
from support.engine_rig import CHUNK, Rig, lease_with, saved_values, some_ids, write_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("tiny"), head_dim=64, hidden_size=384)
    return load_model(folder, device="cuda:0", kv_dtype="bfloat16")


@pytest.fixture
def rig(loaded, tmp_path):
    made = Rig(loaded, tmp_path, num_bytes=16 << 20)
    yield made
    made.close()


def through_store(rig, values):
    """What a fetch restores of a chunk: encoded by x265, decoded as kv_decode does."""
    spec = rig.engine.describe().identity.spec
    decoder = UnitDecoder("nvdec")  # leaves these tiny pictures to the CPU
    parts = []
    for first in range(0, values.shape[3], CHUNK):
        chunk = encode_chunk(
            np.ascontiguousarray(values[:, :, :, first : first + CHUNK]),
            spec=spec,
            profile=ExactProfile(),
            identity=bytes(32),
            chunk_key=bytes(32),
            token_ids=range(CHUNK),
            first_position=first,
            num_threads=1,
        )
        units = [chunk[e.offset : e.stop] for e in parse_header(chunk).units]
        parts.append(np.concatenate([restore_unit(u, decoder.decode(u)[0]).values for u in units]))
    decoder.close()
    return np.concatenate(parts, axis=3)


def test_model_is_on_the_gpu_in_bfloat16(rig, loaded):
    assert loaded.device.type == "cuda"
    assert str(loaded.compute_dtype) == "torch.bfloat16"
    assert rig.engine.describe().device == "cuda:0"


@pytest.mark.parametrize("prompt_tokens", [40, 64, 65, 79, 96, 97])
async def test_hit_gives_the_same_tokens_and_kv_bytes(rig, prompt_tokens):
    ids = some_ids(prompt_tokens)
    full = await rig.run(ids, max_tokens=40, min_length=40, save=True)
    values = saved_values(rig, full.ticket)
    shared = prompt_tokens // CHUNK * CHUNK
    fetched = through_store(rig, values[:, :, :, :shared])
    np.testing.assert_array_equal(fetched, values[:, :, :, :shared])
    lease_id = lease_with(rig, ids[:shared], fetched)
    claim = LeaseClaim(lease_id, shared, rig.arena.generation)
    hit = await rig.run(ids, max_tokens=40, min_length=40, save=True, lease=claim)
    assert hit.ids == full.ids
    assert hit.timings[0].cached_tokens == min(shared, prompt_tokens - 1)
    np.testing.assert_array_equal(saved_values(rig, hit.ticket), values[:, :, :, shared:])


async def test_leased_kv_is_what_attention_sees(rig):
    ids = some_ids(70)
    plain = await rig.run(ids, save=True)
    values = saved_values(rig, plain.ticket)
    lease_id = lease_with(rig, ids[:64], values[:, :, ::-1, :64])
    other = await rig.run(ids, lease=LeaseClaim(lease_id, 64, rig.arena.generation))
    assert other.ids != plain.ids
