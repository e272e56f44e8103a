"""Requests and responses of OpenAI's API as data; no I/O.

What this server cannot do is refused by name, never ignored: an answer without the penalty that was
asked for is a wrong answer.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kvfetcher import wire
from kvfetcher.errors import RequestError, UnsupportedRequestError
from kvfetcher.models.chat_template import check_messages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvfetcher_client.protocol import KVReport, Options

Kind = Literal["chat", "completion"]

MAX_STOPS = 16

# Name -> the value that asks for nothing, besides null.
_UNSUPPORTED: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "suffix": "",
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "function_call": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "audio": None,
    "prediction": None,
    "web_search_options": None,
}
# Said by clients, and of no effect on the answer's text.
_WITHOUT_EFFECT = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "reasoning_effort",
        "verbosity",
    ]
)
_OURS = {
    "temperature": wire.TEMPERATURE,
    "top_p": wire.TOP_P,
    "top_k": wire.TOP_K,
    "seed": wire.SEED,
    "min_tokens": wire.MIN_LENGTH,
    "cache_salt": wire.CACHE_SALT,
    "kv_policy": wire.KV_POLICY,
}
_TYPES: dict[str, tuple[type, ...]] = {
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "seed": (int,),
    "min_tokens": (int,),
    "cache_salt": (str,),
    "kv_policy": (str,),
}
_READ = frozenset(
    [
        "model",
        "messages",
        "prompt",
        "stream",
        "stream_options",
        "stop",
        "max_tokens",
        "max_completion_tokens",
        "echo",
    ]
)


@dataclass(frozen=True, slots=True)
class AskedFor:
    """One request, checked.

    Attributes:
        kind: which of the two APIs.
        model: the model that was named.
        messages: of a chat.
        prompt: of a completion.
        options: for `kvfetcher_client`.
        stream: the answer is wanted piece by piece.
        include_usage: a last piece says how many tokens there were.
        id: id of the answer.
        created: seconds since 1970.
    """

    kind: Kind
    model: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    prompt: str = ""
    options: Options = field(default_factory=dict)  # type: ignore[assignment]
    stream: bool = False
    include_usage: bool = False
    id: str = ""
    created: int = 0


def parse_request(kind: Kind, body: bytes, *, default_max_tokens: int) -> AskedFor:
    """Read a request's body.

    Args:
        kind: which API was called.
        body: JSON.
        default_max_tokens: of a chat that names no limit; a completion has OpenAI's 16.

    Raises:
        RequestError: it breaks a rule.
        UnsupportedRequestError: it asks for what this server cannot do.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"the body must be JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise RequestError("the body must be a JSON object")
    data = {name: value for name, value in data.items() if value is not None}
    _refuse_unsupported(data)
    model = data.get("model")
    if not isinstance(model, str):
        raise RequestError("model must be the name of a model; /v1/models lists it")
    return AskedFor(
        kind,
        model,
        messages=check_messages(data.get("messages")) if kind == "chat" else [],
        prompt=_prompt(data.get("prompt")) if kind == "completion" else "",
        options=_options(kind, data, default_max_tokens),
        stream=_flag(data, "stream"),
        include_usage=_include_usage(data),
        id=f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}",
        created=int(time.time()),
    )


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        if name in _UNSUPPORTED:
            if value != _UNSUPPORTED[name] and not (name == "tool_choice" and value == "auto"):
                raise UnsupportedRequestError(
                    f"{name} is not supported here, got {_short(value)}; leave it out"
                )
        elif not (name in _OURS or name in _READ or name in _WITHOUT_EFFECT):
            raise RequestError(f"unknown parameter {name!r}; docs/openai.md lists what there is")


def _options(kind: Kind, data: Mapping[str, Any], default_max_tokens: int) -> Options:
    options: dict[str, Any] = {}
    for name, ours in _OURS.items():
        if name not in data:
            continue
        value = data[name]
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            kinds = " or ".join(kind.__name__ for kind in _TYPES[name])
            raise RequestError(f"{name} must be {kinds}, got {_short(value)}")
        options[ours] = value
    limit = data.get("max_completion_tokens", data.get("max_tokens"))
    if limit is None:
        limit = default_max_tokens if kind == "chat" else 16
    if type(limit) is not int or limit < 1:
        raise RequestError(f"max_tokens must be an integer of at least 1, got {_short(limit)}")
    options[wire.MAX_TOKENS] = limit
    if stops := _stops(data.get("stop", [])):
        options[wire.STOP_WORDS] = stops
    if kind == "completion" and _flag(data, "echo"):
        options[wire.EXCLUDE_INPUT_IN_OUTPUT] = False
    return options  # type: ignore[return-value]


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(text, str) and text for text in stops)
    ):
        raise RequestError(f"stop must be a text or a list of up to {MAX_STOPS} texts")
    return stops


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str):
        raise RequestError("prompt must be one text; send several as several requests")
    return prompt


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {_short(value)}")
    return value


def _include_usage(data: Mapping[str, Any]) -> bool:
    options = data.get("stream_options", {})
    if not isinstance(options, dict):
        raise RequestError(f"stream_options must be an object, got {_short(options)}")
    return _flag(options, "include_usage")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# Responses


def usage(report: KVReport, num_output_tokens: int) -> dict[str, Any]:
    """Tokens of one answer; `cached_tokens` are those whose KV cache was fetched."""
    return {
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": report.prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": report.hit_tokens},
    }


def whole(asked: AskedFor, text: str, finish_reason: str, used: dict[str, Any]) -> dict[str, Any]:
    """The answer in one piece."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": _finish(finish_reason), "logprobs": None}
    if asked.kind == "chat":
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["text"] = text
    name = "chat.completion" if asked.kind == "chat" else "text_completion"
    return _head(asked, name) | {"choices": [choice], "usage": used}


def first_piece(asked: AskedFor) -> dict[str, Any] | None:
    """What a streamed chat begins with."""
    if asked.kind == "completion":
        return None
    return _piece(asked, {"delta": {"role": "assistant", "content": ""}})


def piece(asked: AskedFor, text: str, finish_reason: str) -> dict[str, Any]:
    """One piece of a streamed answer; `finish_reason` "" until the last."""
    if asked.kind == "completion":
        return _piece(asked, {"text": text}, finish_reason)
    return _piece(asked, {"delta": {"content": text} if text else {}}, finish_reason)


def usage_piece(asked: AskedFor, used: dict[str, Any]) -> dict[str, Any]:
    """The piece behind the last one that `stream_options.include_usage` asks for."""
    return _head(asked, _stream_object(asked)) | {"choices": [], "usage": used}


def models(name: str, created: int) -> dict[str, Any]:
    """The list of models: the one that is served."""
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    """One model of the list."""
    return {"id": name, "object": "model", "created": created, "owned_by": "kvfetcher"}


def error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _piece(asked: AskedFor, content: dict[str, Any], finish_reason: str = "") -> dict[str, Any]:
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": _finish(finish_reason)}
    return _head(asked, _stream_object(asked)) | {"choices": [choice]}


def _stream_object(asked: AskedFor) -> str:
    return "chat.completion.chunk" if asked.kind == "chat" else "text_completion"


def _head(asked: AskedFor, name: str) -> dict[str, Any]:
    return {"id": asked.id, "object": name, "created": asked.created, "model": asked.model}


def _finish(reason: str) -> str | None:
    return {"": None, "length": "length"}.get(reason, "stop")
