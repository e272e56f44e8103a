"""One fresh response per request, and every failure mapped to its Triton status."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any

from kvfetcher.errors import (
    ArenaError,
    ArenaFullError,
    CodecError,
    DecoderUnavailableError,
    GpuError,
    KVFetcherError,
    LeaseError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

_log = logging.getLogger(__name__)

_SETTLE_SECONDS = 0.2
_MAX_MESSAGE = 4000

_HOST_ERRORS = (ArenaFullError, LeaseError, ArenaError, GpuError, DecoderUnavailableError)
"""What fails on this host, whatever the unit is."""
_KIND = re.compile(r"\[(\w+)\]\s*$")
# Of an error that a unit's own bytes may have caused. What Triton says itself of a lost process, and
# errors of no class of ours, say nothing of the unit.
_UNIT_STATUS = re.compile(r"\b(INVALID_ARG|INTERNAL|UNSUPPORTED): (?!\w+; the server log)")


def triton_error(exc: BaseException, pb_utils: Any) -> Any:
    """The TritonError for an exception.

    A `KVFetcherError` gives its own status and message. Anything else is logged with its traceback
    and answered INTERNAL with the type name only: messages of strangers may hold paths or prompts.
    """
    if isinstance(exc, KVFetcherError):
        code = getattr(pb_utils.TritonError, exc.triton_status)
        # Triton's gRPC streams tell errors as bare text: the status travels in it, for clients, and
        # what failed on this host, for `kv_fetch` (`unit_error`).
        kind = f" [{type(exc).__name__}]" if isinstance(exc, _HOST_ERRORS) else ""
        return pb_utils.TritonError(f"{exc.triton_status}: {_sendable(str(exc))}{kind}", code)
    _log.error("unexpected %s", type(exc).__name__, exc_info=exc)
    return pb_utils.TritonError(
        f"INTERNAL: {type(exc).__name__}; the server log has the traceback",
        pb_utils.TritonError.INTERNAL,
    )


def _sendable(message: str) -> str:
    r"""A message that Triton can carry, whatever a request put into it.

    A lone surrogate (``"\\ud800"`` in a request's JSON) is no UTF-8: the stub would raise at it, and
    the request would never be answered.
    """
    text = message.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]} ..."


def unit_error(model: str, message: str) -> KVFetcherError:
    """The error of a unit that a model refused; the inverse of `triton_error`.

    Returns:
        An error of the class that the message names (the arena, the GPU or the decoder failed);
        else `CodecError` where the unit's own bytes may be what is wrong, and
        `DecoderUnavailableError` where nobody looked at them: no such model, or a lost process.
        Never a `FormatError`: the bytes came as they were stored, so that an object is not moved to
        the quarantine because of one host's decoder.
    """
    text = f"{model}: {message}"
    if named := _KIND.search(message):
        for kind in _HOST_ERRORS:
            if kind.__name__ == named[1]:
                return kind(text)
    return (CodecError if _UNIT_STATUS.search(message) else DecoderUnavailableError)(text)


def is_internal(exc: BaseException) -> bool:
    """Whether a failure is the server's own, so that it may happen again to the next request."""
    return not isinstance(exc, KVFetcherError) or exc.triton_status == "INTERNAL"


def respond_each(
    requests: Sequence[Any],
    handle: Callable[[Any], list[Any]],
    pb_utils: Any,
    *,
    asks_cancelled: bool = True,
) -> list[Any]:
    """Answer each request on its own: one bad request never fails its batch.

    Args:
        requests: what Triton gave to `execute`.
        handle: request -> output tensors; may raise.
        pb_utils: the module `triton_python_backend_utils`.
        asks_cancelled: False = do the work of cancelled requests, too: it is over sooner than
            Triton would answer.

    Returns:
        One InferenceResponse per request, in order.
    """
    responses = []
    for request in requests:
        if asks_cancelled and request.is_cancelled():
            responses.append(_cancelled(pb_utils))
            continue
        try:
            responses.append(pb_utils.InferenceResponse(output_tensors=handle(request)))
        except Exception as exc:  # noqa: BLE001 - the boundary: every failure is answered
            responses.append(pb_utils.InferenceResponse(error=triton_error(exc, pb_utils)))
    return responses


async def respond_each_async(
    requests: Sequence[Any], handle: Callable[[Any], Awaitable[list[Any]]], pb_utils: Any
) -> list[Any]:
    """`respond_each` for a coroutine, one request after the other."""
    responses = []
    for request in requests:
        try:
            responses.append(pb_utils.InferenceResponse(output_tensors=await handle(request)))
        except Exception as exc:  # noqa: BLE001 - the boundary: every failure is answered
            responses.append(pb_utils.InferenceResponse(error=triton_error(exc, pb_utils)))
    return responses


def send(sender: Any, response: Any, pb_utils: Any, *, is_last: bool) -> None:
    """Send one response through a sender; None with `is_last` ends a decoupled request without one."""
    flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
    if response is None:
        sender.send(flags=flags)
    else:
        sender.send(response, flags=flags)


def send_error(sender: Any, exc: BaseException, pb_utils: Any) -> None:
    """Answer with an error that ends the request, in one message.

    Nothing may follow it: tritonserver 2.51 crashes at a response after an error.
    """
    error = triton_error(exc, pb_utils)
    send(sender, pb_utils.InferenceResponse(error=error), pb_utils, is_last=True)


async def settle_ensemble() -> None:
    """Wait until the ensemble steps of earlier responses are over, before an error is sent.

    An ensemble that gets a step's error while another of its steps runs never ends (tritonserver
    2.51): the server then cannot stop cleanly. The step behind the LLM takes about a millisecond.
    """
    await asyncio.sleep(_SETTLE_SECONDS)


def log_failure(what: str, exc: BaseException) -> None:
    """Log a failure that no request waits for any more."""
    _log.error("%s failed: %s", what, type(exc).__name__, exc_info=exc)


def _cancelled(pb_utils: Any) -> Any:
    error = pb_utils.TritonError("the request was cancelled", pb_utils.TritonError.CANCELLED)
    return pb_utils.InferenceResponse(error=error)
