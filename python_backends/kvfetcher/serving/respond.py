"""One fresh response per request, and every failure mapped to its Triton status."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kvfetcher.errors import KVFetcherError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

_log = logging.getLogger(__name__)


def triton_error(exc: BaseException, pb_utils: Any) -> Any:
    """The TritonError for an exception.

    A `KVFetcherError` gives its own status and message. Anything else is logged with its traceback
    and answered INTERNAL with the type name only: messages of strangers may hold paths or prompts.
    """
    if isinstance(exc, KVFetcherError):
        code = getattr(pb_utils.TritonError, exc.triton_status)
        # Triton's gRPC streams tell errors as bare text: the status travels in it, for clients.
        return pb_utils.TritonError(f"{exc.triton_status}: {exc}", code)
    _log.error("unexpected %s", type(exc).__name__, exc_info=exc)
    return pb_utils.TritonError(
        f"INTERNAL: {type(exc).__name__}; the server log has the traceback",
        pb_utils.TritonError.INTERNAL,
    )


def respond_each(
    requests: Sequence[Any], handle: Callable[[Any], list[Any]], pb_utils: Any
) -> list[Any]:
    """Answer each request on its own: one bad request never fails its batch.

    Args:
        requests: what Triton gave to `execute`.
        handle: request -> output tensors; may raise.
        pb_utils: the module `triton_python_backend_utils`.

    Returns:
        One InferenceResponse per request, in order.
    """
    responses = []
    for request in requests:
        if request.is_cancelled():
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


def send_error(sender: Any, exc: BaseException, pb_utils: Any) -> None:
    """Close a decoupled request's stream with an error."""
    sender.send(
        pb_utils.InferenceResponse(error=triton_error(exc, pb_utils)),
        flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    )


def log_failure(what: str, exc: BaseException) -> None:
    """Log a failure that no request waits for any more."""
    _log.error("%s failed: %s", what, type(exc).__name__, exc_info=exc)


def _cancelled(pb_utils: Any) -> Any:
    error = pb_utils.TritonError("the request was cancelled", pb_utils.TritonError.CANCELLED)
    return pb_utils.InferenceResponse(error=error)
