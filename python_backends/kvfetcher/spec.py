"""What a KV cache looks like, and whose it is: plain data, no arrays.

Canonical array of KV values, everywhere in this package: ``[L, K, H, T, D]`` = layers, K then V
(``kv_factor`` 2; MLA's one latent tensor is ``kv_factor`` 1), KV heads, tokens, head dim, holding
the *bit patterns* of ``KVSpec.dtype`` as uint16 (bfloat16, float16) or uint8 (float8_e4m3fn),
because numpy has no bfloat16. K is stored with RoPE applied, as the engine's cache holds it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from kvfetcher.errors import ConfigError

FORMAT_VERSION = 1

RAW_VARIANT = "raw"
"""Variant name of units that hold the values as they are: nothing to decode."""
PACKED_VARIANT = "packed"
"""Variant name of units that hold a profile's integers without video: restored, but not decoded."""

KVDtype = Literal["bfloat16", "float16", "float8_e4m3fn"]

ITEM_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Geometry of one token's KV values.

    ``elements_per_token`` counts values over all layers, K and V, heads and dims.

    Example:
        >>> KVSpec(num_layers=30, num_kv_heads=3, head_dim=64).bytes_per_token
        23040
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    kv_factor: int = 2
    dtype: KVDtype = "bfloat16"

    def __post_init__(self) -> None:
        for name, bound in (("num_layers", 1024), ("num_kv_heads", 1024), ("head_dim", 4096)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= bound:
                raise ConfigError(f"KVSpec.{name} must be 1 to {bound}, got {value!r}")
        if self.kv_factor not in (1, 2):
            raise ConfigError(
                f"KVSpec.kv_factor must be 1 (MLA) or 2 (K, V), got {self.kv_factor!r}"
            )
        if self.dtype not in get_args(KVDtype):
            raise ConfigError(
                f"KVSpec.dtype must be one of {get_args(KVDtype)}, got {self.dtype!r}"
            )

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def elements_per_layer_token(self) -> int:
        return self.kv_factor * self.num_kv_heads * self.head_dim

    @property
    def elements_per_token(self) -> int:
        return self.num_layers * self.elements_per_layer_token

    @property
    def bytes_per_token(self) -> int:
        return self.elements_per_token * self.item_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class HeadRange:
    """KV heads [start, stop) of the whole model."""

    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """Slice of the heads of a canonical array of the whole model."""
        return slice(self.start, self.stop)


def heads_of_rank(num_kv_heads: int, *, rank: int, num_ranks: int) -> HeadRange:
    """The KV heads of a tensor-parallel rank; with more ranks than heads, neighbours share one.

    Raises:
        ConfigError: the heads cannot be dealt out evenly.

    Example:
        >>> heads_of_rank(8, rank=1, num_ranks=4)
        HeadRange(start=2, stop=4)
        >>> heads_of_rank(2, rank=1, num_ranks=4)
        HeadRange(start=0, stop=1)
    """
    if not 0 <= rank < num_ranks:
        raise ConfigError(f"rank {rank} is not one of {num_ranks}")
    if num_kv_heads % num_ranks == 0:
        each = num_kv_heads // num_ranks
        return HeadRange(rank * each, (rank + 1) * each)
    if num_ranks % num_kv_heads == 0:
        head = rank // (num_ranks // num_kv_heads)
        return HeadRange(head, head + 1)
    raise ConfigError(
        f"{num_kv_heads} KV heads cannot be divided among {num_ranks} tensor-parallel ranks; use a"
        " number of ranks that divides the heads or is a multiple of them"
    )


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Everything that KV values depend on besides the tokens before them (promise 2).

    Digests are lower-case hex SHA-256. ``lora`` is "" for the base model. ``rope`` is a canonical
    text of the position encoding (type, base, scaling). A field that is missing refuses to cache:
    there are no defaults for what must be known.
    """

    weights: str
    tokenizer: str
    lora: str
    rope: str
    compute: str
    spec: KVSpec

    def __post_init__(self) -> None:
        for name in ("weights", "tokenizer", "rope", "compute"):
            if not getattr(self, name):
                raise ConfigError(
                    f"ModelIdentity.{name} is empty; KV values without it must not be shared"
                )

    def digest(self, *, profile: str, chunk_tokens: int) -> bytes:
        """32 bytes naming the family of chunks that are interchangeable.

        ``profile`` is the codec profile with its parameters (for a calibrated profile, with the
        digest of the calibration).
        """
        text = json.dumps(
            {
                "model": asdict(self),
                "profile": profile,
                "chunk_tokens": chunk_tokens,
                "format": FORMAT_VERSION,
            },
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=True,
        )
        return hashlib.sha256(text.encode()).digest()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelIdentity:
        return cls(**{**data, "spec": KVSpec(**data["spec"])})


@dataclass(frozen=True, slots=True)
class RopeFacts:
    """The position encoding as numbers, for codecs that undo it on K.

    Rotation is of the "half" kind: of a layer with n frequencies, dim i pairs with i + n, angle =
    position * inv_freq[i]; both cos and sin are multiplied by ``attention_scaling``. Dims from 2 n
    on are not rotated.
    """

    inv_freq: tuple[tuple[float, ...], ...]
    """Per layer, radians per token of each pair; () = a layer without rotation."""
    attention_scaling: tuple[float, ...]
    """Per layer."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RopeFacts:
        return cls(
            tuple(tuple(layer) for layer in data["inv_freq"]),
            tuple(data["attention_scaling"]),
        )


LADDER = ("near", "balanced", "compact", "tiny")
