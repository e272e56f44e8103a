"""What a model keeps in its KV cache, from its configuration alone; what cannot be shared is refused by name.

A prefix can be shared where each layer keeps, for each token, values that depend on this token and those
before it. Full attention does, and so do sliding and chunked windows: every token's values are kept, and
masks hide the old ones, so that a hit never holds less than a window needs. docs/models.md lists the
families.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfetcher.errors import EngineError
from kvfetcher.spec import KVSpec

if TYPE_CHECKING:
    from pathlib import Path

    from kvfetcher.spec import KVDtype

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers, as transformers calls them, whose cache is one K and one V per token and head."""
_STATES = ("linear", "mamba", "recurrent", "ssm", "conv", "kda", "gated_delta")
# Gated DeltaNet beside full attention; `engines.hf.states` keeps its states.
_STATEFUL_TYPES = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
STATE_FIELDS = (
    "hybrid_override_pattern",
    "mamba_num_heads",
    "mamba_n_heads",
    "mamba_d_state",
    "ssm_cfg",
    "state_size",
    "attn_layer_period",
    "layers_block_type",
    "block_types",
)
"""Of the configurations of models with recurrent layers that do not list the kinds of their layers."""


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """What one token of a model's cache is."""

    spec: KVSpec
    part_dims: tuple[int, int]
    """Widths of the two tensors that a layer hands to its cache. They are K and V of ``head_dim``
    each, or (MLA, ``kv_factor`` 1) the latent and the rotated part, side by side in one vector."""
    linear_layers: tuple[int, ...] = ()
    """Layers of the model that keep a state instead; `spec` has the others only."""

    @property
    def is_latent(self) -> bool:
        """MLA: one latent vector per token instead of K and V."""
        return self.spec.kv_factor == 1


def cache_geometry(config: Any, kv_dtype: KVDtype) -> CacheGeometry:
    """Geometry of a model's KV cache.

    Args:
        config: transformers' configuration.
        kv_dtype: type of the values.

    Raises:
        EngineError: the model's cache cannot be shared; says why.
    """
    refuse_unshareable(config)
    heads = config.num_attention_heads
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        rotated = int(config.qk_rope_head_dim)
        spec = KVSpec(
            num_layers=config.num_hidden_layers,
            num_kv_heads=1,
            head_dim=int(latent) + rotated,
            kv_factor=1,
            dtype=kv_dtype,
        )
        return CacheGeometry(spec, (int(latent), rotated))
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ()
    linear = tuple(i for i, kind in enumerate(kinds) if kind == "linear_attention")
    spec = KVSpec(
        num_layers=config.num_hidden_layers - len(linear),
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=dim,
        dtype=kv_dtype,
    )
    return CacheGeometry(spec, (dim, dim), linear)


def refuse_folder(folder: Path) -> None:
    """Refuse a model folder that the engines `torch` and `paged` cannot serve, by its configuration.

    Args:
        folder: Hugging Face's.

    Raises:
        EngineError: says what the model keeps instead of a cache that can be shared.
    """
    from transformers import AutoConfig

    from kvfetcher.models.identity import rope_text

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except (OSError, ValueError, KeyError) as exc:
        raise EngineError(f"model folder {folder} cannot be read: {exc}") from exc
    cache_geometry(config, "bfloat16")
    rope_text(config)


def refuse_unshareable(config: Any) -> None:
    """Refuse a model whose cache is not the same values for every token in every layer.

    Args:
        config: transformers' configuration.

    Raises:
        EngineError: says what the model keeps instead.
    """
    name = f"model type {getattr(config, 'model_type', '?')!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise EngineError(f"{name} is not a decoder-only language model")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "model_type", "") in _STATEFUL_TYPES and kinds != {"linear_attention"}:
        kinds.discard("linear_attention")
    other = sorted(kind for kind in kinds if kind not in ATTENTION_KINDS)
    fields = [field for field in STATE_FIELDS if getattr(config, field, None)]
    if fields or any(state in kind for kind in other for state in _STATES):
        raise EngineError(
            f"{name} has recurrent layers ({', '.join(other or fields)}). They keep one state for the"
            " whole prefix instead of values for each token; KVFetcher does not store states of this"
            " kind, and a hit without them would be wrong"
        )
    if getattr(config, "index_topk", None):
        raise EngineError(
            f"{name} has sparse attention with an indexer (index_topk), whose keys it keeps beside K and"
            " V; they are not stored, so its prefixes cannot be shared"
        )
    if other:
        raise EngineError(
            f"{name} has layers of kinds {other}; supported are {sorted(ATTENTION_KINDS)}"
        )
    if not hasattr(config, "num_attention_heads"):
        raise EngineError(f"{name} is not a decoder-only language model")
    if getattr(config, "num_kv_shared_layers", None):
        raise EngineError(
            f"{name} has {config.num_kv_shared_layers} layers that share the KV of others"
            " (num_kv_shared_layers); supported are models whose layers all keep their own"
        )
    counts = getattr(config, "num_key_value_heads", None)
    if isinstance(counts, (list, tuple)) and len(set(counts)) > 1:
        raise EngineError(f"{name} has other numbers of KV heads in some layers: not supported")
    dim, wide = getattr(config, "head_dim", None), getattr(config, "global_head_dim", None)
    if wide and wide != dim:
        raise EngineError(
            f"{name} has heads of {wide} dims in its full-attention layers and of {dim} in the others:"
            " not supported"
        )
