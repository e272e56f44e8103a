"""Arena: what is written is read, over processes; whatever does not fit is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest

from kvfetcher.errors import ArenaError, ConfigError, LayoutError
from kvfetcher.memory import arena as arena_module
from kvfetcher.memory.arena import HEADER_BYTES, Arena, BlockTarget
from kvfetcher.spec import KVSpec

SPEC = KVSpec(num_layers=4, num_kv_heads=2, head_dim=8)


@pytest.fixture
def arena(tmp_path):
    made = Arena.create(tmp_path / "arena", spec=SPEC, tokens_per_block=4, num_bytes=40_000)
    yield made
    made.close()


def values(num_tokens, num_layers=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1 << 16, (num_layers, 2, 2, num_tokens, 8), dtype=np.uint16)


def test_what_one_mapping_writes_the_other_reads(arena, tmp_path):
    target = arena.target((5, 0, 9), 11)  # out of order, last block partly filled
    arena.write(target, 0, values(11))
    other = Arena.attach(tmp_path / "arena", generation=arena.generation)
    assert np.array_equal(other.read(target), values(11))
    assert np.array_equal(other.read(target, 1, 2), values(11)[1:3])
    other.close()


def test_layer_groups_written_apart_make_the_whole(arena):
    target = arena.target((1, 2), 8)
    whole = values(8)
    for start in (2, 0):
        arena.write(target, start, whole[start : start + 2])
    assert np.array_equal(arena.read(target), whole)


def test_writing_a_target_leaves_other_blocks_and_the_tail_alone(arena):
    arena.blocks[...] = 7
    arena.write(arena.target((3,), 2), 0, values(2))
    untouched = np.delete(arena.blocks, 3, axis=0)
    assert (untouched == 7).all()
    assert (arena.blocks[3, :, :, :, 2:] == 7).all()


def test_strided_values_are_written_by_value(arena):
    target = arena.target((1,), 4)
    arena.write(target, 0, values(8)[:, :, :, ::2])
    assert np.array_equal(arena.read(target), values(8)[:, :, :, ::2])


DOUBLE_IN_CHILD = """
import sys
from kvfetcher.memory.arena import Arena, BlockTarget
arena, target = Arena.attach(sys.argv[1]), BlockTarget.from_json(sys.argv[2])
arena.write(target, 0, arena.read(target) * 2)
"""


def test_another_process_sees_and_changes_the_blocks(arena):
    target = arena.target((2, 4), 6)
    arena.write(target, 0, values(6) >> 2)
    command = [sys.executable, "-c", DOUBLE_IN_CHILD, str(arena.path), target.to_json()]
    subprocess.run(command, check=True, timeout=60)
    assert np.array_equal(arena.read(target), (values(6) >> 2) * 2)


def test_memory_is_reserved_at_creation(arena):
    assert arena.path.stat().st_blocks * 512 >= arena.blocks.nbytes
    assert arena.path.stat().st_mode & 0o777 == 0o600


def test_fp8_blocks_are_bytes(tmp_path):
    spec = KVSpec(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float8_e4m3fn")
    arena = Arena.create(tmp_path / "a", spec=spec, tokens_per_block=4, num_bytes=8192)
    assert arena.blocks.dtype == np.uint8
    arena.close()


def test_a_size_without_room_for_a_block_names_the_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.arena_bytes"):
        Arena.create(tmp_path / "a", spec=SPEC, tokens_per_block=4, num_bytes=HEADER_BYTES + 10)


def test_a_full_file_system_is_an_error_and_leaves_nothing(tmp_path):
    huge = KVSpec(num_layers=1024, num_kv_heads=1024, head_dim=4096)
    with pytest.raises(ArenaError, match=r"engine\.arena_bytes"):
        Arena.create(tmp_path / "a", spec=huge, tokens_per_block=32, num_bytes=1 << 52)
    assert list(tmp_path.iterdir()) == []


def test_more_blocks_than_an_arena_names_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="at most"):
        Arena.create(tmp_path / "a", spec=SPEC, tokens_per_block=4, num_bytes=1 << 62)


def test_missing_folder_is_an_arena_error(tmp_path):
    with pytest.raises(ArenaError, match="cannot be created"):
        Arena.create(tmp_path / "no" / "a", spec=SPEC, tokens_per_block=4, num_bytes=40_000)


def test_recreated_arena_refuses_targets_and_attachers_of_the_old_one(arena):
    old = arena.target((0,), 1)
    new = Arena.create(arena.path, spec=SPEC, tokens_per_block=4, num_bytes=40_000)
    with pytest.raises(ArenaError, match="restarted"):
        new.read(old)
    with pytest.raises(ArenaError, match="restarted"):
        Arena.attach(arena.path, generation=arena.generation)
    arena.write(old, 0, values(1))  # the old mapping lives on, harmlessly
    assert not new.blocks.any()
    new.close()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b"", "not a KV arena"),
        (lambda b: b"x" + b[1:], "not a KV arena"),
        (lambda b: b[:8] + b"\x09" + b[9:], "version 9"),
        (lambda b: b[:12] + b"\xff\xff\xff\xff" + b[16:], "unreadable header"),
        (lambda b: b[:16] + b"[" + b[17:], "unreadable header"),
        (lambda b: b.replace(b'"num_layers":4', b'"num_layers":0'), "unreadable header"),
        (lambda b: b.replace(b'"stop":2', b'"stop":3'), "unreadable header"),
        (lambda b: b[:-1], "its header says"),
    ],
    ids=["empty", "magic", "version", "length", "json", "spec", "heads", "cut"],
)
def test_attach_refuses_damaged_files(arena, damage, message):
    arena.path.write_bytes(damage(arena.path.read_bytes()))
    with pytest.raises(ArenaError, match=message):
        Arena.attach(arena.path)


def test_attach_to_nothing_says_that_the_engine_may_be_down(tmp_path):
    with pytest.raises(ArenaError, match="is the engine running"):
        Arena.attach(tmp_path / "none")


@pytest.mark.parametrize(
    ("layer_start", "array", "message"),
    [
        (0, values(3), r"got \(4, 2, 2, 3, 8\)"),
        (0, values(4).astype(np.int16), "got int16"),
        (1, values(4), "not within the 4 layers"),
        (-1, values(4), "not within the 4 layers"),
        (0, values(4)[0], "got shape"),
    ],
    ids=["tokens", "dtype", "layers", "negative", "dimensions"],
)
def test_values_that_do_not_fit_are_refused(arena, layer_start, array, message):
    with pytest.raises(LayoutError, match=message):
        arena.write(arena.target((0,), 4), layer_start, array)


@pytest.mark.parametrize(("ids", "tokens"), [((0,), 5), ((0, 1), 4), ((10_000,), 4)])
def test_targets_that_do_not_fit_are_refused(arena, ids, tokens):
    with pytest.raises(LayoutError, match="take"):
        arena.target(ids, tokens)


def test_closed_arena_is_refused_and_unlink_removes_the_file(arena):
    target = arena.target((0,), 1)
    arena.close()
    arena.close()
    with pytest.raises(ArenaError, match="closed"):
        arena.read(target)
    arena.unlink()
    arena.unlink()
    assert not arena.path.exists()


def test_target_json_round_trips():
    target = BlockTarget("g", (3, 1), 40, "lease", "tenant", 1.5)
    assert BlockTarget.from_json(target.to_json()) == target


def test_targets_that_are_kept_are_bounded_in_bytes():
    """Any number of any size took 1.5 GB, kept."""
    arena_module._known_target.cache_clear()
    for first in range(200):
        ids = tuple(range(first, first + 20_000))
        text = BlockTarget("g", ids, 20_000).to_json()
        assert BlockTarget.from_json(text).block_ids == ids
    assert arena_module._known_target.cache_info().currsize == 0
    for first in range(200):
        BlockTarget.from_json(BlockTarget("g", (first,), 1).to_json())
    assert arena_module._known_target.cache_info().currsize == 128
    with pytest.raises(LayoutError, match="at most 1048576 characters"):
        BlockTarget.from_json("[" * (1 << 20) + "]")


@pytest.mark.parametrize(
    "change",
    [
        {"block_ids": "12"},
        {"block_ids": [1, 1]},
        {"block_ids": [-1]},
        {"block_ids": [True]},
        {"block_ids": []},
        {"num_tokens": 0},
        {"num_tokens": "4"},
        {"arena": 1},
        {"lease_id": 1},
        {"tenant": None},
        {"expires_at": "soon"},
        {"extra": 1},
    ],
)
def test_target_json_is_validated(change):
    data = BlockTarget("g", (0,), 1).to_dict() | change
    with pytest.raises(LayoutError):
        BlockTarget.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_target_text_that_is_no_object_is_refused(text):
    with pytest.raises(LayoutError):
        BlockTarget.from_json(text)


def test_span_is_the_part_of_a_target():
    target = BlockTarget("g", (7, 3, 5), 10, "lease")
    assert target.span(4, 6, tokens_per_block=4) == BlockTarget("g", (3, 5), 6, "lease")
    with pytest.raises(LayoutError, match="does not begin a block"):
        target.span(3, 2, tokens_per_block=4)
    with pytest.raises(LayoutError, match="not within"):
        target.span(8, 3, tokens_per_block=4)
