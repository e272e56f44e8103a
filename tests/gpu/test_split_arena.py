"""An arena with a part on each GPU (all on one where there is but one): what `kv_restore` leaves there."""

import numpy as np
import pytest
import torch

from kvfetcher.backend.coding import UnitDecoder, UnitRestorer
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.profiles import encode_chunk
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.format.container import parse_header
from kvfetcher.memory.arena import Arena
from kvfetcher.memory.split_arena import create_arena
from kvfetcher.spec import HeadRange, KVSpec
from support.calibrations import correlated_values
from support.trust import give_out

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("run_folder")]

SPEC = KVSpec(num_layers=4, num_kv_heads=8, head_dim=64)
TOKENS = 250
BLOCKS = tuple(range(15, -1, -1))


@pytest.mark.parametrize("profile", [ExactProfile(), UncalibratedProfile()], ids=["exact", "lossy"])
@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_parts_on_gpus_hold_what_one_arena_in_host_memory_holds(tmp_path, profile, num_parts):
    chunk = encode_chunk(
        float32_to_bits(correlated_values(SPEC, TOKENS), SPEC.dtype),
        spec=SPEC,
        profile=profile,
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=range(TOKENS),
        first_position=0,
        num_threads=4,
    )
    sizes = {"spec": SPEC, "tokens_per_block": 16, "num_bytes": 32 << 20}
    width, count = 8 // num_parts, torch.cuda.device_count()
    heads = [HeadRange(first, first + width) for first in range(0, 8, width)]
    places = {each: index % count for index, each in enumerate(heads)}
    arenas = [
        create_arena(tmp_path / "gpus", **sizes, places=places),
        Arena.create(tmp_path / "host", **sizes),
    ]
    decoder, restorer = UnitDecoder("cpu"), UnitRestorer()
    found = []
    for arena in arenas:
        target = arena.target(BLOCKS, TOKENS)
        for entry in parse_header(chunk).units:
            unit = chunk[entry.offset : entry.stop]
            planes, status = decoder.decode(unit)
            _, status = restorer.restore(
                unit, planes, target_json=give_out("write", arena, target), decode_status=status
            )
        found.append((arena.read(target), '"restorer": "gpu"' in status))
    (on_gpus, by_gpu), (on_host, by_cpu) = found
    assert (by_gpu, by_cpu) == (True, False)
    np.testing.assert_array_equal(on_gpus, on_host)
    restorer.close()
    for arena in arenas:
        arena.close()
