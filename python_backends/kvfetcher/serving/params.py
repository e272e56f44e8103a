"""What a client asked for: its sampling inputs, checked once, and their JSON form between models."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvfetcher import wire
from kvfetcher.errors import RequestError
from kvfetcher.serving.tensors import read_ids, read_scalar, read_text, read_texts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kvfetcher.config import EngineConfig

_DEFAULT_MAX_TOKENS = 16  # as OpenAI's completions endpoint and vLLM
_MAX_STOP_WORDS = 64
_MAX_SALT_CHARS = 1024


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """Sampling parameters as they travel from `kv_fetch` to `tensorrt_llm` (JSON).

    `echo` is the text to prepend to the answer (exclude_input_in_output = false); "" otherwise.
    """

    max_tokens: int = _DEFAULT_MAX_TOKENS
    stream: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_words: tuple[str, ...] = ()
    min_length: int = 0
    cache_salt: str = ""
    save: bool = True
    echo: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SamplingRequest:
        """Parse; "" gives the defaults (the model used alone).

        Raises:
            RequestError: not such JSON.
        """
        if not text:
            return cls()
        try:
            data = json.loads(text)
            return cls(**{**data, "stop_words": tuple(data.get("stop_words", ()))})
        except (ValueError, TypeError, AttributeError) as exc:
            raise RequestError(f"input {wire.SAMPLING!r} is not sampling JSON: {exc}") from exc


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """One request as `kv_fetch` sees it."""

    input_ids: NDArray[np.int32]
    kv_policy: str
    cache_salt: str
    sampling_json: str


def read_client_request(request: Any, config: EngineConfig, pb_utils: Any) -> ClientRequest:
    """Read and check every input of the client.

    Raises:
        RequestError: an input breaks its rule; the message names the input, the rule, the value.
    """

    def number(name: str, default: Any, low: float, high: float) -> Any:
        value = read_scalar(request, name, pb_utils)
        if value is None:
            return default
        if not math.isfinite(value) or not low <= value <= high:
            raise RequestError(f"{name} must be {low:g} to {high:g}, got {value}")
        return value

    input_ids = read_ids(request, wire.INPUT_IDS, pb_utils)
    policy = read_text(request, wire.KV_POLICY, pb_utils, default="auto")
    if policy not in wire.KV_POLICIES:
        raise RequestError(f"kv_policy must be one of {wire.KV_POLICIES}, got {policy!r}")
    salt = read_text(request, wire.CACHE_SALT, pb_utils, default="")
    if len(salt) > _MAX_SALT_CHARS:
        raise RequestError(f"cache_salt may have {_MAX_SALT_CHARS} characters, got {len(salt)}")
    stop_words = tuple(read_texts(request, wire.STOP_WORDS, pb_utils) or ())
    if len(stop_words) > _MAX_STOP_WORDS:
        raise RequestError(f"stop_words may be {_MAX_STOP_WORDS}, got {len(stop_words)}")
    echo = ""
    if read_scalar(request, wire.EXCLUDE_INPUT_IN_OUTPUT, pb_utils) is False:
        echo = read_text(request, wire.TEXT_INPUT, pb_utils, default="")
    sampling = SamplingRequest(
        max_tokens=number(wire.MAX_TOKENS, _DEFAULT_MAX_TOKENS, 1, config.max_output_tokens),
        stream=bool(read_scalar(request, wire.STREAM, pb_utils)),
        temperature=number(wire.TEMPERATURE, 0.0, 0, 100),
        top_k=number(wire.TOP_K, 0, 0, 1 << 20),
        top_p=number(wire.TOP_P, 1.0, 0, 1),
        seed=number(wire.SEED, 0, 0, float(1 << 64)),
        stop_words=tuple(w for w in stop_words if w),
        min_length=number(wire.MIN_LENGTH, 0, 0, config.max_output_tokens),
        cache_salt=salt,
        save=policy != "no_store",
        echo=echo,
    )
    return ClientRequest(input_ids, policy, salt, sampling.to_json())
