"""The error tree of KVFetcher, and the Triton status each leaf maps to.

    KVFetcherError
    ├── ConfigError               a setting is unknown, mistyped or out of range
    ├── RequestError              a request breaks a rule that its sender can mend
    │   └── RequestCancelledError the sender went away
    ├── LayoutError               an array's shape or dtype differs from its spec
    ├── FormatError               bytes are not a chunk of this format
    │   ├── ChecksumError         a digest differs
    │   └── UnsupportedVersionError
    ├── CodecError                the video coder failed
    │   └── DecoderUnavailableError
    ├── StoreError                the store failed
    │   ├── ChunkNotFoundError
    │   └── StoreTimeoutError
    ├── ArenaError                the KV arena refused
    │   ├── ArenaFullError        no free blocks
    │   └── LeaseError            a lease is unknown, expired, or in the wrong state
    ├── EngineError               the LLM engine failed
    │   └── EngineBusyError       its queue is full
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


class StoreError(KVFetcherError):
    """The store failed."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"


class ChunkNotFoundError(StoreError):
    """The store holds no object of this name."""

    triton_status: ClassVar[TritonStatus] = "NOT_FOUND"


class StoreTimeoutError(StoreError):
    """The store did not answer in time."""


class ArenaError(KVFetcherError):
    """The KV arena refused."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"


class ArenaFullError(ArenaError):
    """The arena has too few free blocks."""


class LeaseError(ArenaError):
    """A lease is unknown, expired, or in the wrong state for the call."""

    triton_status: ClassVar[TritonStatus] = "NOT_FOUND"


class EngineError(KVFetcherError):
    """The LLM engine failed."""


class EngineBusyError(EngineError):
    """The engine's queue is full."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"


class ServerError(KVFetcherError):
    """tritonserver could not be found, started or stopped."""

    triton_status: ClassVar[TritonStatus] = "UNAVAILABLE"
