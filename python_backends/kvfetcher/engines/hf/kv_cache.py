"""The KV cache of one running request, in the form that transformers' models write to.

Values are rounded to the configured KV dtype as they are written and held in the compute dtype:
attention sees exactly what is shared, and export to bit patterns is an exact cast. A prefix loaded
from an arena is therefore indistinguishable from one computed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvfetcher.errors import LayoutError
from kvfetcher.memory.arena import storage_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.spec import KVSpec

# Whole cache lines per head, whatever the capacity: kernels then see one alignment, and equal
# inputs give equal bits in requests of different length.
_CAPACITY_STEP = 64


def kv_torch_dtype(spec: KVSpec) -> torch.dtype:
    """The torch type of `spec.dtype`."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def check_parts(
    keys: torch.Tensor, values: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor
) -> None:
    """Refuse what a model hands to its cache if it is not what its configuration says.

    Args:
        keys: [1, H, any, D] as expected.
        values: as `keys`; of MLA the rotated part.
        key_states: [1, H, n, D] as handed over.
        value_states: as `key_states`.

    Raises:
        ValueError: heads or widths differ.
    """
    expected = [(part.shape[1], part.shape[-1]) for part in (keys, values)]
    found = [(part.shape[1], part.shape[-1]) for part in (key_states, value_states)]
    if found != expected:
        raise ValueError(
            f"its layers keep two tensors of {found} (heads, width) per token where its"
            f" configuration means {expected}: KVFetcher does not know this kind of cache"
        )


class RoundingLayer(CacheLayerMixin):
    """One layer: preallocated keys and values [1, H, capacity, D]; grows by `update`.

    Of MLA they are the latent and the rotated part, each with a width of its own.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(
        self,
        spec: KVSpec,
        *,
        part_dims: tuple[int, int],
        capacity: int,
        compute_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        shape = (1, spec.num_kv_heads, capacity)
        self.keys = torch.empty((*shape, part_dims[0]), dtype=compute_dtype, device=device)
        self.values = torch.empty((*shape, part_dims[1]), dtype=compute_dtype, device=device)
        self.length = 0
        self.is_initialized = True
        self._kv_dtype = kv_torch_dtype(spec)
        # bfloat16 has float32's range. The others do not, and torch's cast makes inf or NaN of
        # what is too large: one such value would poison every later token.
        limit = torch.finfo(self._kv_dtype).max
        self._limit = None if self._kv_dtype is torch.bfloat16 else float(limit)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the tensors exist from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, H, n, D]; returns all keys and values up to now (views)."""
        check_parts(self.keys, self.values, key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = self._round(key_states)
        self.values[:, :, self.length : end] = self._round(value_states)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def _round(self, states: torch.Tensor) -> torch.Tensor:
        if self._limit is not None:
            states = states.clamp(-self._limit, self._limit)
        return states.to(self._kv_dtype)


class SequenceCache:
    """All layers of one request's cache. Used by the engine's thread only.

    Args:
        spec: geometry and KV dtype.
        part_dims: widths of the two tensors of a layer (`models.geometry.CacheGeometry`); None = K
            and V of head_dim each.
        capacity: tokens at most.
        compute_dtype: what the model computes in.
        device: where the model is.
    """

    def __init__(
        self,
        spec: KVSpec,
        *,
        capacity: int,
        compute_dtype: torch.dtype,
        device: torch.device,
        part_dims: tuple[int, int] | None = None,
    ) -> None:
        self.spec = spec
        self._part_dims = part_dims or (spec.head_dim, spec.head_dim)
        self.capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        self._layers = [
            RoundingLayer(
                spec,
                part_dims=self._part_dims,
                capacity=self.capacity,
                compute_dtype=compute_dtype,
                device=device,
            )
            for _ in range(spec.num_layers)
        ]
        self.for_model = Cache(layers=list(self._layers))

    @property
    def length(self) -> int:
        """Tokens held."""
        return int(self._layers[0].length)

    @property
    def is_uniform(self) -> bool:
        """Whether every layer holds the same tokens (not so where layers share their KV)."""
        return {layer.length for layer in self._layers} == {self.length}

    def note_border(self) -> None:
        """Nothing: K and V of every token are there (`states.StatefulCache` has more to keep)."""

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on; their values stay in memory until overwritten."""
        if not 0 <= length <= self.length:
            raise LayoutError(f"a cache of {self.length} tokens cannot be cut to {length}")
        for layer in self._layers:
            layer.length = length

    def append(self, values: Any) -> None:
        """Append tokens from bit patterns.

        Args:
            values: [L, K, H, T, D] of the spec's storage dtype, a numpy array or what an arena on a
                GPU gives (a tensor of as wide integers); copied.

        Raises:
            LayoutError: shape or dtype differ from the spec, or there is no room.
        """
        start, spec = self.length, self.spec
        expected = (spec.num_layers, spec.kv_factor, spec.num_kv_heads, spec.head_dim)
        shape = values.shape
        is_tensor = isinstance(values, torch.Tensor)
        wanted = _bits_dtype(spec) if is_tensor else storage_dtype(spec)
        if (*shape[:3], *shape[4:]) != expected or values.dtype != wanted:
            raise LayoutError(
                f"values must be {storage_dtype(spec)} [L, K, H, T, D] = {expected[:3]} T"
                f" {expected[3:]}, got {values.dtype} {shape}"
            )
        end = start + shape[3]
        if end > self.capacity:
            raise LayoutError(f"a cache of {self.capacity} tokens has no room for {end}")
        found = values if is_tensor else torch.from_numpy(np.ascontiguousarray(values))
        tensor = found.view(kv_torch_dtype(spec))
        for layer, part in zip(self._layers, tensor, strict=True):
            keys, values_ = split_parts(part, self._part_dims)
            layer.keys[0, :, start:end] = keys
            layer.values[0, :, start:end] = values_
            layer.length = end

    def export(self, start: int, end: int) -> NDArray[Any]:
        """Bit patterns of tokens [start, end): [L, K, H, T, D], a new array.

        Raises:
            LayoutError: the tokens are not all there.
        """
        return self.export_tensor(start, end).cpu().numpy().view(storage_dtype(self.spec))

    def export_tensor(self, start: int, end: int) -> torch.Tensor:
        """`export` where the cache lies, as signed or 8-bit integers: for an arena on that GPU.

        Raises:
            LayoutError: the tokens are not all there.
        """
        if not 0 <= start < end <= self.length:
            raise LayoutError(f"tokens [{start}, {end}) are not in a cache of {self.length}")
        spec, dtype = self.spec, kv_torch_dtype(self.spec)
        shape = (
            spec.num_layers, spec.kv_factor, spec.num_kv_heads, end - start, spec.head_dim
        )  # fmt: skip
        values = torch.empty(shape, dtype=dtype, device=self._layers[0].keys.device)
        for index, layer in enumerate(self._layers):
            # Exact: the values were rounded to this type when they were written.
            keys, rest = split_parts(values[index], self._part_dims)
            keys[...] = layer.keys[0, :, start:end].to(dtype)
            rest[...] = layer.values[0, :, start:end].to(dtype)
        return values.view(_bits_dtype(spec))


def split_parts(
    values: torch.Tensor, part_dims: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two tensors of a layer, views of its values [K, H, T, D]: K and V, or MLA's two parts."""
    if values.shape[0] == 2:
        return values[0], values[1]
    latent, rotated = values[0].split(part_dims, dim=-1)
    return latent, rotated


def _bits_dtype(spec: KVSpec) -> torch.dtype:
    """Torch's type for bit patterns; of two bytes only the signed one has all operations."""
    return torch.int16 if spec.item_bytes == 2 else torch.uint8
