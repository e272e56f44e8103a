"""Pool blocks: nobody gets a block that another holds, and equal prefixes find each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.engines.paged.blocks import BlockPool, block_hashes
from kvfetcher.errors import EngineError


def test_hashes_chain_over_full_blocks_and_salts():
    first = block_hashes([1, 2, 3, 4, 5], 2)
    assert len(first) == 2
    assert block_hashes([1, 2, 3, 4], 2) == first
    assert block_hashes([9, 2, 3, 4], 2)[1] != first[1]
    assert not set(block_hashes([1, 2, 3, 4], 2, "salt")) & set(first)


def test_stored_prefix_is_found_again_until_its_blocks_are_needed():
    pool = BlockPool(4, reuse=True)
    hashes = block_hashes(range(6), 2)
    blocks = pool.allocate(3)
    pool.store(blocks, hashes)
    pool.free(blocks)
    assert pool.num_free == 4
    assert pool.find(hashes[:2]) == blocks[:2]
    pool.allocate(2)  # the unused one, and the end of the old prefix
    assert pool.num_free == 0
    assert pool.find(hashes) == blocks[:2]
    with pytest.raises(EngineError, match="1 KV blocks are needed, 0 of 4 are free"):
        pool.allocate(1)


def test_without_reuse_nothing_is_found():
    pool = BlockPool(2, reuse=False)
    hashes = block_hashes(range(2), 2)
    blocks = pool.allocate(1)
    pool.store(blocks, hashes)
    pool.free(blocks)
    assert pool.find(hashes) == []


def test_block_of_a_known_hash_is_not_named_twice():
    pool = BlockPool(4, reuse=True)
    hashes = block_hashes(range(2), 2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.store(first, hashes)
    pool.store(second, hashes)
    assert pool.find(hashes) == first


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "end", "end and keep"]),
            st.integers(0, 3),  # which of four prompts, or which of those that run
            st.integers(1, 6),  # blocks
        ),
        max_size=40,
    )
)
def test_no_block_has_two_meanings(actions):
    pool = BlockPool(10, reuse=True)
    running = []
    content = {}  # what was written to each block, by its holder
    for action, which, number in actions:
        if action == "begin":
            hashes = block_hashes([which] * number, 1)
            found = pool.find(hashes)
            assert [content[block] for block in found] == hashes[: len(found)]
            if number - len(found) > pool.num_free:
                pool.free(found)
                continue
            blocks = found + pool.allocate(number - len(found))
            assert len(set(blocks)) == number
            for block, digest in zip(blocks[len(found) :], hashes[len(found) :], strict=True):
                held = [b for other, _ in running for b in other]
                assert block not in held
                content[block] = digest
            running.append((blocks, hashes))
        elif running:
            blocks, hashes = running.pop(which % len(running))
            if action == "end and keep":
                pool.store(blocks, hashes)
            pool.free(blocks)
    for blocks, _ in running:
        pool.free(blocks)
    assert pool.num_free == 10
