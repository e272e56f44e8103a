"""An arena in parts is one arena to all but the ranks; parts that are not one arena are refused."""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfetcher.errors import ArenaError, ConfigError, LayoutError
from kvfetcher.memory.arena import HEADER_BYTES, Arena, plan_arena
from kvfetcher.memory.split_arena import SplitArena, attach_arena, attach_part, create_arena
from kvfetcher.spec import HeadRange, KVSpec

SPEC = KVSpec(num_layers=3, num_kv_heads=4, head_dim=8)
NUM_BYTES = 1 << 16
HALVES = {HeadRange(0, 2): None, HeadRange(2, 4): None}


def create(path, places=HALVES, spec=SPEC, tokens_per_block=4, num_bytes=NUM_BYTES):
    return create_arena(
        path, spec=spec, tokens_per_block=tokens_per_block, num_bytes=num_bytes, places=places
    )


def values(num_tokens, spec=SPEC, seed=0):
    shape = (spec.num_layers, spec.kv_factor, spec.num_kv_heads, num_tokens, spec.head_dim)
    limit = 1 << 8 * spec.item_bytes
    dtype = np.uint8 if spec.item_bytes == 1 else np.uint16
    return np.random.default_rng(seed).integers(0, limit, shape, dtype=dtype)


@pytest.fixture
def arena(tmp_path):
    made = create(tmp_path / "arena")
    yield made
    made.close()


@st.composite
def geometries(draw):
    """A spec, the heads of the parts, and a target's blocks and tokens."""
    widths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    stops = np.cumsum(widths).tolist()
    heads = [HeadRange(stop - width, stop) for stop, width in zip(stops, widths, strict=True)]
    spec = KVSpec(
        num_layers=draw(st.integers(1, 4)),
        num_kv_heads=stops[-1],
        head_dim=draw(st.sampled_from([1, 4, 6])),
        kv_factor=draw(st.sampled_from([1, 2])),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float8_e4m3fn"])),
    )
    block = draw(st.integers(1, 5))
    ids = draw(st.permutations(range(6)))[: draw(st.integers(1, 6))]
    tokens = len(ids) * block - draw(st.integers(0, block - 1))
    return spec, heads, block, tuple(ids), tokens


@settings(max_examples=60, deadline=None)
@given(geometries(), st.data())
def test_parts_put_together_are_the_bytes_of_one_arena(geometry, data):
    spec, heads, block, ids, tokens = geometry
    num_bytes = HEADER_BYTES + 6 * block * spec.bytes_per_token
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        one = Arena.create(path / "one", spec=spec, tokens_per_block=block, num_bytes=num_bytes)
        split = create(
            path / "split",
            dict.fromkeys(heads),
            spec,
            block,
            num_bytes + HEADER_BYTES * (len(heads) - 1),
        )
        assert split.num_blocks == one.num_blocks == 6
        first = data.draw(st.integers(0, spec.num_layers - 1))
        count = data.draw(st.integers(1, spec.num_layers - first))
        written = values(tokens, spec)[first : first + count]
        for arena in (one, split):
            arena.write(arena.target(ids, tokens), first, written)
        together = np.concatenate([part.blocks for part in split.parts], axis=3)
        np.testing.assert_array_equal(together, one.blocks)
        target = split.target(ids, tokens)
        other = attach_arena(split.paths, generation=target.generation)
        np.testing.assert_array_equal(other.read(target), one.read(one.target(ids, tokens)))
        np.testing.assert_array_equal(other.read(target, first, count), written)
        for arena in (one, split, other):
            arena.close()


def test_one_part_with_all_heads_is_a_plain_arena(tmp_path):
    arena = create(tmp_path / "arena", {HeadRange(0, 4): None})
    assert type(arena) is Arena
    assert arena.paths == (str(tmp_path / "arena"),)
    arena.close()


def test_all_parts_together_take_no_more_than_was_given(arena, tmp_path):
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["arena.0", "arena.1"]
    block_bytes = SPEC.bytes_per_token * arena.tokens_per_block
    assert NUM_BYTES - block_bytes < sum(f.stat().st_size for f in files) <= NUM_BYTES
    with pytest.raises(ConfigError, match=r"engine\.arena_bytes"):
        create(tmp_path / "small", num_bytes=2 * HEADER_BYTES + block_bytes - 1)


def test_each_part_is_reserved_under_one_generation_with_its_own_heads(arena):
    assert [part.heads for part in arena.parts] == list(HALVES)
    assert {part.generation for part in arena.parts} == {arena.generation}
    assert {part.num_blocks for part in arena.parts} == {arena.num_blocks}
    alone = attach_part(arena.paths[1], generation=arena.generation)  # as a rank does
    arena.write(arena.target((3,), 4), 0, values(4))
    np.testing.assert_array_equal(alone.read(alone.target((3,), 4)), values(4)[:, :, 2:])
    alone.close()


def test_only_parts_have_blocks_in_one_piece(arena):
    with pytest.raises(ArenaError, match="lies in 2 parts"):
        _ = arena.blocks


def test_what_does_not_fit_is_refused_before_any_part_is_written(arena):
    target = arena.target((0, 1), 8)
    for wrong in (values(7), values(8)[:, :, :2], values(8).astype(np.int16)):
        with pytest.raises(LayoutError):
            arena.write(target, 0, wrong)
    with pytest.raises(ArenaError, match="restarted"):
        arena.write(replace(target, generation="another"), 0, values(8))
    assert not any(part.blocks.any() for part in arena.parts)


@pytest.mark.parametrize(
    "choose",
    [
        lambda p: p[:1],
        lambda p: p[1:],
        lambda p: p[::-1],
        lambda p: (p[0], p[0]),
        lambda p: (*p, p[1]),
    ],
    ids=["first", "last", "swapped", "twice", "more"],
)
def test_files_that_are_not_all_parts_in_order_are_refused(arena, choose):
    with pytest.raises(ArenaError, match=r"KV heads 0 to 3 one after the other.*is missing, or"):
        attach_arena(choose(arena.paths), generation=arena.generation)


def test_part_that_is_gone_is_named(arena):
    Path(arena.paths[1]).unlink()
    with pytest.raises(ArenaError, match=r"arena\.1 cannot be opened.*is the engine running"):
        attach_arena(arena.paths, generation=arena.generation)


def test_part_of_an_engine_that_was_restarted_is_refused(arena, tmp_path):
    plan = plan_arena(SPEC, tokens_per_block=4, num_bytes=NUM_BYTES)
    newer = Arena.create_from(replace(plan, heads=HeadRange(2, 4)), tmp_path / "arena.1")
    with pytest.raises(ArenaError, match=r"arena\.1 is of generation .*restarted"):
        attach_arena(arena.paths, generation=arena.generation)
    newer.close()


@pytest.mark.parametrize(
    "change",
    [
        {"generation": "another"},
        {"num_blocks": 3},
        {"tokens_per_block": 8},
        {"spec": replace(SPEC, num_layers=2)},
        {"spec": replace(SPEC, dtype="float16")},
    ],
    ids=["generation", "blocks", "tokens", "layers", "dtype"],
)
def test_part_of_another_geometry_is_refused(tmp_path, change):
    plan = plan_arena(SPEC, tokens_per_block=4, num_bytes=NUM_BYTES)
    parts = [
        Arena.create_from(replace(plan, heads=HeadRange(0, 2)), tmp_path / "a.0"),
        Arena.create_from(replace(plan, heads=HeadRange(2, 4), **change), tmp_path / "a.1"),
    ]
    with pytest.raises(ArenaError, match=r"a\.1 is not part of the same arena as .*a\.0"):
        SplitArena(parts)
    for part in parts:
        part.close()


def test_creation_that_fails_half_way_leaves_nothing(tmp_path):
    (tmp_path / "arena.1").mkdir()  # no file can take its place
    with pytest.raises(ArenaError, match=r"arena\.1 cannot be created"):
        create(tmp_path / "arena")
    assert [path.name for path in tmp_path.iterdir()] == ["arena.1"]


def test_closed_and_unlinked_arena_leaves_no_part(arena, tmp_path):
    arena.close()
    arena.close()
    with pytest.raises(ArenaError, match="closed"):
        arena.read(arena.target((0,), 1))
    arena.unlink()
    arena.unlink()
    assert not list(tmp_path.iterdir())


CRASH = """
import os, signal, sys
from pathlib import Path
from kvfetcher.spec import HeadRange, KVSpec
from kvfetcher.memory.split_arena import create_arena
arena = create_arena(
    Path(sys.argv[1]),
    spec=KVSpec(1, 2, 4),
    tokens_per_block=4,
    num_bytes=1 << 16,
    places={HeadRange(0, 1): None, HeadRange(1, 2): None},
)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_parts_of_a_killed_owner_are_swept_and_those_of_the_living_left(arena, tmp_path):
    subprocess.run([sys.executable, "-c", CRASH, str(tmp_path / "dead")], check=False, timeout=60)
    assert {path.name for path in tmp_path.iterdir()} == {"arena.0", "arena.1", "dead.0", "dead.1"}
    assert Arena.sweep(tmp_path, "*a*") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"arena.0", "arena.1"}
