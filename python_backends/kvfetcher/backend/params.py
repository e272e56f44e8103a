"""What a client asked for: its sampling inputs, checked once, and their JSON form between models."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvfetcher import wire
from kvfetcher.backend.tags import compare, prompt_tag
from kvfetcher.backend.tenants import salt_of
from kvfetcher.backend.tensors import read_ids, read_scalar, read_text, read_texts
from kvfetcher.engines.base import SamplingParams
from kvfetcher.errors import PermissionDeniedError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from kvfetcher.config import Config
    from kvfetcher.memory.permits import Permits
    from kvfetcher.storage.keyring import KeyRing

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
        except (ValueError, TypeError, AttributeError, RecursionError) as exc:
            raise RequestError(f"input {wire.SAMPLING!r} is not sampling JSON: {exc}") from exc


def seal_options(
    options: GenerationOptions,
    permits: Permits,
    *,
    input_ids: NDArray[np.int32] | None = None,
    lease: str = "",
) -> str:
    """What `tensorrt_llm` takes: the options with a permit for these token ids and this lease."""
    ids = b"" if input_ids is None else input_ids.tobytes()
    return permits.seal("generate", options.to_json(), ids, lease.encode())


def open_options(
    sealed: str,
    permits: Permits,
    *,
    input_ids: NDArray[np.int32],
    lease: str,
    is_open: bool = False,
) -> GenerationOptions:
    """Inverse of `seal_options`, once each.

    Args:
        sealed: input `sampling`.
        permits: permits of the server run.
        input_ids: as they came with it.
        lease: as it came with it.
        is_open: `trust.internal_models` is "open": options without a permit are taken, too, but never
            a lease, a sign of life or a save, which speak for somebody else.

    Raises:
        PermissionDeniedError: `kv_fetch` of this server run did not give them out, or they were used.
        RequestError: they are not options.
    """
    if is_open and not lease and sealed[:1] in ("", "{"):
        options = GenerationOptions.from_json(sealed)
        if options.fetch_id or options.save:
            raise PermissionDeniedError
        return options
    try:
        lease_bytes = lease.encode()
    except UnicodeEncodeError:
        raise PermissionDeniedError from None
    text = permits.open("generate", sealed, input_ids.tobytes(), lease_bytes, once=True)
    return GenerationOptions.from_json(text)


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """One request as `kv_fetch` sees it."""

    input_ids: NDArray[np.int32]
    kv_policy: str
    options: GenerationOptions
    is_internal: bool
    """Whether it came through `preprocessing` of this server run."""


def read_client_request(
    request: Any,
    config: Config,
    pb_utils: Any,
    permits: Permits,
    *,
    run_folder: Path | None = None,
    ring: KeyRing | None = None,
) -> ClientRequest:
    """Read and check every input of the client.

    Args:
        request: of `kv_fetch`.
        config: limits, and who may ask.
        pb_utils: the module `triton_python_backend_utils`.
        permits: of the server run.
        run_folder: of the server; see `tags.compare`.
        ring: of the store, whose names then tell nothing of the salt.

    Raises:
        PermissionDeniedError: it did not come through `preprocessing`, which only a request that warms
            need not, unless `trust.internal_models` is "open"; or its salt is not signed.
        MixedUpError: the token ids are another text's.
        RequestError: an input breaks its rule; the message names the input, the rule, the value.
    """
    input_ids = read_ids(request, wire.INPUT_IDS, pb_utils)
    permit = read_text(request, wire.PERMIT, pb_utils, default="")
    policy = read_text(request, wire.KV_POLICY, pb_utils, default="auto")
    if permit:
        permits.open("fetch", permit, input_ids.tobytes(), once=True)
    elif policy != "warm" and config.trust.internal_models == "closed":
        raise PermissionDeniedError
    text = read_texts(request, wire.TEXT_INPUT, pb_utils)
    if text is not None:  # of the ensemble: what tokenised it may have answered another request
        compare(
            read_text(request, wire.PROMPT_TAG, pb_utils, default=""),
            prompt_tag("".join(text)),
            model=wire.PREPROCESSING,
            # What a stranger sends must not have preprocessing replaced.
            run_folder=run_folder if permit else None,
        )
        if (sent := read_texts(request, wire.SENT_TEXT_INPUT, pb_utils)) is not None:
            compare(
                prompt_tag("".join(text)),
                prompt_tag("".join(sent)),
                model=wire.OPENAI_INPUT,
                run_folder=run_folder if permit else None,
            )
    together = _read_together(request, pb_utils)
    if policy not in wire.KV_POLICIES:
        raise RequestError(f"kv_policy must be one of {wire.KV_POLICIES}, got {policy!r}")
    salt = read_text(request, wire.CACHE_SALT, pb_utils, default="")
    if len(salt) > _MAX_SALT_CHARACTERS:
        raise RequestError(
            f"cache_salt has at most {_MAX_SALT_CHARACTERS} characters, got {len(salt)}"
        )
    given = {name: together.get(name, read_scalar(request, name, pb_utils)) for name in _NUMBERS}
    stop_words = together.get(wire.STOP_WORDS) or read_texts(request, wire.STOP_WORDS, pb_utils)
    params = SamplingParams(
        # An empty one is how TensorRT-LLM's examples say that there is none.
        stop_words=tuple(filter(None, stop_words or ())),
        **{name: value for name, value in given.items() if value is not None},
    )
    if params.max_tokens > config.engine.max_output_tokens:
        raise RequestError(
            f"max_tokens must be 1 to {config.engine.max_output_tokens} (engine.max_output_tokens), got"
            f" {params.max_tokens}"
        )
    return ClientRequest(
        input_ids=input_ids,
        kv_policy=policy,
        is_internal=bool(permit),
        options=GenerationOptions(
            params=params,
            stream=bool(together.get(wire.STREAM, read_scalar(request, wire.STREAM, pb_utils))),
            cache_salt=salt_of(salt, config.trust, ring),
            save=policy not in ("no_store", "warm"),
            generate=policy != "warm",
            request_id=request.request_id(),
            heartbeat=True,
        ),
    )


def _read_together(request: Any, pb_utils: Any) -> dict[str, Any]:
    """Options that come in one tensor, from `openai_input`; each wins over its own tensor."""
    text = read_text(request, wire.CLIENT_OPTIONS, pb_utils, default="")
    try:
        options = json.loads(text) if text else {}
    except ValueError as exc:
        raise RequestError(f"input {wire.CLIENT_OPTIONS!r} is not JSON: {exc}") from exc
    if not isinstance(options, dict):
        raise RequestError(f"input {wire.CLIENT_OPTIONS!r} must hold a JSON object")
    return options
