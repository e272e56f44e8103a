"""The engine's pool as the connector sees it, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

from kvfetcher.engines.connector.pool import LayerGroupPool, PagedPool, probe_layout
from kvfetcher.errors import LayoutError
from kvfetcher.spec import HeadRange, KVSpec

SPEC = KVSpec(num_layers=2, num_kv_heads=4, head_dim=8)


def pool_of(shape=(6, 2, 2, 2 * 4 * 8), dtype=torch.bfloat16, spec=SPEC, **options):
    settings = {"heads": HeadRange(0, 2), "tokens_per_block": 4} | options
    return PagedPool(torch.zeros(shape, dtype=dtype), spec=spec, **settings)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_block_is_a_view_in_canonical_order(layout):
    pool = pool_of()
    pool.view(pool.parts[0], 3, 1, layout)[0, 1, 0, 1, 2, 5] = (
        7  # layer 1, K, head 1, token 2, dim 5
    )
    flat = pool.parts[0].bits[3, 1, 0]
    expected = (1 * 4 + 2) * 8 + 5 if layout == "HND" else (2 * 2 + 1) * 8 + 5
    assert flat.nonzero().tolist() == [[expected]]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((6, 2, 2, 2 * 4 * 8 * 2), torch.bfloat16, "set engine.tokens_per_block"),
        ((6, 3, 2, 2 * 4 * 8), torch.bfloat16, "expected .num_blocks, 2 layers"),
        ((6, 2, 1, 2 * 4 * 8), torch.bfloat16, "expected"),
        ((6, 2, 2, 2, 4 * 8), torch.bfloat16, "expected"),
        ((6, 2, 2, 2 * 4 * 8), torch.float16, "engine.kv_dtype says bfloat16"),
        ((6, 2, 2, 2 * 4 * 8), torch.int8, "NVFP4 pools are not supported"),
    ],
)
def test_pool_of_another_kind_is_refused(shape, dtype, message):
    with pytest.raises(LayoutError, match=message):
        pool_of(shape, dtype)


def test_pool_that_is_no_one_piece_is_refused():
    with pytest.raises(LayoutError, match="not contiguous"):
        PagedPool(
            torch.zeros((6, 2, 2, 128), dtype=torch.bfloat16)[..., ::2],
            spec=SPEC,
            heads=HeadRange(0, 2),
            tokens_per_block=4,
        )


def test_fp8_pool_may_be_typed_as_bytes():
    spec = KVSpec(2, 4, 8, dtype="float8_e4m3fn")
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        assert pool_of(dtype=dtype, spec=spec).parts[0].bits.dtype == torch.uint8


def block_of_equal_tokens(layout, heads, tokens, noise=0.0):
    """K, rotated, and V of one token repeated."""
    torch.manual_seed(0)
    rows = torch.randn(2, heads, 1, 8).expand(2, heads, tokens, 8).clone()
    angle = torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.1])
    first, second = rows[0, ..., :2].clone(), rows[0, ..., 2:4].clone()
    rows[0, ..., :2] = first * angle.cos() - second * angle.sin()
    rows[0, ..., 2:4] = second * angle.cos() + first * angle.sin()
    rows += noise * torch.randn(2, heads, tokens, 8)
    return (rows if layout == "HND" else rows.transpose(1, 2)).reshape(2, -1)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(
    ("heads", "tokens"), [(2, 8), (8, 32), (8, 8), (5, 4), (2, 2), (32, 32), (2, 32)]
)
def test_probe_finds_the_layout(layout, heads, tokens):
    """Also of equal shapes: as many heads as tokens, or as there are of K and V."""
    values = block_of_equal_tokens(layout, heads, tokens, noise=1e-3)
    assert probe_layout(values, num_heads=heads, head_dim=8) == layout


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_orders_of_equal_shape_that_are_neither_are_told_apart(layout):
    """Two heads: [heads, K and V] has the shape of [K and V, heads]; so has V before K."""
    values = block_of_equal_tokens(layout, 2, 8)
    heads_first = block_of_equal_tokens("HND", 2, 8).view(2, 2, -1).transpose(0, 1).reshape(2, -1)
    packed = block_of_equal_tokens("HND", 2, 8).view(2, -1, 8).transpose(0, 1).reshape(2, -1)
    for wrong in (values.flip(0), heads_first, packed):
        assert probe_layout(wrong, num_heads=2, head_dim=8) is None


def test_probe_that_proves_nothing_says_so():
    torch.manual_seed(0)
    for values in (
        torch.randn(2, 2 * 8 * 8),
        torch.zeros(2, 2 * 8 * 8),
        torch.ones(2, 2 * 8 * 8),
        torch.full((2, 2 * 8 * 8), torch.nan),
        block_of_equal_tokens("HND", 2, 8)[1:].expand(2, -1),  # K that nothing rotates
    ):
        assert probe_layout(values, num_heads=2, head_dim=8) is None


def test_one_head_or_one_token_has_one_order():
    assert probe_layout(torch.randn(2, 8 * 8), num_heads=1, head_dim=8) == "HND"
    assert probe_layout(torch.randn(2, 8 * 8), num_heads=8, head_dim=8) == "HND"
    assert pool_of(heads=HeadRange(1, 2), shape=(6, 2, 2, 32)).has_one_order
    assert not pool_of().has_one_order


ALL = [(layer, role) for layer in (0, 1) for role in ("key", "value")]


def layout_of(*groups, tokens=4, **fields):
    """A `KvCacheLayout`; each group is a list of regions, each a list of (layer, role)."""
    buffer_bytes = 2 * 4 * 8 * 2  # 2 heads, 4 tokens, 8 dims of 2 bytes

    def region(buffers, size=None):
        memory = torch.zeros((6, len(buffers) * buffer_bytes), dtype=torch.uint8)
        return SimpleNamespace(
            size=size or memory.shape[1],
            num_slots=6,
            buffers=[
                SimpleNamespace(layer_id=layer, role=role, expansion=fields.get("expansion", 1))
                for layer, role in buffers
            ],
            as_tensor=lambda: memory,
        )

    return SimpleNamespace(
        tokens_per_block=tokens,
        groups=[
            SimpleNamespace(
                layer_group_id=i,
                window_size=fields.get("window"),
                regions=[region(buffers, fields.get("size")) for buffers in group],
                replicated_regions=fields.get("replicated", ()),
            )
            for i, group in enumerate(groups)
        ],
    )


def grouped(layout):
    return LayerGroupPool(layout, spec=SPEC, heads=HeadRange(0, 2), tokens_per_block=4)


@pytest.mark.parametrize(
    ("groups", "parts"),
    [
        ([[ALL]], [(0, slice(0, 2), slice(0, 2))]),
        ([[ALL[:2]], [ALL[2:]]], [(0, slice(0, 1), slice(0, 2)), (1, slice(1, 2), slice(0, 2))]),
        (
            [[ALL[2:], [ALL[1], ALL[0]]]],
            [
                (0, slice(0, 1), slice(0, 1)),
                (0, slice(0, 1), slice(1, 2)),
                (0, slice(1, 2), slice(0, 2)),
            ],
        ),
    ],
)
def test_regions_of_any_order_are_taken_apart(groups, parts):
    pool = grouped(layout_of(*groups))
    assert [(p.group, p.layers, p.kinds) for p in pool.parts] == parts
    assert (pool.num_groups, pool.num_blocks) == (len(groups), 6)
    for index, part in enumerate(pool.parts):
        pool.view(part, 2, 1, "NHD")[:] = index + 1
    probe = pool.probe_values([[2]] * len(groups))
    assert probe.shape == (2, 2 * 4 * 8)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (layout_of([ALL], tokens=8), "hold 8 tokens; set engine.tokens_per_block"),
        (layout_of([ALL], window=512), "a window of 512 tokens only"),
        (layout_of([ALL], replicated=(1,)), "data beside K and V"),
        (layout_of([ALL], expansion=2), "expansion 2"),
        (layout_of([ALL], size=100), "has 100 bytes a block for 4 buffers"),
        (layout_of([ALL[:3]]), "3 buffers of K and V, expected both of 2 layers"),
        (layout_of([ALL + ALL[:1]]), "5 buffers of K and V"),
        (layout_of([[*ALL, (1, "index_key")]]), "a buffer 'index_key' of layer 1"),
    ],
)
def test_layouts_of_anything_else_are_refused(layout, message):
    with pytest.raises(LayoutError, match=message):
        grouped(layout)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (6, 1), (5, 2)])
def test_blocks_without_memory_are_never_indexed(first, count):
    """-1 would be the last block: another request's."""
    pool = grouped(layout_of([ALL]))
    with pytest.raises(LayoutError, match="gave KV blocks"):
        pool.view(pool.parts[0], first, count, "HND")
