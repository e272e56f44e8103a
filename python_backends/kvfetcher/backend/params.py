"""What a client asked for: its sampling inputs, checked once, and their JSON form between models."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvfetcher import wire
from kvfetcher.backend.tags import compare, prompt_tag
from kvfetcher.backend.tensors import read_ids, read_scalar, read_text, read_texts
from kvfetcher.engines.base import SamplingParams
from kvfetcher.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from kvfetcher.config import EngineConfig

_MAX_SALT_CHARACTERS = 1024
_NUMBERS = (
    wire.MAX_TOKENS,
    wire.TEMPERATURE,
    wire.TOP_K,
    wire.TOP_P,
    wire.SEED,
    wire.MIN_LENGTH,
    wire.EXCLUDE_INPUT_IN_OUTPUT,
)


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How to generate, as it travels from `kv_fetch` to `tensorrt_llm` (JSON)."""

    params: SamplingParams = field(default_factory=SamplingParams)
    stream: bool = False
    cache_salt: str = ""
    save: bool = False
    heartbeat: bool = False
    """Send empty responses while nothing else is to be sent (`postprocessing` drops them)."""
    generate: bool = True
    """False = nothing is to be computed: answer at once, with the report."""
    request_id: str = ""
    """The client's; `tensorrt_llm` compares it with its own, and the report has it."""
    fetch_id: str = ""
    """Not "" = this is no request but a sign of life of a fetch (`backend.watching`)."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> GenerationOptions:
        """Parse; "" gives the defaults (the model used alone, nothing saved).

        Raises:
            RequestError: not such JSON, or a value out of its range.
        """
        if not text:
            return cls()
        try:
            data = json.loads(text)
            params = data.get("params", {})
            params["stop_words"] = tuple(params.get("stop_words", ()))
            return cls(**{**data, "params": SamplingParams(**params)})
        except (ValueError, TypeError, AttributeError) as exc:
            raise RequestError(f"input {wire.SAMPLING!r} is not sampling JSON: {exc}") from exc


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """One request as `kv_fetch` sees it."""

    input_ids: NDArray[np.int32]
    kv_policy: str
    options: GenerationOptions


def read_client_request(
    request: Any, config: EngineConfig, pb_utils: Any, *, run_folder: Path | None = None
) -> ClientRequest:
    """Read and check every input of the client.

    Args:
        request: of `kv_fetch`.
        config: limits.
        pb_utils: the module `triton_python_backend_utils`.
        run_folder: of the server; see `tags.compare`.

    Raises:
        MixedUpError: the token ids are another text's.
        RequestError: an input breaks its rule; the message names the input, the rule, the value.
    """
    text = read_texts(request, wire.TEXT_INPUT, pb_utils)
    if text is not None:  # of the ensemble: what tokenised it may have answered another request
        compare(
            read_text(request, wire.PROMPT_TAG, pb_utils, default=""),
            prompt_tag("".join(text)),
            model=wire.PREPROCESSING,
            run_folder=run_folder,
        )
    policy = read_text(request, wire.KV_POLICY, pb_utils, default="auto")
    if policy not in wire.KV_POLICIES:
        raise RequestError(f"kv_policy must be one of {wire.KV_POLICIES}, got {policy!r}")
    salt = read_text(request, wire.CACHE_SALT, pb_utils, default="")
    if len(salt) > _MAX_SALT_CHARACTERS:
        raise RequestError(
            f"cache_salt has at most {_MAX_SALT_CHARACTERS} characters, got {len(salt)}"
        )
    given = {name: read_scalar(request, name, pb_utils) for name in _NUMBERS}
    params = SamplingParams(
        # An empty one is how TensorRT-LLM's examples say that there is none.
        stop_words=tuple(filter(None, read_texts(request, wire.STOP_WORDS, pb_utils) or ())),
        **{name: value for name, value in given.items() if value is not None},
    )
    if params.max_tokens > config.max_output_tokens:
        raise RequestError(
            f"max_tokens must be 1 to {config.max_output_tokens} (engine.max_output_tokens), got"
            f" {params.max_tokens}"
        )
    return ClientRequest(
        input_ids=read_ids(request, wire.INPUT_IDS, pb_utils),
        kv_policy=policy,
        options=GenerationOptions(
            params=params,
            stream=bool(read_scalar(request, wire.STREAM, pb_utils)),
            cache_salt=salt,
            save=policy not in ("no_store", "warm"),
            generate=policy != "warm",
            request_id=request.request_id(),
            heartbeat=True,
        ),
    )
