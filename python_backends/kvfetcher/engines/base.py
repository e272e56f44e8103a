"""What an engine is: requests in, a stream of events out, and what must be known about the model.

Plain data and one Protocol; no torch, no Triton. `torch_engine` is the embedded one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kvfetcher.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from kvfetcher.memory.leases import LeaseClaim, SaveTicket
    from kvfetcher.spec import ModelIdentity, RopeFacts

FinishReason = Literal["", "stop", "length", "cancelled", "warmed"]
"""`warmed` = nothing was to be generated (kv_policy `warm`); no engine gives it."""

MAX_STOP_WORDS = 64
MAX_STOP_WORD_CHARACTERS = 1024
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and where generation ends. Greedy unless `temperature` says otherwise.

    Raises:
        RequestError: a value is out of its range.
    """

    max_tokens: int = 16
    """Generated tokens at most, >= 1."""
    temperature: float = 0.0
    """0 = always the likeliest token; else logits are divided by it."""
    top_k: int = 0
    """Number of likeliest tokens to sample among; 0 = all, 1 = greedy."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach this sum, in (0, 1]."""
    seed: int | None = None
    """The same seed and request give the same tokens; None = a fresh one."""
    stop_words: tuple[str, ...] = ()
    """Generation ends where one of these would appear in the text; it is not in the output."""
    min_length: int = 0
    """Generated tokens before an end-of-sequence token may come."""
    exclude_input_in_output: bool = True
    """False = the first event begins with the prompt's ids and text."""

    def __post_init__(self) -> None:
        _range("max_tokens", self.max_tokens, 1, None)
        _range("min_length", self.min_length, 0, self.max_tokens)
        _range("top_k", self.top_k, 0, None)
        if self.seed is not None:
            _range("seed", self.seed, 0, MAX_SEED)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature must be finite and >= 0, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if len(self.stop_words) > MAX_STOP_WORDS:
            raise RequestError(
                f"at most {MAX_STOP_WORDS} stop_words are possible, got {len(self.stop_words)}"
            )
        for word in self.stop_words:
            if not 0 < len(word) <= MAX_STOP_WORD_CHARACTERS:
                raise RequestError(
                    f"a stop word has 1 to {MAX_STOP_WORD_CHARACTERS} characters, got one of"
                    f" {len(word)}"
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request. ``lease`` names ready KV of the first tokens; ``save`` asks for a `SaveTicket`."""

    input_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    lease: LeaseClaim | None = None
    save: bool = False
    cache_salt: str = ""
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class GenerateTimings:
    """Where the time went. Times in milliseconds, rate in tokens per second."""

    queue_ms: float
    """Time from submission until the request began to run."""
    load_ms: float
    """Copying leased KV into the cache."""
    prefill_ms: float
    """From the end of loading until the first token, other requests' turns included."""
    computed_tokens: int
    """Prompt tokens computed here."""
    cached_tokens: int
    """Prompt tokens whose KV came from the lease."""
    prefill_rate: float
    """Computed tokens over the time spent computing them (other requests' turns excluded)."""
    generated_tokens: int = 0
    total_ms: float = 0.0
    """Time from submission until this event."""
    lease_error: str = ""
    """Why a lease was not used and everything was computed instead; "" = it was, or none came."""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What the engine measured by itself, by group: TensorRT-LLM's `kv_cache_metrics` and
    `timing_metrics` (seconds of its clock). Empty for other engines."""


@dataclass(frozen=True, slots=True)
class GenerateEvent:
    """One step of a stream.

    Order: events with tokens; the one with a ``finish_reason`` ends the text; when something is
    to be saved, one more follows that carries only ``save``, so that copying KV for the saver does
    not hold the answer back. Read until the iterator ends. ``timings`` come with the first event
    and with the one that has the ``finish_reason``.
    """

    new_token_ids: tuple[int, ...] = ()
    text_delta: str = ""
    """May be empty while a character or a possible stop word is incomplete."""
    finish_reason: FinishReason = ""
    timings: GenerateTimings | None = None
    save: SaveTicket | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What other processes need to know (`describe` of the control socket)."""

    engine: str
    """"torch", "paged" or "tensorrt_llm"."""
    model: str
    """Folder with the tokenizer (and, for `torch`, the weights)."""
    device: str
    identity: ModelIdentity
    tokens_per_block: int
    chunk_tokens: int
    arena: tuple[str, ...]
    """Paths of its files, one for each part."""
    generation: str
    eos_ids: tuple[int, ...]
    vocab_size: int
    max_prompt_tokens: int
    max_output_tokens: int
    prefill_tokens_per_second: float
    """Prefill speed at position 0, learnt while running; `stats` has the cost by position."""
    rope: RopeFacts

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `identity` as `ModelIdentity.to_dict`."""
        return asdict(self)


class Engine(Protocol):
    """An LLM engine. `generate` from any number of tasks at once; all methods are thread-safe."""

    def describe(self) -> EngineInfo: ...

    def stats(self) -> dict[str, Any]:
        """JSON-serialisable counters and gauges."""
        ...

    def generate(
        self, request: GenerateRequest, *, is_cancelled: Callable[[], bool] | None = None
    ) -> AsyncGenerator[GenerateEvent]:
        """Run one request; nothing happens before the first item is asked for.

        Args:
            request: see `GenerateRequest`.
            is_cancelled: polled from the engine's thread between steps; once it is true the
                request ends with finish_reason "cancelled" (and may still save). Leaving the
                iterator cancels too, without saving.

        Raises:
            RequestError: the request breaks a rule.
            EngineBusyError: too many requests wait.
            EngineError: the engine failed, or is closed.
        """
        ...

    def close(self) -> None:
        """End running requests with EngineError and free everything. Safe to call twice."""
        ...


def _range(name: str, value: int, low: int, high: int | None) -> None:
    if type(value) is not int or value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"{low} to {high}"
        raise RequestError(f"{name} must be {bound}, got {value!r}")
