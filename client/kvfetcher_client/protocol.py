"""Requests and responses of the `kvfetcher` model as protocol messages; no I/O.

Tensors have no batch dimension. Only what the caller gives is sent: every default is the server's.
"""

from __future__ import annotations

import json
import secrets
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from tritonclient.grpc import InferResult, service_pb2

from kvfetcher import wire
from kvfetcher_client.errors import RequestError, ResponseError, from_message

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class Options(TypedDict, total=False):
    """What a request may ask for; whatever is left out is the server's default."""

    max_tokens: int
    """Longest answer, in tokens."""
    temperature: float
    """0 = always the likeliest token."""
    top_k: int
    """Number of likeliest tokens to choose among; 0 = all."""
    top_p: float
    """Choose among the likeliest tokens of this total probability."""
    seed: int
    """Seed of the random choice, 0 to 2**64 - 1."""
    stop_words: Sequence[str]
    """The answer ends before the first of these."""
    min_length: int
    """Shortest answer, in tokens."""
    exclude_input_in_output: bool
    """False = the answer begins with the prompt."""
    kv_policy: str
    """auto, fetch, recompute, no_store or warm."""
    cache_salt: str
    """Prefixes are shared only among requests of the same salt."""


# name -> Triton datatype, struct format of one element ("" = text)
_TENSORS = {
    wire.MAX_TOKENS: ("INT32", "i"),
    wire.TEMPERATURE: ("FP32", "f"),
    wire.TOP_K: ("INT32", "i"),
    wire.TOP_P: ("FP32", "f"),
    wire.SEED: ("UINT64", "Q"),
    wire.STOP_WORDS: ("BYTES", ""),
    wire.MIN_LENGTH: ("INT32", "i"),
    wire.EXCLUDE_INPUT_IN_OUTPUT: ("BOOL", "?"),
    wire.KV_POLICY: ("BYTES", ""),
    wire.CACHE_SALT: ("BYTES", ""),
}


@dataclass(frozen=True, slots=True)
class KVReport:
    """What happened to the prompt's prefix.

    Attributes:
        prompt_tokens: tokens of the prompt.
        hit_tokens: of these, tokens whose KV cache was fetched instead of computed.
        bytes_fetched: bytes read from the store for them.
        reason: why not more was hit; "" where all whole chunks were.
        stages_ms: milliseconds by stage.
        raw: the whole report, with what this version of the client does not know.
    """

    prompt_tokens: int = 0
    hit_tokens: int = 0
    bytes_fetched: int = 0
    reason: str = ""
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> KVReport:
        """Parse the tensor `kv_report`.

        Raises:
            ResponseError: not a report.

        Example:
            >>> report = KVReport.from_json('{"prompt_tokens": 700, "hit_tokens": 512, "reason": ""}')
            >>> report.hit_tokens
            512
        """
        try:
            raw = json.loads(text)
            return cls(
                prompt_tokens=int(raw.get("prompt_tokens", 0)),
                hit_tokens=int(raw.get("hit_tokens", 0)),
                bytes_fetched=int(raw.get("bytes_fetched", 0)),
                reason=str(raw.get("reason", "")),
                stages_ms={str(k): float(v) for k, v in raw.get("stages_ms", {}).items()},
                raw=raw,
            )
        except (ValueError, TypeError, AttributeError) as exc:
            raise ResponseError(
                f"the server's kv_report is not one ({exc}): {text[:200]!r}"
            ) from exc


@dataclass(frozen=True, slots=True)
class Delta:
    """One piece of an answer.

    Attributes:
        text: what came since the last piece; may be "".
        output_ids: token ids that came since the last piece.
        finish_reason: "" until the last piece.
        report: on the first and the last piece.
    """

    text: str
    output_ids: tuple[int, ...]
    finish_reason: str
    report: KVReport | None


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer.

    Attributes:
        text: the answer.
        output_ids: its token ids.
        finish_reason: why it ended (``stop``, ``length``, ...).
        report: what happened to the prompt's prefix.
        time_to_first_token_seconds: from sending the request to the first token or text.
    """

    text: str
    output_ids: tuple[int, ...]
    finish_reason: str
    report: KVReport
    time_to_first_token_seconds: float


def build_request(
    prompt: str, options: Options, *, model: str = wire.KVFETCHER
) -> service_pb2.ModelInferRequest:
    """The message that asks for one streamed answer.

    Raises:
        RequestError: an option is unknown, or its value does not fit its tensor.

    Example:
        >>> request = build_request("Why is the sky blue?", {"max_tokens": 64})
        >>> [tensor.name for tensor in request.inputs]
        ['text_input', 'stream', 'max_tokens']
    """
    # The report has it, so that an answer to another request is noticed.
    request = service_pb2.ModelInferRequest(model_name=model, id=secrets.token_hex(8))
    _add_tensor(request, wire.TEXT_INPUT, "BYTES", [_text(wire.TEXT_INPUT, prompt)])
    _add_tensor(request, wire.STREAM, "BOOL", [b"\1"])
    for name, value in options.items():
        if name not in _TENSORS:
            raise RequestError(f"unknown option {name!r}; there are {sorted(_TENSORS)}")
        datatype, code = _TENSORS[name]
        if code:
            _add_tensor(request, name, datatype, [_number(name, code, value)])
        elif name == wire.STOP_WORDS:
            if isinstance(value, str):
                raise RequestError(f"{name} must be a sequence of texts, got {value!r}")
            _add_tensor(request, name, datatype, [_text(name, word) for word in _iterable(value)])
        else:
            _add_tensor(request, name, datatype, [_text(name, value)])
    return request


def build_prompt_request(messages: Sequence[Mapping[str, Any]]) -> service_pb2.ModelInferRequest:
    """The message that has a chat made into a prompt (model `preprocessing`).

    Raises:
        RequestError: the messages are no JSON.
    """
    try:
        text = json.dumps(list(messages), ensure_ascii=False)
    except (TypeError, ValueError) as exc:
        raise RequestError(f"messages must be a sequence of JSON objects: {exc}") from exc
    request = service_pb2.ModelInferRequest(model_name=wire.PREPROCESSING)
    _add_tensor(request, wire.MESSAGES, "BYTES", [_text(wire.MESSAGES, text)])
    request.outputs.add(name=wire.PROMPT)
    return request


def parse_prompt(response: service_pb2.ModelInferResponse) -> str:
    """The prompt in an answer of `preprocessing`.

    Raises:
        ResponseError: it has none.
    """
    return _output_text(InferResult(response), wire.PROMPT)


def build_warm_request(
    token_ids: Sequence[int], *, cache_salt: str = ""
) -> service_pb2.ModelInferRequest:
    """The message that warms the prefix of a prompt given as token ids (model `kv_fetch`).

    Raises:
        RequestError: there are no ids, or one is no 32-bit integer.
    """
    if not token_ids:
        raise RequestError("there are no token ids to warm; give at least one")
    request = service_pb2.ModelInferRequest(model_name=wire.KV_FETCH)
    ids = [_number(wire.INPUT_IDS, "i", token) for token in token_ids]
    _add_tensor(request, wire.INPUT_IDS, "INT32", ids)
    _add_tensor(request, wire.KV_POLICY, "BYTES", [_text(wire.KV_POLICY, "warm")])
    _add_tensor(request, wire.CACHE_SALT, "BYTES", [_text(wire.CACHE_SALT, cache_salt)])
    return request


def parse_report(url: str, response: service_pb2.ModelStreamInferResponse) -> KVReport | None:
    """The report in an answer of `kv_fetch`; None for an empty final response.

    Raises:
        KVFetcherError: the error that the server reports; see `errors.from_message`.
        ResponseError: a tensor is missing or malformed.
    """
    result = _result(url, response)
    return None if result is None else KVReport.from_json(_output_text(result, wire.KV_REPORT))


def checked_report(url: str, report: KVReport | None) -> KVReport:
    """The report of a stream that ended.

    Raises:
        ResponseError: it ended without one.
    """
    if report is None:
        raise ResponseError(f"{url}: the server gave no report; its log tells more")
    return report


def parse_response(
    url: str, response: service_pb2.ModelStreamInferResponse, *, request_id: str = ""
) -> Delta | None:
    """One piece of the answer; None for an empty final response.

    Args:
        url: address of the server, for errors.
        response: as it came.
        request_id: id of the request; "" = not compared.

    Raises:
        KVFetcherError: the error that the server reports; see `errors.from_message`.
        ResponseError: a tensor is missing or malformed, or the answer is another request's.
    """
    result = _result(url, response)
    if result is None:
        return None
    report = _output_text(result, wire.KV_REPORT)
    parsed = KVReport.from_json(report) if report else None
    if parsed is not None and request_id:
        answered = parsed.raw.get("request_id", request_id)
        if answered != request_id:
            raise ResponseError(
                f"{url}: the answer belongs to request {answered!r}, not to {request_id!r}; nothing"
                " of it is to be used: ask again"
            )
    return Delta(
        text=_output_text(result, wire.TEXT_OUTPUT),
        output_ids=tuple(int(i) for i in _output(result, wire.OUTPUT_IDS)),
        finish_reason=_output_text(result, wire.FINISH_REASON),
        report=parsed,
    )


def is_last(response: service_pb2.ModelStreamInferResponse) -> bool:
    """Whether the server is about to end the stream: an error, or a piece that says why it ends."""
    outputs = response.infer_response.outputs
    if response.error_message or not outputs:
        return True
    result = InferResult(response.infer_response)
    reason = result.as_numpy(wire.FINISH_REASON)
    return reason is not None and any(reason.ravel())


class Assembler:
    """Joins the pieces of one answer. Times are passed in.

    Example:
        >>> answer = Assembler()
        >>> answer.add(Delta("Hello", (5,), "", None), seconds=0.2)
        >>> answer.add(Delta(" you", (7,), "stop", None), seconds=0.3)
        >>> whole = answer.finish(seconds=0.3)
        >>> whole.text, whole.output_ids, whole.time_to_first_token_seconds
        ('Hello you', (5, 7), 0.2)
    """

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._finish_reason = ""
        self._report: KVReport | None = None
        self._first_seconds: float | None = None

    def add(self, delta: Delta, seconds: float) -> None:
        """Take the next piece, received `seconds` after the request was sent."""
        self._texts.append(delta.text)
        self._ids.extend(delta.output_ids)
        self._finish_reason = delta.finish_reason or self._finish_reason
        self._report = delta.report or self._report
        if self._first_seconds is None and (delta.text or delta.output_ids):
            self._first_seconds = seconds

    def finish(self, seconds: float) -> Generation:
        """The whole answer; `seconds` as in `add`, counted where no token came at all."""
        return Generation(
            text="".join(self._texts),
            output_ids=tuple(self._ids),
            finish_reason=self._finish_reason,
            report=self._report or KVReport(),
            time_to_first_token_seconds=(
                seconds if self._first_seconds is None else self._first_seconds
            ),
        )


def check_finished(last: Delta | None) -> None:
    """Make sure that a stream that ended also finished.

    Raises:
        ResponseError: its last piece does not say why it ends.
    """
    if last is None or not last.finish_reason:
        raise ResponseError(
            "the server ended the answer without a finish_reason; its log tells more"
        )


def _add_tensor(
    request: service_pb2.ModelInferRequest, name: str, datatype: str, values: list[bytes]
) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=[len(values)])
    request.raw_input_contents.append(b"".join(values))


def _number(name: str, code: str, value: Any) -> bytes:
    try:
        return struct.pack(f"<{code}", value)
    except (struct.error, OverflowError) as exc:
        raise RequestError(f"{name} does not fit its tensor: {exc}; got {value!r}") from exc


def _text(name: str, value: Any) -> bytes:
    if not isinstance(value, str):
        raise RequestError(f"{name} must be text, got {value!r}")
    try:
        data = value.encode()
    except UnicodeEncodeError as exc:
        raise RequestError(f"{name} is not valid Unicode text: {exc.reason}") from exc
    return struct.pack("<I", len(data)) + data


def _iterable(value: Any) -> Iterable[Any]:
    try:
        return list(value)
    except TypeError as exc:
        raise RequestError(f"stop_words must be a sequence of texts, got {value!r}") from exc


def _result(url: str, response: service_pb2.ModelStreamInferResponse) -> InferResult | None:
    """The outputs of one response; None for an empty final one, the server's error is raised."""
    if response.error_message:
        raise from_message(url, response.error_message)
    if not response.infer_response.outputs:
        return None
    return InferResult(response.infer_response)


def _output(result: InferResult, name: str) -> np.ndarray[Any, Any]:
    array = result.as_numpy(name)
    if array is None:
        raise ResponseError(f"the server's answer has no tensor {name!r}; is it a KVFetcher?")
    return np.ravel(array)


def _output_text(result: InferResult, name: str) -> str:
    values = _output(result, name)
    if len(values) != 1:
        raise ResponseError(f"tensor {name!r} must hold one text, got {len(values)}")
    return bytes(values[0]).decode(errors="replace")
