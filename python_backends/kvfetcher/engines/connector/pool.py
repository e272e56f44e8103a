"""The engine's paged KV pool as the connector sees it: block by block, in the canonical order.

The pool is one tensor ``[num_blocks, layers, kv_factor, heads * tokens_per_block * head_dim]``. How the
last dimension is ordered depends on the attention backend: ``HND`` = [heads, tokens, head_dim], ``NHD``
= [tokens, heads, head_dim]. A probe (`probe_layout`) establishes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

from kvfetcher.errors import LayoutError

if TYPE_CHECKING:
    from kvfetcher.spec import HeadRange, KVSpec

Layout = Literal["HND", "NHD"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# Packed or scaled types (NVFP4: int8 with a second tensor of scales) cannot be told from these by
# size alone, so only what is known to hold plain values is accepted.
_POOL_DTYPES = {
    "bfloat16": (torch.bfloat16,),
    "float16": (torch.float16,),
    # The runtime may type an fp8 pool as plain bytes.
    "float8_e4m3fn": (torch.float8_e4m3fn, torch.uint8),
}


class PagedPool:
    """One rank's pool tensor, checked. Blocks are [L, K, H, T, D] bit patterns (int16 or uint8).

    Args:
        tensor: the pool, as the engine registers it.
        spec: of the whole model.
        heads: what this rank holds of it.
        tokens_per_block: of the engine.

    Raises:
        LayoutError: the tensor is not a pool of that geometry; says what differs.
    """

    def __init__(
        self, tensor: torch.Tensor, *, spec: KVSpec, heads: HeadRange, tokens_per_block: int
    ) -> None:
        expected = (spec.num_layers, spec.kv_factor, heads.count * tokens_per_block * spec.head_dim)
        if tensor.ndim != 4 or tuple(tensor.shape[1:]) != expected:
            raise LayoutError(
                f"the engine's KV pool has the shape {list(tensor.shape)}, expected [num_blocks,"
                f" {expected[0]} layers, {expected[1]}, {expected[2]}] ({heads.count} heads x"
                f" {tokens_per_block} tokens x {spec.head_dim}); set engine.tokens_per_block to the"
                " engine's own (kv_cache_config.tokens_per_block); pools of mixed geometry"
                " (sliding windows, hybrid models) are not supported"
            )
        if tensor.dtype not in _POOL_DTYPES[spec.dtype]:
            raise LayoutError(
                f"the engine's KV pool is of {tensor.dtype}, engine.kv_dtype says {spec.dtype}; set"
                " it to the pool's (kv_cache_config.dtype). NVFP4 pools are not supported"
            )
        if not tensor.is_contiguous():
            raise LayoutError(
                "the engine's KV pool is not contiguous; its manager is not supported"
            )
        self.tensor = tensor
        self.spec = spec
        self.heads = heads
        self.tokens_per_block = tokens_per_block
        self.num_blocks = int(tensor.shape[0])
        self._bits = tensor.view(torch.int16 if spec.item_bytes == 2 else torch.uint8)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def block(self, block_id: int, layout: Layout) -> torch.Tensor:
        """[L, K, H, T, D], a view into the pool; strided for NHD."""
        return self.blocks(block_id, 1, layout)[0]

    def blocks(self, first: int, count: int, layout: Layout) -> torch.Tensor:
        """`count` neighbours: [count, L, K, H, T, D], a view into the pool; strided for NHD."""
        spec, tokens, heads = self.spec, self.tokens_per_block, self.heads.count
        slabs = self._bits[first : first + count]
        lead = (count, spec.num_layers, spec.kv_factor)
        if layout == "HND":
            return slabs.view(*lead, heads, tokens, spec.head_dim)
        return slabs.view(*lead, tokens, heads, spec.head_dim).transpose(3, 4)

    @property
    def has_one_order(self) -> bool:
        """Whether HND and NHD are the same bytes: one head, or one token in a block."""
        return self.heads.count == 1 or self.tokens_per_block == 1

    def probe_values(self, block_id: int) -> torch.Tensor:
        """What `probe_layout` judges: K and V of the first layer of one block, float32 on the CPU."""
        values = self.tensor[block_id, 0].contiguous().view(getattr(torch, self.spec.dtype))
        return values.to("cpu", torch.float32)


def probe_layout(values: torch.Tensor, *, num_heads: int, head_dim: int) -> Layout | None:
    """Find the order of a block from K and V of the first layer over equal tokens.

    The first layer's V is a function of the token alone (its input is the embedding; V carries no
    rotation). A block of one repeated token therefore holds equal rows for equal heads: in runs of
    `tokens` rows under HND, every `heads` rows under NHD. K is rotated by the position, so its rows
    differ. Together they also tell apart orders of equal shape that are neither: K and V swapped,
    or two heads where K and V are looked for.

    Args:
        values: [2, heads * tokens * head_dim] float: K, V.
        num_heads: of this rank; with one head (or one token) the orders are the same.
        head_dim: dims of one head.

    Returns:
        The layout; None where neither or both fit, so that the values prove nothing.
    """
    keys, rows = values.view(2, -1, head_dim)
    tokens = rows.shape[0] // num_heads
    if num_heads == 1 or tokens == 1:
        return "HND"
    if not bool(values.isfinite().all()) or not bool(rows.any()):
        return None
    fits: list[Layout] = [
        layout
        for layout in LAYOUTS
        if max(_spread(_by_head(rows, layout, num_heads))) <= _EQUAL
        and min(_spread(_by_head(keys, layout, num_heads))) > _EQUAL
    ]
    return fits[0] if len(fits) == 1 else None


# Equal inputs give equal rows up to the last bits (a GEMM may split rows over tiles).
_EQUAL = 0.02


def _by_head(rows: torch.Tensor, layout: Layout, num_heads: int) -> torch.Tensor:
    """[heads, tokens, head_dim] of rows in the given order."""
    if layout == "HND":
        return rows.view(num_heads, -1, rows.shape[-1])
    return rows.view(-1, num_heads, rows.shape[-1]).transpose(0, 1)


def _spread(heads: torch.Tensor) -> list[float]:
    """How much each head's rows differ over the tokens, as a part of the largest value of all."""
    scale = heads.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    difference = (heads - heads[:, :1]).abs().amax((1, 2)) / scale
    return [float(value) for value in difference]
