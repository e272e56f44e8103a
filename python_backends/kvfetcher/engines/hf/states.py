"""Caches of models with linear attention in some layers: K and V of the others, and states at chunk borders.

A layer with linear attention keeps no values per token, but a state of fixed size for the whole prefix. The
state behind a chunk's last token is stored with the chunk, bit for bit, in *state layers*: further layers of
the canonical array, behind those with attention, whose bit patterns are the states' bytes one after the
other, filled up with zeros. A hit ends with a chunk, so that its last chunk has the state it goes on from.
Only profiles that keep every bit may code such chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache, LinearAttentionLayer

from kvfetcher.engines.hf.kv_cache import SequenceCache
from kvfetcher.errors import EngineError, LayoutError
from kvfetcher.memory.arena import storage_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.models.geometry import CacheGeometry
    from kvfetcher.spec import KVSpec

LOSSLESS_PROFILES = frozenset({"exact", "raw", "auto"})
"""Profiles of `codec.profile` that keep states bit for bit; `auto` is `exact` for such models, which cannot
be calibrated."""


@dataclass(frozen=True, slots=True)
class StatePlan:
    """Which layers keep a state, and how states lie in a chunk."""

    num_model_layers: int
    layers: tuple[int, ...]
    """Layers of the model that keep a state; the others have attention."""
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shape and type of every tensor of the states: two for each layer, convolution then recurrence."""
    chunk_tokens: int
    attention: KVSpec
    """Geometry of the layers with attention alone."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all states at one border."""
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.tensors)

    @property
    def num_state_layers(self) -> int:
        """Layers of a chunk that hold them."""
        layer_bytes = (
            self.attention.elements_per_layer_token * self.attention.item_bytes * self.chunk_tokens
        )
        return -(-self.num_bytes // layer_bytes)

    @property
    def spec(self) -> KVSpec:
        """Geometry of a chunk: layers with attention, then state layers."""
        layers = self.attention.num_layers + self.num_state_layers
        return replace(self.attention, num_layers=layers)

    @property
    def identity(self) -> str:
        """For what chunks must agree on beside their geometry."""
        sizes = ",".join(f"{list(shape)} {dtype}" for shape, dtype in self.tensors)
        return f"states of layers {list(self.layers)} at ends of chunks as {sizes}"


def plan_states(model: Any, geometry: CacheGeometry, *, chunk_tokens: int) -> StatePlan:
    """Find what states a model keeps, by running one token.

    Args:
        model: loaded.
        geometry: with `linear_layers`.
        chunk_tokens: tokens of a chunk.

    Raises:
        EngineError: the model does not run, or keeps states of another kind.
    """
    from kvfetcher.engines.hf.model_call import forward

    num_layers = geometry.spec.num_layers + len(geometry.linear_layers)
    device = next(model.parameters()).device
    cache = _new_cache(
        SequenceCache(geometry.spec, capacity=1, compute_dtype=model.dtype, device=device),
        num_layers,
        geometry.linear_layers,
    )
    try:
        with torch.inference_mode():
            forward(model, torch.zeros((1, 1), dtype=torch.long, device=device), cache)
        tensors = tuple(
            (tuple(tensor.shape), tensor.dtype)
            for layer in geometry.linear_layers
            for tensor in _tensors_of(cache.layers[layer])
        )
    except (RuntimeError, TypeError, ValueError, AttributeError) as exc:
        raise EngineError(
            f"{type(model).__name__} keeps states of a kind that is not known: {exc}"
        ) from exc
    return StatePlan(
        num_layers, geometry.linear_layers, tuple(tensors), chunk_tokens, geometry.spec
    )


class StatefulCache(SequenceCache):
    """A `SequenceCache` with states. Values come and go by whole chunks.

    Args:
        plan: from `plan_states`.
        capacity: tokens at most.
        compute_dtype: what the model computes in.
        device: where the model is.
        keeps_borders: the chunks will be saved: keep the states at their ends, in host memory.
    """

    def __init__(
        self,
        plan: StatePlan,
        *,
        capacity: int,
        compute_dtype: torch.dtype,
        device: torch.device,
        keeps_borders: bool,
    ) -> None:
        super().__init__(
            plan.attention, capacity=capacity, compute_dtype=compute_dtype, device=device
        )
        self._plan = plan
        self._keeps_borders = keeps_borders
        self._borders: dict[int, NDArray[np.uint8]] = {}
        self.for_model = _new_cache(self, plan.num_model_layers, plan.layers)
        self._states = [self.for_model.layers[layer] for layer in plan.layers]

    def note_border(self) -> None:
        """Keep the states if a chunk ends here. Call it after every pass of the model."""
        if self._keeps_borders and self.length and self.length % self._plan.chunk_tokens == 0:
            parts = [t.contiguous().cpu() for s in self._states for t in _tensors_of(s)]
            flat = [part.view(torch.uint8).numpy().reshape(-1) for part in parts]
            self._borders[self.length] = np.concatenate(flat)

    def truncate(self, length: int) -> None:
        raise LayoutError("a cache with states cannot be cut: they cannot be taken back")

    def append(self, values: Any) -> None:
        """Append one chunk, and take up the states at its end."""
        plan = self._plan
        on_host = values.cpu().numpy() if isinstance(values, torch.Tensor) else values
        if values.shape[3] != plan.chunk_tokens or self.length % plan.chunk_tokens:
            raise LayoutError(
                f"a cache with states is filled by whole chunks of {plan.chunk_tokens} tokens, got"
                f" {values.shape[3]} at {self.length}"
            )
        super().append(values[: plan.attention.num_layers])
        layers = np.ascontiguousarray(on_host[plan.attention.num_layers :])
        flat = layers.view(np.uint8).reshape(-1)[: plan.num_bytes].copy()
        first = 0
        for index, (shape, dtype) in enumerate(plan.tensors):
            size = int(np.prod(shape)) * dtype.itemsize
            part = torch.from_numpy(flat[first : first + size]).view(dtype).view(shape)
            _put(self._states[index // 2], index % 2, part.to(self._device))
            first += size

    def export_tensor(self, start: int, end: int) -> torch.Tensor:
        """One chunk: its K and V, then the states at its end, which are forgotten.

        Raises:
            LayoutError: it is not a chunk, or its states were not kept.
        """
        plan = self._plan
        if end - start != plan.chunk_tokens or end not in self._borders:
            raise LayoutError(f"tokens [{start}, {end}) are not a chunk whose states are known")
        values = super().export_tensor(start, end)
        shape = (plan.num_state_layers, *values.shape[1:])
        layers = np.zeros(shape, storage_dtype(plan.attention))
        layers.view(np.uint8).reshape(-1)[: plan.num_bytes] = self._borders.pop(end)
        bits = torch.from_numpy(layers.view(np.int16 if layers.itemsize == 2 else np.uint8))
        return torch.cat((values, bits.to(values.device)))

    @property
    def _device(self) -> torch.device:
        return self._layers[0].keys.device


def _new_cache(attention: SequenceCache, num_layers: int, linear: tuple[int, ...]) -> Cache:
    """The model's view: a state for each layer of `linear`, `attention`'s layers for the others."""
    others = iter(attention.for_model.layers)
    return Cache(
        layers=[LinearAttentionLayer() if i in linear else next(others) for i in range(num_layers)]
    )


def _tensors_of(layer: LinearAttentionLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolution state and recurrent state."""
    if layer.number_of_states != 1:
        raise ValueError(f"{layer.number_of_states} states in one layer")
    conv, recurrent = layer.conv_states[0], layer.recurrent_states[0]
    if conv is None or recurrent is None:
        raise ValueError("a layer without a convolution state or without a recurrent one")
    return conv, recurrent


def _put(layer: LinearAttentionLayer, kind: int, state: torch.Tensor) -> None:
    if kind == 0:
        layer.lazy_initialization(conv_states=state)
        layer.conv_states[0].copy_(state)
        layer.has_previous_state[0] = True
    else:
        layer.lazy_initialization(recurrent_states=state)
        layer.recurrent_states[0].copy_(state)
