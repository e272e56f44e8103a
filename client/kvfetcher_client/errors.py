"""What can go wrong between a client and its server, beside `kvfetcher.errors.RequestError`.

KVFetcherError
├── RequestError                  the request breaks a rule (found here, or told by the server)
│   └── RequestCancelledError     it was cancelled
└── ClientError
    ├── ServerUnavailableError    nobody answers there, or the server refuses more work now
    ├── ResponseTimeoutError      the answer did not come in time
    └── ResponseError             the server failed, or its answer is not one
"""

from __future__ import annotations

import grpc

from kvfetcher.errors import KVFetcherError, RequestCancelledError, RequestError


class ClientError(KVFetcherError):
    """A request could not be answered."""


class ServerUnavailableError(ClientError):
    """Nobody answers at this address, or the server refuses more work now; try again later."""

    triton_status = "UNAVAILABLE"


class ResponseTimeoutError(ClientError):
    """The answer did not come in time."""

    triton_status = "UNAVAILABLE"


class ResponseError(ClientError):
    """The server failed, or its answer is not one."""


_BY_STATUS: dict[grpc.StatusCode, type[KVFetcherError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.NOT_FOUND: RequestError,  # no such model, or not loaded
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ServerUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: ResponseTimeoutError,
}


def from_rpc_error(url: str, error: grpc.RpcError, *, timeout_seconds: float) -> KVFetcherError:
    """The exception that says what `error` means to the caller."""
    status, details = error.code(), error.details() or ""
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = (
            f"no whole answer within {timeout_seconds:g} s; ask for fewer tokens, or set a longer"
            " timeout_seconds"
        )
    elif status is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        details = f"nobody answers there ({details}); is `kvfetcher serve` running?"
    return _BY_STATUS.get(status, ResponseError)(f"{url}: {details or status.name}")
