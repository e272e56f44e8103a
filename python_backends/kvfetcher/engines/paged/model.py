"""A Hugging Face model whose attention reads and writes a paged KV pool.

Keys and values are rounded to the pool's type as they are written, and attention reads them back from the
pool: what it sees is what the connector saves and loads. A rank of a tensor-parallel engine keeps its own
KV heads, and the query heads that go with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvfetcher.engines.hf.kv_cache import check_parts, kv_torch_dtype
from kvfetcher.engines.hf.model_call import forward
from kvfetcher.errors import EngineError
from kvfetcher.spec import heads_of_rank

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.engines.connector.pool import Layout
    from kvfetcher.engines.hf.loader import LoadedModel
    from kvfetcher.engines.paged.contract import Ranks
    from kvfetcher.spec import HeadRange, KVSpec


class PagedKV:
    """One rank's pool and the cursor of the sequence that runs now. The engine's thread only.

    Args:
        spec: geometry of the whole model.
        heads: KV heads of this rank.
        num_blocks: number of blocks of the pool.
        tokens_per_block: of a block.
        layout: order inside a block.
        compute_dtype: what attention computes in.
        device: where the model is.
        part_dims: widths of the two tensors of a layer (`models.geometry.CacheGeometry`).
    """

    def __init__(
        self,
        spec: KVSpec,
        *,
        heads: HeadRange,
        num_blocks: int,
        tokens_per_block: int,
        layout: Layout,
        compute_dtype: torch.dtype,
        device: torch.device,
        part_dims: tuple[int, int],
    ) -> None:
        self._part_dims = part_dims
        self._expected = [torch.empty((1, heads.count, 0, dim)) for dim in part_dims]
        self._dtype = kv_torch_dtype(spec)
        self._is_latent = spec.kv_factor == 1
        self._tokens_per_block = tokens_per_block
        self._compute_dtype = compute_dtype
        flat = heads.count * tokens_per_block * spec.head_dim
        self.pool = torch.zeros(
            (num_blocks, spec.num_layers, spec.kv_factor, flat), dtype=self._dtype, device=device
        )
        lead = (num_blocks, spec.num_layers, spec.kv_factor)
        if layout == "HND":
            tokens_last = self.pool.view(*lead, heads.count, tokens_per_block, spec.head_dim)
            self._by_token = tokens_last.transpose(3, 4)
        else:
            self._by_token = self.pool.view(*lead, tokens_per_block, heads.count, spec.head_dim)
        # bfloat16 has float32's range; the others turn what is too large into inf or NaN.
        limit = float(torch.finfo(self._dtype).max)
        self._limit = None if self._dtype is torch.bfloat16 else limit
        self._blocks = torch.zeros(0, dtype=torch.long, device=device)
        self._start = 0
        self.for_model = Cache(layers=[_PagedLayer(self, i) for i in range(spec.num_layers)])

    def point(self, block_ids: list[int], start: int) -> None:
        """Make the sequence in `block_ids` the current one, its tokens before `start` being there."""
        self._blocks = torch.tensor(block_ids, dtype=torch.long, device=self.pool.device)
        self._start = start

    @property
    def start(self) -> int:
        return self._start

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, H, n, D] behind the current position; returns all up to there, [1, H, T, D]."""
        check_parts(self._expected[0], self._expected[1], keys, values)
        end = self._start + keys.shape[-2]
        positions = torch.arange(self._start, end, device=self.pool.device)
        blocks = self._blocks[positions // self._tokens_per_block]
        slots = positions % self._tokens_per_block
        if self._is_latent:  # side by side in one vector
            both = torch.cat((keys, values), dim=-1)
            self._by_token[blocks, layer, 0, slots] = self._round(both[0].transpose(0, 1))
            latent, rotated = self._gather(layer, 0, end).split(self._part_dims, dim=-1)
            return latent.contiguous(), rotated.contiguous()
        for kind, states in enumerate((keys, values)):
            self._by_token[blocks, layer, kind, slots] = self._round(states[0].transpose(0, 1))
        return self._gather(layer, 0, end), self._gather(layer, 1, end)

    def _gather(self, layer: int, kind: int, end: int) -> torch.Tensor:
        used = self._blocks[: -(-end // self._tokens_per_block)]
        # The pool itself is indexed: advanced indexing of fp8 is a copy of bytes, arithmetic is not
        # asked of it.
        parts = self._by_token[used, layer, kind]  # [B, T, H, D]
        tokens = parts.reshape(-1, *parts.shape[2:])[:end]
        return tokens.transpose(0, 1).unsqueeze(0).to(self._compute_dtype).contiguous()

    def _round(self, states: torch.Tensor) -> torch.Tensor:
        if self._limit is not None:
            states = states.clamp(-self._limit, self._limit)
        return states.to(self._dtype)


class _PagedLayer(CacheLayerMixin):
    """One layer's window on the pool, in the form that transformers' models write to."""

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self, paged: PagedKV, index: int) -> None:
        super().__init__()
        self._paged = paged
        self._index = index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the pool exists from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._paged.update(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._paged.start + query_length, 0

    def get_seq_length(self) -> int:
        return self._paged.start

    def get_max_length(self) -> int:
        return -1


class PagedModel:
    """A loaded model over its own pool.

    Args:
        loaded: the model; changed in place where it is one rank of several.
        ranks: the engine's processes.
        num_blocks: number of blocks of the pool.
        tokens_per_block: of a block.
        layout: order inside a block.

    Raises:
        ConfigError: the KV heads cannot be divided among the ranks.
        EngineError: the model is not built like Llama, or its query heads cannot be dealt out.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        ranks: Ranks,
        num_blocks: int,
        tokens_per_block: int,
        layout: Layout = "HND",
    ) -> None:
        if loaded.states is not None:
            raise EngineError(
                f"the model in {loaded.folder} keeps states (linear attention), which the paged engine"
                ' has no memory for; set engine.kind = "torch"'
            )
        self.loaded = loaded
        heads = heads_of_rank(loaded.spec.num_kv_heads, rank=ranks.rank, num_ranks=ranks.size)
        self.kv = PagedKV(
            loaded.spec,
            heads=heads,
            num_blocks=num_blocks,
            tokens_per_block=tokens_per_block,
            layout=layout,
            compute_dtype=loaded.compute_dtype,
            device=loaded.device,
            part_dims=loaded.part_dims,
        )
        if ranks.size > 1:
            _keep_heads(loaded, heads, ranks)

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """What forward passes run on; None on a CPU."""
        device = self.loaded.device
        return torch.cuda.current_stream(device) if device.type == "cuda" else None

    def hook_layers(self, before: Callable[[int], None], after: Callable[[int], None]) -> None:
        """Call back just before and just after each decoder layer is enqueued."""
        for index, layer in enumerate(_layers(self.loaded)):
            layer.register_forward_pre_hook(lambda *_, i=index: before(i))
            layer.register_forward_hook(lambda *_, i=index: after(i))

    def forward(self, token_ids: list[int], block_ids: list[int], start: int) -> torch.Tensor:
        """Run tokens at positions from `start` on; returns the logits [vocab] after the last one."""
        self.kv.point(block_ids, start)
        ids = torch.tensor([token_ids], dtype=torch.long, device=self.loaded.device)
        return forward(self.loaded.model, ids, self.kv.for_model)[0, -1]


def _layers(loaded: LoadedModel) -> Any:
    layers = getattr(getattr(loaded.model, "model", None), "layers", None)
    if layers is None:
        raise EngineError(f"{type(loaded.model).__name__} has no model.layers to run on paged KV")
    return layers


def _keep_heads(loaded: LoadedModel, heads: HeadRange, ranks: Ranks) -> None:
    """Cut every attention to the rank's heads; the ranks' outputs are summed. The MLPs stay whole."""
    spec = loaded.spec
    queries = loaded.model.config.num_attention_heads // spec.num_kv_heads
    dim = spec.head_dim
    # Ranks that share a KV head each take their part of its query heads.
    sharing = max(1, ranks.size // spec.num_kv_heads)
    if queries * heads.count % sharing:
        raise EngineError(
            f"{queries} query heads of a KV head cannot be divided among the {sharing} ranks that share"
            " it; use fewer ranks"
        )
    per_rank = queries * heads.count // sharing
    first = heads.start * queries + (ranks.rank % sharing) * per_rank
    query_rows = slice(first * dim, (first + per_rank) * dim)
    kv_rows = slice(heads.start * dim, heads.stop * dim)
    for layer in _layers(loaded):
        attention = layer.self_attn
        for name, rows in (("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
            linear = getattr(attention, name)
            linear.weight = torch.nn.Parameter(linear.weight[rows].clone(), requires_grad=False)
            if linear.bias is not None:
                linear.bias = torch.nn.Parameter(linear.bias[rows].clone(), requires_grad=False)
        output = attention.o_proj
        if output.bias is not None:
            raise EngineError("a model with a bias on o_proj cannot run on several ranks")
        output.weight = torch.nn.Parameter(
            output.weight[:, query_rows].clone(), requires_grad=False
        )
        output.register_forward_hook(lambda _, __, result: ranks.all_reduce(result))
        if sharing > 1:
            attention.num_key_value_groups = per_rank
