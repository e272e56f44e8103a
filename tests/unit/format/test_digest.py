import numpy as np
import pytest

from kvfetcher.format.digest import BLOCK_WORDS, integer_digest
from support import reference_reader


@pytest.mark.parametrize(
    "size", [0, 1, 3, 4, 5, 4096, 4 * BLOCK_WORDS, 4 * BLOCK_WORDS + 3, 200001]
)
def test_digest_is_the_one_of_the_format(size):
    values = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    assert integer_digest(values) == reference_reader.integer_digest(values)


def test_digest_is_of_bytes_not_of_shape():
    values = np.arange(24, dtype=np.uint16)
    assert integer_digest(values) == integer_digest(values.reshape(2, 3, 4))
    assert integer_digest(values) == integer_digest(values.view(np.uint8))
    assert integer_digest(values[::2]) == integer_digest(values[::2].copy())


def test_every_changed_element_and_every_swap_is_noticed():
    values = np.random.default_rng(0).integers(0, 65536, 301).astype(np.uint16)
    seen = {integer_digest(values)}
    for at in range(values.size):
        changed = values.copy()
        changed[at] ^= 0x8000
        seen.add(integer_digest(changed))
    assert len(seen) == values.size + 1
    assert integer_digest(np.roll(values, 2)) not in seen
    assert integer_digest(values[:-1]) not in seen
    assert integer_digest(np.append(values, np.uint16(0))) not in seen
