"""Python client of a KVFetcher server, over gRPC.

    from kvfetcher_client import Client

    with Client("127.0.0.1:8001") as client:
        answer = client.generate("Why is the sky blue?", max_tokens=64)
        print(answer.text, answer.report.hit_tokens)

Needs tritonclient[grpc] and nothing heavier: no torch, no codec.
"""

from kvfetcher_client.client import AsyncClient, Client
from kvfetcher_client.errors import (
    ClientError,
    RequestCancelledError,
    RequestError,
    ResponseError,
    ResponseTimeoutError,
    ServerUnavailableError,
    UnsupportedError,
)
from kvfetcher_client.protocol import Delta, Generation, KVReport, Options

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "Delta",
    "Generation",
    "KVReport",
    "Options",
    "RequestCancelledError",
    "RequestError",
    "ResponseError",
    "ResponseTimeoutError",
    "ServerUnavailableError",
    "UnsupportedError",
]
