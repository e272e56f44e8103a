"""KV values and their sensitivities out of a Hugging Face causal model (torch, CPU or GPU).

The model runs on plain per-layer tensors: `prefill` hands them out, `logits` takes them
back, changed or not. `measure_rope` finds the rotation of every layer by measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvfetcher.codec.ladder.rope import LayerRope, Rope, unrotate_keys
from kvfetcher.engines.hf.model_call import forward
from kvfetcher.errors import ConfigError, EngineError
from kvfetcher.models.geometry import cache_geometry
from kvfetcher.models.identity import refuse_changing_rope
from kvfetcher.spec import KVSpec

if TYPE_CHECKING:
    from pathlib import Path

F32 = NDArray[np.float32]

# Un-rotated keys of a repeated token differ by float32 rounding only: 1e-5 of their norm over 64
# positions (SmolLM2, Gemma 3); a wrong table or pairing gives 0.1 to 1.
_ROPE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class CapturedKV:
    """One sequence's KV cache: ``layers[l]`` = (K, V), each [1, H, T, D] on the model's device."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def to_array(self) -> F32:
        """[L, 2, H, T, D] float32, K rotated as the model keeps it."""
        return np.stack(
            [
                np.stack([k[0].float().cpu().numpy(), v[0].float().cpu().numpy()])
                for k, v in self.layers
            ]
        )


class CaptureModel:
    """A causal language model whose cache can be read, replaced and differentiated.

    Not thread-safe. Weights are frozen; only cache tensors get gradients.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> CaptureModel:
        """Load a local Hugging Face folder in float32.

        Raises:
            EngineError: transformers cannot load it.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as exc:
            raise EngineError(f"model folder {folder} cannot be loaded: {exc}") from exc
        geometry = cache_geometry(model.config, "bfloat16")
        if geometry.linear_layers:
            raise ConfigError(
                f"model type {model.config.model_type!r} keeps states (linear attention), which must stay"
                " as they are: use `exact` for this model"
            )
        if geometry.is_latent:
            raise ConfigError(
                f"model type {model.config.model_type!r} keeps one latent per token (MLA); the profiles"
                " that are calibrated transform K and V: use `exact` for this model"
            )
        return cls(model.to(device), tokenizer)

    @property
    def vocabulary_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    def measure_spec(self) -> KVSpec:
        """Geometry of the cache, read from a short prefill; the dtype is the default one."""
        layers = self.prefill([0, 1]).layers
        _, heads, _, dim = layers[0][0].shape
        return KVSpec(len(layers), heads, dim)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the tokenizer's length warning."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def prefill(self, ids: list[int], *, slice_tokens: int = 1024) -> CapturedKV:
        """KV cache of a sequence, computed in slices to bound activation memory."""
        cache = _new_cache()
        with torch.no_grad():
            for start in range(0, len(ids), slice_tokens):
                self._forward(ids[start : start + slice_tokens], cache, start, keep=1)
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        shapes = {tuple(k.shape) for k, _ in layers} | {tuple(v.shape) for _, v in layers}
        if len(shapes) != 1:
            raise ConfigError(
                "the layers of this model differ in KV heads or head dim"
                f" ({sorted(shapes)}); a transform needs one geometry, use `exact` for it"
            )
        return CapturedKV(layers)

    def take(self, values: F32) -> CapturedKV:
        """Inverse of `CapturedKV.to_array`: a cache of the model's dtype, on its device."""
        return CapturedKV(
            tuple((self._tensor(layer[0]), self._tensor(layer[1])) for layer in values)
        )

    def _tensor(self, values: F32) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))[None]
        return tensor.to(device=self.model.device, dtype=self.model.dtype)

    def logits(self, ids: list[int], kv: CapturedKV) -> torch.Tensor:
        """Next-token logits [T, V] of ``ids`` teacher-forced after the cache ``kv``."""
        cache = _new_cache()
        for index, (k, v) in enumerate(kv.layers):
            cache.update(k, v, index)
        return self._forward(ids, cache, kv.layers[0][0].shape[2], keep=len(ids))[0]

    def sensitivity(self, ids: list[int], kv: CapturedKV, *, generator: torch.Generator) -> F32:
        """Gradient of the log-likelihood of labels drawn from the model itself.

        Args:
            ids: tokens after the cache; one label is drawn at each.
            kv: cache whose sensitivity is asked for.
            generator: generator of the draws (CPU).

        Returns:
            [L, 2, H, T, D] float32, d sum(log p(label)) / d cache. Its second moment over draws is
            ``len(ids)`` times the Fisher information of one position's distribution.
        """
        leaves = [
            (k.detach().clone().requires_grad_(), v.detach().clone().requires_grad_())
            for k, v in kv.layers
        ]
        with torch.enable_grad():
            logits = self.logits(ids, CapturedKV(tuple(leaves)))
            log_p = torch.log_softmax(logits.float(), dim=-1)
            with torch.no_grad():
                labels = torch.multinomial(log_p.exp().cpu(), 1, generator=generator)
            total = log_p.gather(1, labels.to(log_p.device)).sum()
            total.backward()
        gradients = tuple((_gradient(k), _gradient(v)) for k, v in leaves)
        return CapturedKV(gradients).to_array()

    def measure_rope(self) -> Rope:
        """The rotation of every layer, found by measurement.

        A prompt of one repeated token has the same hidden state at every position (attention
        averages equal values), so keys before rotation are equal along the sequence. Every table the
        model holds, in both pairings, and no rotation, are tried per layer; the one that makes the
        keys equal is the fact.

        Raises:
            EngineError: the rotation changes with the length of the sequence.
            ConfigError: no candidate explains a layer's keys.
        """
        refuse_changing_rope(self.model.config)
        num_tokens = 64
        token = self.vocabulary_size // 3
        keys = self.prefill([token] * num_tokens).to_array()[:, 0]
        candidates = self._rope_candidates(keys.shape[-1])
        chosen = []
        for index, layer_keys in enumerate(keys):
            errors = []
            for candidate in candidates:
                trial = layer_keys[None].copy()
                unrotate_keys(trial, Rope((candidate,)), 0)
                # The first tokens are skipped: some models treat position 0 apart.
                spread = np.abs(trial[0, :, 4:] - trial[0, :, 4:5]).max()
                errors.append(float(spread / np.abs(trial[0, :, 4:]).max()))
            best = int(np.argmin(errors))
            if not errors[best] <= _ROPE_TOLERANCE:
                raise ConfigError(
                    f"layer {index}: none of {len(candidates)} rotations explains the keys (best"
                    f" deviation {errors[best]:.2g}, allowed {_ROPE_TOLERANCE}); keys of another"
                    " position encoding cannot be calibrated, use `exact` for this model"
                )
            chosen.append(candidates[best])
        return Rope(tuple(chosen))

    def _rope_candidates(self, head_dim: int) -> list[LayerRope]:
        candidates = [LayerRope()]
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if not name.endswith("inv_freq") or "original" in name:
                    continue
                prefix = name.removesuffix("inv_freq")
                amplitude = float(getattr(module, f"{prefix}attention_scaling", 1.0))
                table = tuple(float(f) for f in buffer.float().cpu().numpy())
                spare = head_dim - 2 * len(table)
                for offset in sorted({0, spare}) if spare >= 0 else []:
                    for candidate in (
                        LayerRope(table, "half", amplitude, offset),
                        LayerRope(table, "interleaved", amplitude, offset),
                    ):
                        if candidate not in candidates:
                            candidates.append(candidate)
        return candidates

    def _forward(self, ids: list[int], cache: Any, position: int, *, keep: int) -> torch.Tensor:
        device = self.model.device
        tokens = torch.tensor([ids], device=device)
        positions = torch.arange(position, position + len(ids), device=device)[None]
        return forward(self.model, tokens, cache, num_logits=keep, position_ids=positions)


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    """Gradient of a leaf; zeros where the tokens that follow never attend to it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _new_cache() -> Any:
    from transformers import DynamicCache

    # Without a config every layer keeps all tokens; sliding windows are then applied by the mask.
    return DynamicCache()
