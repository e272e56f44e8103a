"""The engine's paged KV memory as the connector sees it: block by block, in the canonical order.

TensorRT-LLM's first cache manager hands over one tensor ``[num_blocks, layers, kv_factor, heads *
tokens_per_block * head_dim]`` (`PagedPool`). Its second one describes byte ranges that repeat once per
block, and has block ids of its own for each group of layers (`LayerGroupPool`). Both are seen here as
parts: some layers, K or V or both, addressed by the ids of one group.

How a block's values of a layer are ordered depends on the attention backend: ``HND`` = [heads, tokens,
head_dim], ``NHD`` = [tokens, heads, head_dim]. A probe (`probe_layout`) establishes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from kvfetcher.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Sequence

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


_ROLES = {"key": 0, "value": 1}


@dataclass(frozen=True, slots=True)
class PoolPart:
    """Memory of some layers, addressed by one layer group's block ids."""

    group: int
    layers: slice
    """Which of the model's layers."""
    kinds: slice
    """Which of K and V."""
    bits: torch.Tensor
    """[blocks, layers, kinds, heads * tokens * head_dim], int16 or uint8; strided over the blocks."""


class PagedPool:
    """One rank's pool tensor, checked. Blocks are [L, K, H, T, D] bit patterns (int16 or uint8).

    Args:
        tensor: the pool, as the engine registers it.
        spec: geometry of the whole model.
        heads: what this rank holds of it.
        tokens_per_block: tokens per block of the engine.

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
        bits = tensor.view(_bits_dtype(spec))
        whole = PoolPart(0, slice(0, spec.num_layers), slice(0, spec.kv_factor), bits)
        self._take(spec, heads, tokens_per_block, (whole,))

    def _take(
        self, spec: KVSpec, heads: HeadRange, tokens_per_block: int, parts: tuple[PoolPart, ...]
    ) -> None:
        self.spec = spec
        self.heads = heads
        self.tokens_per_block = tokens_per_block
        self.parts = parts
        self.num_groups = 1 + max(part.group for part in parts)
        self.num_blocks = min(int(part.bits.shape[0]) for part in parts)
        self.device = parts[0].bits.device

    def view(self, part: PoolPart, first: int, count: int, layout: Layout) -> torch.Tensor:
        """`count` neighbouring blocks of a part: [count, L, K, H, T, D], a view into the pool.

        Raises:
            LayoutError: the part has no such blocks (an id of -1 stands for a block without memory).
        """
        if not 0 <= first <= first + count <= part.bits.shape[0]:
            raise LayoutError(
                f"the engine gave KV blocks {first} to {first + count - 1} of layer group"
                f" {part.group}, which has {part.bits.shape[0]}"
            )
        tokens, heads, dim = self.tokens_per_block, self.heads.count, self.spec.head_dim
        slabs = part.bits[first : first + count]
        if layout == "HND":
            return slabs.unflatten(3, (heads, tokens, dim))
        return slabs.unflatten(3, (tokens, heads, dim)).transpose(3, 4)

    @property
    def has_one_order(self) -> bool:
        """Whether HND and NHD are the same bytes: one head, or one token in a block."""
        return self.heads.count == 1 or self.tokens_per_block == 1

    def probe_values(self, block_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """What `probe_layout` judges: K and V of the first layer of one block, float32 on the CPU.

        Args:
            block_ids: by layer group; the first of each is looked at.
        """
        found = [
            part.bits[block_ids[part.group][0], 0].contiguous()
            for part in self.parts
            if part.layers.start == 0
        ]
        bits = torch.cat(found).view(getattr(torch, self.spec.dtype))
        return bits.to("cpu", torch.float32)


class LayerGroupPool(PagedPool):
    """One rank's memory as TensorRT-LLM's second cache manager describes it, checked.

    Args:
        layout: its `KvCacheLayout`: ``tokens_per_block`` and ``groups``, each with the byte ranges
            (``regions``) that repeat once per block, and the buffers in them.
        spec: geometry of the whole model.
        heads: what this rank holds of it.
        tokens_per_block: tokens per block of the engine.

    Raises:
        LayoutError: what it describes is not all layers' K and V of that geometry, of all tokens.
    """

    def __init__(
        self, layout: Any, *, spec: KVSpec, heads: HeadRange, tokens_per_block: int
    ) -> None:
        if layout.tokens_per_block != tokens_per_block:
            raise LayoutError(
                f"the engine's KV blocks hold {layout.tokens_per_block} tokens; set"
                " engine.tokens_per_block to that"
            )
        flat = heads.count * tokens_per_block * spec.head_dim
        parts: list[PoolPart] = []
        for group in layout.groups:
            _check_group(group)
            for region in group.regions:
                parts += _region_parts(region, int(group.layer_group_id), spec, flat)
        found = sorted(
            (layer, kind)
            for part in parts
            for layer in range(part.layers.start, part.layers.stop)
            for kind in range(part.kinds.start, part.kinds.stop)
        )
        wanted = [(layer, kind) for layer in range(spec.num_layers) for kind in (0, 1)]
        if spec.kv_factor != 2 or found != wanted:
            raise LayoutError(
                f"the engine describes {len(found)} buffers of K and V, expected both of"
                f" {spec.num_layers} layers"
            )
        # K before V of the first layer: the probe reads them in this order.
        parts.sort(key=lambda part: (part.layers.start, part.kinds.start))
        self._take(spec, heads, tokens_per_block, tuple(parts))


def _check_group(group: Any) -> None:
    name = f"layer group {group.layer_group_id} of the engine's KV cache"
    if group.window_size is not None:
        raise LayoutError(
            f"{name} keeps a window of {group.window_size} tokens only; with TensorRT-LLM models of"
            " full attention are supported"
        )
    if getattr(group, "replicated_regions", ()):
        raise LayoutError(f"{name} has data beside K and V (replicated regions): not supported")


def _region_parts(region: Any, group: int, spec: KVSpec, flat: int) -> list[PoolPart]:
    """One part for a run of whole layers in order, else one for each buffer."""
    buffers = []
    for buffer in region.buffers:
        role = str(buffer.role).rpartition(".")[2].lower()
        if role not in _ROLES or getattr(buffer, "expansion", 1) != 1:
            raise LayoutError(
                f"the engine's KV cache has a buffer {buffer.role!r} of layer {buffer.layer_id}"
                f" (expansion {getattr(buffer, 'expansion', 1)}); only plain K and V are supported"
            )
        buffers.append((int(buffer.layer_id), _ROLES[role]))
    size = len(buffers) * flat * spec.item_bytes
    if region.size != size:
        raise LayoutError(
            f"a region of the engine's KV cache has {region.size} bytes a block for {len(buffers)}"
            f" buffers, expected {size}: its KV type, heads or head_dim differ from {spec}"
        )
    bits = region.as_tensor().view(_bits_dtype(spec)).unflatten(1, (len(buffers), flat))
    first = buffers[0][0]
    layers = len(buffers) // 2
    if buffers == [(first + i, kind) for i in range(layers) for kind in (0, 1)]:
        whole = bits.unflatten(1, (layers, 2))
        return [PoolPart(group, slice(first, first + layers), slice(0, 2), whole)]
    return [
        PoolPart(group, slice(layer, layer + 1), slice(kind, kind + 1), bits[:, None, i, None])
        for i, (layer, kind) in enumerate(buffers)
    ]


def _bits_dtype(spec: KVSpec) -> torch.dtype:
    return torch.int16 if spec.item_bytes == 2 else torch.uint8


def probe_layout(values: torch.Tensor, *, num_heads: int, head_dim: int) -> Layout | None:
    """Find the order of a block from K and V of the first layer over equal tokens.

    The first layer's V is a function of the token alone (its input is the embedding; V carries no
    rotation). A block of one repeated token therefore holds equal rows for equal heads: in runs of
    `tokens` rows under HND, every `heads` rows under NHD. K is rotated by the position, so its rows
    differ. Together they also tell apart orders of equal shape that are neither: K and V swapped,
    or two heads where K and V are looked for.

    Args:
        values: [2, heads * tokens * head_dim] float: K, V (of MLA one latent of one head).
        num_heads: number of KV heads of this rank; with one head (or one token) the orders are the same.
        head_dim: dims of one head.

    Returns:
        The layout; None where neither or both fit, so that the values prove nothing.
    """
    if num_heads == 1 or values.shape[1] == num_heads * head_dim:
        return "HND"
    keys, rows = values.view(2, -1, head_dim)
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
