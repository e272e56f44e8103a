"""What the arena's owner and the connector in the engine's processes tell each other.

One JSON object per line over a Unix socket, each with its ``kind``. The connector side (every rank)
connects and says `Hello`; then both sides speak whenever they have something to say:

    owner -> connector   Welcome, Refused           answer to Hello
                         Announce, Withdraw         rank 0: a request comes; nobody waits for it any more
                         Room                       every rank: where a finished request's KV goes
    connector -> owner   Ready                      every rank: the pool is registered
                         Announced, Withdrawn       rank 0, in the order of what they answer
                         Matched                    rank 0: the engine runs the request
                         Copied                     every rank: the lease's blocks are not read any more
                         Finished                   rank 0: the request ended and its blocks are pinned
                         Saved                      every rank: its part is in the arena, or not
                         Probed                     every rank: the pool's layout

Plain data, stdlib only.
"""

from __future__ import annotations

import json
import typing
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_type_hints

from kvfetcher.errors import RequestError

SOCKET_NAME = "connector.sock"
MAX_LINE_BYTES = 16 << 20
"""A line longer than this ends the connection; ids of a million tokens take 8 MB."""


@dataclass(frozen=True, slots=True)
class Hello:
    """First line of a rank's connection."""

    KIND: ClassVar[str] = "hello"
    rank: int
    num_ranks: int
    pid: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a rank needs to work; facts of the owner."""

    KIND: ClassVar[str] = "welcome"
    arena: str
    """Path of the arena, or of its part, that holds this rank's heads."""
    generation: str
    spec: dict[str, Any]
    """Geometry of the whole model (`KVSpec.to_dict`)."""
    tokens_per_block: int
    layout: str
    """"HND", "NHD", or "" = to be probed."""
    async_load_tokens: int
    """Loads of at least this number of tokens run beside the batch; 0 = never."""
    save_timeout_seconds: float
    """Seconds after which a rank frees a finished request's blocks if no `Room` came."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The owner does not take this rank; the connector fails the engine's start with the reason."""

    KIND: ClassVar[str] = "refused"
    reason: str


@dataclass(frozen=True, slots=True)
class Announce:
    """A request is about to be given to the engine."""

    KIND: ClassVar[str] = "announce"
    key: str
    """Names the request between owner and connector."""
    tokens_digest: str
    """`leases.tokens_digest` of the whole prompt: the engine's request is known by its tokens."""
    num_prompt_tokens: int
    cache_salt: str
    lease_tokens: int
    """Tokens of the prompt that lie ready in `lease_blocks`; 0 = none."""
    lease_blocks: tuple[int, ...]
    """Arena blocks, `tokens_per_block` tokens each."""
    save: bool
    """Whether to ask for room when it ends."""
    probe: bool = False
    """The prompt is one token repeated, and its first block tells the layout."""


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The owner waits for this request no more."""

    KIND: ClassVar[str] = "withdraw"
    key: str


@dataclass(frozen=True, slots=True)
class Room:
    """Answer to `Finished`: what each rank does with the pinned blocks before it lets them go."""

    KIND: ClassVar[str] = "room"
    key: str
    request_id: int
    pool_blocks: tuple[tuple[int, ...], ...]
    """To be copied, in order, by layer group (one but for managers that have several)."""
    arena_blocks: tuple[int, ...]
    """Where to; as many as each group has. () = nothing is saved."""
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """The rank's pool is registered and fits."""

    KIND: ClassVar[str] = "ready"
    num_pool_blocks: int
    facts: str
    """Versions, shape, dtype and device, for people to read."""


@dataclass(frozen=True, slots=True)
class Announced:
    """The engine's request will be recognised from now on."""

    KIND: ClassVar[str] = "announced"
    key: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """`used` = the engine did run it, so that `Copied` of every rank follows (or came already)."""

    KIND: ClassVar[str] = "withdrawn"
    key: str
    used: bool


@dataclass(frozen=True, slots=True)
class Matched:
    """The engine allocated the request."""

    KIND: ClassVar[str] = "matched"
    key: str
    num_computed_tokens: int
    """Number of tokens that the engine had in its own memory."""
    num_loaded_tokens: int
    """So many are taken from the lease; 0 = the lease is not needed (no `Copied` follows)."""
    reason: str
    """Why fewer than announced, "" otherwise."""


@dataclass(frozen=True, slots=True)
class Copied:
    """This rank reads the lease no more."""

    KIND: ClassVar[str] = "copied"
    key: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The request ended. If `is_pinned`, its blocks stay until every rank has dealt with `Room`."""

    KIND: ClassVar[str] = "finished"
    key: str
    request_id: int
    is_pinned: bool
    tokens_with_kv: int
    """From position 0; 0 = nothing to save, the blocks are held for a running load alone."""
    token_ids: tuple[int, ...]
    """Generated ones, as far as they have KV."""
    pool_blocks: tuple[tuple[int, ...], ...]
    """All of the request's, in order, by layer group."""


@dataclass(frozen=True, slots=True)
class Saved:
    """This rank's part of the request is in the arena (`ok`), or will not be."""

    KIND: ClassVar[str] = "saved"
    key: str
    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Probed:
    """The pool's layout as this rank found it; "" = the probe proved nothing."""

    KIND: ClassVar[str] = "probed"
    layout: str


Message = (
    Hello
    | Welcome
    | Refused
    | Announce
    | Withdraw
    | Room
    | Ready
    | Announced
    | Withdrawn
    | Matched
    | Copied
    | Finished
    | Saved
    | Probed
)
_KINDS: dict[str, type[Message]] = {kind.KIND: kind for kind in typing.get_args(Message)}
_HINTS = {kind: get_type_hints(kind) for kind in _KINDS.values()}


def to_line(message: Message) -> bytes:
    """One line, with its newline."""
    data = {"kind": message.KIND, **asdict(message)}
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes) -> Message:
    """Inverse of `to_line`.

    Raises:
        RequestError: not a message of a known kind with its fields.
    """
    try:
        data = json.loads(line)
        kind: Any = _KINDS[data.pop("kind")]
        hints = _HINTS[kind]
        values = {name: _frozen(value) for name, value in data.items()}
        for name, value in values.items():
            if not _is_a(value, hints[name]):
                raise TypeError(f"{name} is no {hints[name]}")
        message: Message = kind(**values)
        return message
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise RequestError(
            f"a connector line is not a known message ({exc}): {line[:80]!r}"
        ) from exc


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples, two levels deep."""
    if not isinstance(value, list):
        return value
    return tuple(tuple(item) if isinstance(item, list) else item for item in value)


def _is_a(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return type(value) is tuple and all(_is_a(part, item) for part in value)
    return type(value) in ((int, float) if origin is float else (origin,))
