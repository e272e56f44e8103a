"""The engine's pool as the connector sees it, and what it refuses."""

import pytest
import torch

from kvfetcher.engines.connector.pool import PagedPool, probe_layout
from kvfetcher.errors import LayoutError
from kvfetcher.spec import HeadRange, KVSpec

SPEC = KVSpec(num_layers=2, num_kv_heads=4, head_dim=8)


def pool_of(shape=(6, 2, 2, 2 * 4 * 8), dtype=torch.bfloat16, spec=SPEC, **options):
    settings = {"heads": HeadRange(0, 2), "tokens_per_block": 4} | options
    return PagedPool(torch.zeros(shape, dtype=dtype), spec=spec, **settings)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_block_is_a_view_in_canonical_order(layout):
    pool = pool_of()
    pool.block(3, layout)[1, 0, 1, 2, 5] = 7  # layer 1, K, head 1, token 2, dim 5
    flat = pool.tensor.view(torch.int16)[3, 1, 0]
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
        assert pool_of(dtype=dtype, spec=spec).block(0, "HND").dtype == torch.uint8


def block_of_equal_tokens(layout, heads, tokens, noise=0.0):
    torch.manual_seed(0)
    rows = torch.randn(heads, 1, 8).expand(heads, tokens, 8)
    rows = rows + noise * torch.randn(heads, tokens, 8)
    return (rows if layout == "HND" else rows.transpose(0, 1)).reshape(-1)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(("heads", "tokens"), [(2, 8), (8, 32), (8, 8), (5, 4), (2, 2)])
def test_probe_finds_the_layout(layout, heads, tokens):
    values = block_of_equal_tokens(layout, heads, tokens, noise=1e-3)
    assert probe_layout(values, num_heads=heads, head_dim=8) == layout


def test_probe_that_proves_nothing_says_so():
    torch.manual_seed(0)
    assert probe_layout(torch.randn(2 * 8 * 8), num_heads=2, head_dim=8) is None
    assert probe_layout(torch.zeros(2 * 8 * 8), num_heads=2, head_dim=8) is None
    assert probe_layout(torch.ones(2 * 8 * 8), num_heads=2, head_dim=8) is None
    assert probe_layout(torch.full((2 * 8 * 8,), torch.nan), num_heads=2, head_dim=8) is None


def test_one_head_or_one_token_has_one_order():
    assert probe_layout(torch.randn(8 * 8), num_heads=1, head_dim=8) == "HND"
    assert probe_layout(torch.randn(8 * 8), num_heads=8, head_dim=8) == "HND"
