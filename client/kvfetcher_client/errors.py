"""What can go wrong between a client and its server.

KVFetcherError
└── ClientError
    ├── RequestError              the request breaks a rule (found here, or told by the server)
    │   ├── RequestCancelledError it was cancelled
    │   └── UnsupportedError      the server's model or build cannot do this
    ├── ServerUnavailableError    nobody answers there, or the server refuses more work now
    ├── ResponseTimeoutError      the answer did not come in time
    └── ResponseError             the server failed, or its answer is not one
"""

from __future__ import annotations

import re

import grpc

from kvfetcher import errors
from kvfetcher.errors import KVFetcherError


class ClientError(KVFetcherError):
    """A request could not be answered."""


class RequestError(ClientError, errors.RequestError):
    """The request breaks a rule; its sender can mend it."""


class RequestCancelledError(RequestError, errors.RequestCancelledError):
    """The request was cancelled."""


class UnsupportedError(RequestError, errors.UnsupportedRequestError):
    """The server's model or build cannot do what is asked."""


class ServerUnavailableError(ClientError):
    """Nobody answers at this address, or the server refuses more work now; try again later."""

    triton_status = "UNAVAILABLE"


class ResponseTimeoutError(ClientError):
    """The answer did not come in time."""

    triton_status = "UNAVAILABLE"


class ResponseError(ClientError):
    """The server failed, or its answer is not one."""


# Status names of the server's own errors. Triton's gRPC streams carry no status, so that the models
# put it into the text. (The header triton_grpc_error would bring it, but makes Triton 2.51 crash
# when a response follows an error.)
_BY_STATUS: dict[str, type[KVFetcherError]] = {
    "INVALID_ARG": RequestError,
    "NOT_FOUND": RequestError,
    "CANCELLED": RequestCancelledError,
    "UNAVAILABLE": ServerUnavailableError,
    "UNSUPPORTED": UnsupportedError,
    "INTERNAL": ResponseError,
}
_STATUS = re.compile(rf"\b({'|'.join(_BY_STATUS)}): ")


def from_message(url: str, message: str) -> KVFetcherError:
    """The exception for an error that a stream reported as text.

    Example:
        >>> from_message("127.0.0.1:8001", "INVALID_ARG: max_tokens must be >= 1")
        RequestError('127.0.0.1:8001: max_tokens must be >= 1')
    """
    if found := _STATUS.search(message):
        return _BY_STATUS[found.group(1)](f"{url}: {message[found.end() :]}")
    # Triton's own refusals name no status; of these, a caller can bring about one.
    kind = RequestError if "unknown model" in message else ResponseError
    return kind(f"{url}: {message}")


def from_call_error(url: str, error: grpc.RpcError, *, timeout_seconds: float) -> KVFetcherError:
    """The exception of a call with one answer, whose status may stand in its text, too."""
    details = error.details() or ""
    if _STATUS.search(details):
        return from_message(url, details)
    return from_rpc_error(url, error, timeout_seconds=timeout_seconds)


def from_rpc_error(url: str, error: grpc.RpcError, *, timeout_seconds: float) -> KVFetcherError:
    """The exception for a stream that broke."""
    status, details = error.code(), error.details() or ""
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ResponseTimeoutError(
            f"{url}: no whole answer within {timeout_seconds:g} s; ask for fewer tokens, or set a"
            " longer timeout_seconds"
        )
    if status is grpc.StatusCode.CANCELLED:
        return RequestCancelledError(f"{url}: the request was cancelled")
    if status is grpc.StatusCode.UNAVAILABLE:
        return ServerUnavailableError(
            f"{url}: nobody answers there ({details}); is `kvfetcher serve` running?"
        )
    return ResponseError(f"{url}: {details or status.name}")
