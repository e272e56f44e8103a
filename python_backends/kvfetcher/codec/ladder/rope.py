"""Rotary position encoding as the engine reports it, applied to and removed from KV arrays.

A transform is calibrated on keys before rotation, so that one basis serves every position. The
facts are per layer because models mix them (Gemma 3: two bases; others: layers without rotation).
Nothing here knows model families: linear, dynamic-NTK, YaRN and Llama-3 scaling all end in a list of
inverse frequencies and one amplitude, which the engine computes and states.

Angles are the float32 product ``position * inv_freq``, as Hugging Face and TensorRT-LLM form them;
computing them more exactly would undo a rotation that the engine never did.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kvfetcher.errors import ConfigError

RopeStyle = Literal["half", "interleaved"]

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LayerRope:
    """Rotation of one layer's keys.

    ``inv_freq`` holds one inverse frequency (radians per position) per rotated pair; empty = the
    layer is not rotated. The rotated dims are ``[offset, offset + 2 * len(inv_freq))`` of the head.
    ``style`` "half" pairs dim i with i + len (Llama, GPT-NeoX), "interleaved" pairs 2i with 2i + 1
    (GPT-J). ``amplitude`` is the factor on cos and sin (YaRN's attention scaling).
    """

    inv_freq: tuple[float, ...] = ()
    style: RopeStyle = "half"
    amplitude: float = 1.0
    offset: int = 0

    def __post_init__(self) -> None:
        if len(self.inv_freq) > 2048 or not all(
            isinstance(f, (int, float)) and math.isfinite(f) and f >= 0 for f in self.inv_freq
        ):
            raise ConfigError(
                "LayerRope.inv_freq must be at most 2048 finite numbers >= 0, got"
                f" {len(self.inv_freq)} values; report the engine's own table"
            )
        if self.style not in get_args(RopeStyle):
            raise ConfigError(
                f"LayerRope.style must be one of {get_args(RopeStyle)}, got {self.style!r}"
            )
        if not (isinstance(self.amplitude, (int, float)) and 1e-3 <= self.amplitude <= 1e3):
            raise ConfigError(f"LayerRope.amplitude must be 0.001 to 1000, got {self.amplitude!r}")
        if type(self.offset) is not int or not 0 <= self.offset <= 4096:
            raise ConfigError(f"LayerRope.offset must be 0 to 4096, got {self.offset!r}")

    @property
    def rotary_dim(self) -> int:
        """Number of rotated dims of a head."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotation of every layer, in layer order."""

    layers: tuple[LayerRope, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; equal layers are stored once."""
        kinds: list[LayerRope] = []
        index = []
        for layer in self.layers:
            if layer not in kinds:
                kinds.append(layer)
            index.append(kinds.index(layer))
        return {
            "kinds": [
                {
                    "inv_freq": [float(f) for f in k.inv_freq],
                    "style": k.style,
                    "amplitude": float(k.amplitude),
                    "offset": k.offset,
                }
                for k in kinds
            ],
            "layers": index,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Rope:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: the structure or a value is not that of `to_dict`.
        """
        try:
            kinds = [
                LayerRope(
                    tuple(float(f) for f in kind["inv_freq"]),
                    kind["style"],
                    float(kind["amplitude"]),
                    kind["offset"],
                )
                for kind in data["kinds"]
            ]
            layers = data["layers"]
            if not all(type(i) is int and 0 <= i < len(kinds) for i in layers):
                raise ConfigError("rope description: a layer names a kind that is not listed")
            return cls(tuple(kinds[i] for i in layers))
        except (KeyError, TypeError, ValueError, OverflowError) as exc:
            raise ConfigError(
                f"rope description is not {{kinds, layers}} as `Rope.to_dict` writes it: {exc!r}"
            ) from exc

    def digest(self) -> str:
        """Hex SHA-256 over the canonical JSON; equal digests rotate equally."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def slice(self, layer_start: int, num_layers: int) -> Rope:
        """The facts of a run of layers."""
        return Rope(self.layers[layer_start : layer_start + num_layers])


def cos_sin(layer: LayerRope, positions: NDArray[np.int64]) -> tuple[F32, F32]:
    """Cosine and sine tables with the amplitude applied, each [T, rotary_dim / 2] float32."""
    freq = np.asarray(layer.inv_freq, np.float32)
    angle = (positions.astype(np.float32)[:, None] * freq[None, :]).astype(np.float64)
    amplitude = layer.amplitude
    return (
        (np.cos(angle) * amplitude).astype(np.float32),
        (np.sin(angle) * amplitude).astype(np.float32),
    )


def rotate_keys(keys: F32, rope: Rope, first_position: int) -> None:
    """Apply the rotation, in place.

    Args:
        keys: [L, H, T, D] float32, keys before rotation; overwritten.
        rope: facts of these L layers.
        first_position: position of token 0; the tokens are consecutive.
    """
    _apply(keys, rope, first_position, inverse=False)


def unrotate_keys(keys: F32, rope: Rope, first_position: int) -> None:
    """Undo `rotate_keys`, in place. Inverse to float32 rounding, not bit-exact."""
    _apply(keys, rope, first_position, inverse=True)


def _apply(keys: F32, rope: Rope, first_position: int, *, inverse: bool) -> None:
    if keys.ndim != 4 or keys.shape[0] != len(rope.layers):
        raise ConfigError(
            f"keys must be [L, H, T, D] with L = {len(rope.layers)} layers of rope facts, got"
            f" shape {keys.shape}"
        )
    positions = np.arange(first_position, first_position + keys.shape[2], dtype=np.int64)
    tables: dict[LayerRope, tuple[F32, F32]] = {}
    for layer_keys, layer in zip(keys, rope.layers, strict=True):
        if not layer.inv_freq:
            continue
        end = layer.offset + layer.rotary_dim
        if end > keys.shape[3]:
            raise ConfigError(
                f"rope facts rotate dims {layer.offset} to {end} of a head of {keys.shape[3]}"
            )
        if layer not in tables:
            cos, sin = cos_sin(layer, positions)
            if inverse:
                square = np.float32(layer.amplitude**2)
                cos, sin = cos / square, -sin / square
            tables[layer] = cos, sin
        cos, sin = tables[layer]
        half = layer.rotary_dim // 2
        if layer.style == "half":
            first = layer_keys[..., layer.offset : layer.offset + half]
            second = layer_keys[..., layer.offset + half : end]
        else:
            first = layer_keys[..., layer.offset : end : 2]
            second = layer_keys[..., layer.offset + 1 : end : 2]
        rotated = first * cos
        rotated -= second * sin
        second *= cos
        second += first * sin
        first[...] = rotated
