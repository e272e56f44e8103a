"""The error tree of KVFetcher, and the Triton status each leaf maps to.

    KVFetcherError
    ├── ConfigError               a setting is unknown, mistyped or out of range
    ├── RequestError              a request breaks a rule that its sender can mend
    │   ├── RequestCancelledError the sender went away
    │   └── UnsupportedRequestError  this model or build cannot do what is asked
    ├── PermissionDeniedError     a request uses what was not given to its sender
    ├── LayoutError               an array's shape or dtype differs from its spec
    ├── FormatError               bytes are not a chunk of this format
    │   ├── ChecksumError         a digest differs
    │   └── UnsupportedVersionError
    ├── CodecError                the video coder failed
    │   ├── DecoderUnavailableError
    │   └── EncoderUnavailableError
    ├── StoreError                the store failed
    │   ├── ChunkNotFoundError
    │   ├── StoreTimeoutError     no answer in time
    │   ├── TransientStoreError   a failure that may pass: connection reset, 5xx
    │   │   └── StoreThrottledError  it asks for fewer calls: 429, 503 SlowDown
    │   ├── StoreFullError        it takes nothing more
    │   └── StoreUnavailableError it failed too often lately and is not asked for a while
    ├── ArenaError                the KV arena refused
    │   ├── ArenaFullError        no free blocks
    │   └── LeaseError            a lease is unknown, expired, or in the wrong state
    ├── GpuError                  a GPU refused: memory, or sharing it
    ├── EngineError               the LLM engine failed
    │   └── EngineBusyError       its queue is full
    ├── MixedUpError              a reply belongs to another request
    └── ServerError               tritonserver could not be found, started or stopped

Every message is one sentence a stranger can act on: which object, the rule, expected and got, the
remedy. All classes survive pickling, because they cross processes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

TritonStatus = Literal[
    "INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "UNSUPPORTED", "INTERNAL", "CANCELLED"
]


class KVFetcherError(Exception):
    """Base of every error that KVFetcher raises on purpose."""

    triton_status: ClassVar[TritonStatus] = "INTERNAL"


class ConfigError(KVFetcherError):
    """A setting is unknown, mistyped or out of range."""

    triton_status: ClassVar[TritonStatus] = "INVALID_ARG"


class RequestError(KVFetcherError):
    """A request breaks a rule; its sender can mend it."""

    triton_status: ClassVar[TritonStatus] = "INVALID_ARG"


class RequestCancelledError(RequestError):
    """The sender of the request went away."""

    triton_status: ClassVar[TritonStatus] = "CANCELLED"


class UnsupportedRequestError(RequestError):
    """This model or build cannot do what is asked."""

    triton_status: ClassVar[TritonStatus] = "UNSUPPORTED"


class PermissionDeniedError(KVFetcherError):
    """A request uses memory, a lease or a model that was not given to its sender.

    One text for every reason, so that a refusal tells nothing of what exists. Triton has no status
    of that name; NOT_FOUND says as little.
    """

    triton_status: ClassVar[TritonStatus] = "NOT_FOUND"

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message
            or "permission denied: this request needs a permit that the server issued for it, and"
            " which still holds; send requests to the model kvfetcher"
        )


class LayoutError(KVFetcherError):
    """An array's shape or dtype differs from what its spec says."""

    triton_status: ClassVar[TritonStatus] = "INVALID_ARG"


class FormatError(KVFetcherError):
    """Bytes are not a chunk or unit of this format."""

    triton_status: ClassVar[TritonStatus] = "INVALID_ARG"


class ChecksumError(FormatError):
    """A digest differs from the one recorded."""


class UnsupportedVersionError(FormatError):
    """The bytes are of a version that this build does not read."""

    triton_status: ClassVar[TritonStatus] = "UNSUPPORTED"


class CodecError(KVFetcherError):
    """The video encoder or decoder failed."""


class DecoderUnavailableError(CodecError):
    """No decoder for this codec, chroma format, bit depth or size."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"


class EncoderUnavailableError(CodecError):
    """The encoder that was asked for is not on this machine, or not to be trusted."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"


class StoreError(KVFetcherError):
    """The store failed."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"


class ChunkNotFoundError(StoreError):
    """The store holds no object of this name."""

    triton_status: ClassVar[TritonStatus] = "NOT_FOUND"


class StoreTimeoutError(StoreError):
    """The store did not answer in time."""


class TransientStoreError(StoreError):
    """The store failed in a way that may pass by itself: a reset connection, 429, 5xx.

    Backends raise it where asking again is worth it; any other `StoreError` is final.
    """


class StoreThrottledError(TransientStoreError):
    """The store answers, and asks for fewer calls: 429, 503 SlowDown."""


class StoreFullError(StoreError):
    """The store answers, and takes nothing more; what it holds can be read."""


class StoreUnavailableError(StoreError):
    """The store failed too often lately; it is not asked for a while (`storage.breaker`)."""


class ArenaError(KVFetcherError):
    """The KV arena refused."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"


class ArenaFullError(ArenaError):
    """The arena has too few free blocks."""


class LeaseError(ArenaError):
    """A lease is unknown, expired, or in the wrong state for the call."""

    triton_status: ClassVar[TritonStatus] = "NOT_FOUND"


class GpuError(KVFetcherError):
    """A GPU refused: no memory left, or a process that shared some is gone."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"


class EngineError(KVFetcherError):
    """The LLM engine failed."""


class EngineBusyError(EngineError):
    """The engine's queue is full."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"


class MixedUpError(KVFetcherError):
    """What a model's process replied belongs to another request; it is to be sent again."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"


class ServerError(KVFetcherError):
    """tritonserver could not be found, started or stopped."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"
