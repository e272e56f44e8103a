"""Which chunks of a store can be hit, and which hang on which: data in, data out, no I/O.

A look-up walks a prompt's chunks from the first on, so a chunk can be hit only while every chunk
before it is stored.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvfetcher.format.keys import parse_object_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from kvfetcher.storage.base import ObjectInfo

_Node = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Holding:
    """A chunk object as its name and header tell.

    Attributes:
        info: name, size, time.
        scope: first two segments of its name, ``model/tenant``.
        key: [32 bytes] its key.
        parent: [32 bytes] key of the chunk before it.
        first_position: position of its first token in the prompt; 0 = it has no chunk before it.
        token_ids: its tokens; empty where the survey was not asked for them.
    """

    info: ObjectInfo
    scope: str
    key: bytes
    parent: bytes
    first_position: int
    token_ids: tuple[int, ...] = ()

    @property
    def node(self) -> _Node:
        return (self.scope, self.key)

    @property
    def parent_node(self) -> _Node | None:
        return (self.scope, self.parent) if self.first_position else None


@dataclass(slots=True)
class Survey:
    """What lies in a store.

    Attributes:
        chunks: chunks whose header is sound.
        damaged: the others that are named as chunks, with what is wrong.
        others: objects that are not named as chunks.
    """

    chunks: list[Holding] = field(default_factory=list)
    damaged: list[tuple[ObjectInfo, str]] = field(default_factory=list)
    others: list[ObjectInfo] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GcPlan:
    """What garbage collection removes, and why."""

    expired: list[Holding]
    unreachable: list[Holding]


def plan_gc(
    survey: Survey,
    *,
    now_seconds: float,
    grace_seconds: float,
    ttl_seconds: float,
) -> GcPlan:
    """Chunks that are too old, and chunks that no look-up can reach any more.

    What follows a damaged chunk stays, for that one may be saved anew.

    Args:
        survey: objects of whole chains (a prefix of names may leave out scopes, not chunks of one).
        now_seconds: since the epoch.
        grace_seconds: an unreachable chunk younger than this stays: the one before it may have
            been saved while the store was surveyed.
        ttl_seconds: chunks older than this are expired; 0 = none are.
    """
    expired = [
        chunk
        for chunk in survey.chunks
        if ttl_seconds and now_seconds - chunk.info.modified_time_seconds > ttl_seconds
    ]
    gone = {chunk.node for chunk in expired}
    alive = [chunk for chunk in survey.chunks if chunk.node not in gone]
    damaged = [node for info, _ in survey.damaged if (node := node_of(info.name))]
    reached = _reach(alive, lambda chunk: chunk.first_position == 0, also_from=damaged)
    unreachable = [
        chunk
        for chunk in alive
        if chunk.node not in reached
        and now_seconds - chunk.info.modified_time_seconds >= grace_seconds
    ]
    return GcPlan(expired, unreachable)


def node_of(name: str) -> _Node | None:
    """(scope, key) that the name of a chunk tells; None for other names."""
    parts = parse_object_name(name)
    return (parts.scope, parts.key) if parts else None


def chunks_from(chunks: Sequence[Holding], name: str) -> list[Holding]:
    """The chunk of this name and all that continue it, also where it is not there any more."""
    node = node_of(name)
    reached = _reach(chunks, lambda _: False, also_from=[node]) if node else set()
    return [chunk for chunk in chunks if chunk.node in reached]


def chunks_of_prompts(chunks: Sequence[Holding], token_ids: Sequence[int]) -> list[Holding]:
    """The chunks whose prompt, up to the chunk's end, begins with `token_ids`.

    Args:
        chunks: with their token ids.
        token_ids: at least one.
    """
    wanted = tuple(token_ids)
    on_path: set[_Node] = set()
    selected: set[_Node] = set()
    for chunk in sorted(chunks, key=lambda chunk: chunk.first_position):
        start, stop = chunk.first_position, chunk.first_position + len(chunk.token_ids)
        before = chunk.parent_node
        if before in selected:
            selected.add(chunk.node)
        elif before is None or before in on_path:
            part = wanted[start:stop]
            if part == chunk.token_ids[: len(part)]:
                (selected if stop >= len(wanted) else on_path).add(chunk.node)
    return [chunk for chunk in chunks if chunk.node in selected]


def _reach(
    chunks: Iterable[Holding],
    is_start: Callable[[Holding], bool],
    *,
    also_from: Collection[_Node] = (),
) -> set[_Node]:
    """The starts and whatever continues them."""
    children: dict[_Node, list[_Node]] = defaultdict(list)
    waiting = list(also_from)
    for chunk in chunks:
        if is_start(chunk):
            waiting.append(chunk.node)
        if chunk.parent_node is not None:
            children[chunk.parent_node].append(chunk.node)
    reached = set(waiting)
    while waiting:
        new = [node for node in children[waiting.pop()] if node not in reached]
        reached.update(new)
        waiting.extend(new)
    return reached
