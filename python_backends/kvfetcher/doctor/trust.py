"""Attacks between two tenants, played against the code that the models run.

A server's arena holds the KV of tenant A. Tenant B, who reaches every model's port, tries to read it,
to overwrite it, to be answered from it, and to store KV under A's prompt. It may even know what it
could only guess: the arena's id, A's blocks and lease, and permits that were given out for its own
requests. Each attack has a twin: the same request with the permit that the server would have given,
which must succeed. Otherwise the check would prove nothing.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.doctor.check import Check
from kvfetcher.errors import KVFetcherError, PermissionDeniedError
from kvfetcher.spec import KVSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvfetcher.memory.arena import Arena, BlockTarget
    from kvfetcher.memory.permits import Permits

_SPEC = KVSpec(num_layers=2, num_kv_heads=1, head_dim=16)
_TOKENS = 32
_PATTERN = 0x3F80
"""Of every value that tenant A has in the arena."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One attempt, and the same request as the server itself would send it."""

    name: str
    attempt: Callable[[], object]
    twin: Callable[[], object]


@dataclass(frozen=True, slots=True)
class _Site:
    """A server run: its permits, its arena, and where each tenant's KV lies."""

    permits: Permits
    arena: Arena
    of_a: BlockTarget
    of_b: BlockTarget
    unit: bytes
    """Whose values B would write into A's blocks."""


def check_trust() -> Check:
    """Play every attack; the check fails where one is not refused, or a twin is."""
    from kvfetcher.memory.permits import Permits
    from kvfetcher.memory.split_arena import create_arena, publish_arena
    from kvfetcher.spec import HeadRange

    with tempfile.TemporaryDirectory(prefix="kvfetcher-trust-") as name:
        folder = Path(name)
        arena = create_arena(
            folder / "arena",
            spec=_SPEC,
            tokens_per_block=16,
            num_bytes=1 << 18,
            places={HeadRange(0, 1): None},
        )
        try:
            publish_arena(folder, arena)
            of_a = replace(arena.target((0, 1), _TOKENS), lease_id="a" * 32)
            of_b = replace(arena.target((2, 3), _TOKENS), lease_id="b" * 32)
            site = _Site(Permits.of_run(folder), arena, of_a, of_b, _unit())
            return _verdict(site)
        finally:
            arena.close()


def _verdict(site: _Site) -> Check:
    found: list[str] = []
    shape = (_SPEC.num_layers, _SPEC.kv_factor, _SPEC.num_kv_heads, _TOKENS, _SPEC.head_dim)
    secret = np.full(shape, _PATTERN, np.uint16)
    texts, count = set(), 0
    for attack in _attacks(site):
        count += 1
        site.arena.write(site.of_a, 0, secret)
        try:
            attack.attempt()
        except PermissionDeniedError as exc:
            texts.add(str(exc))
        except KVFetcherError as exc:
            found.append(f"{attack.name}: refused only after a look ({type(exc).__name__})")
        else:
            found.append(f"{attack.name}: succeeded")
        if not np.array_equal(site.arena.read(site.of_a), secret):
            found.append(f"{attack.name}: changed another tenant's KV")
        try:
            attack.twin()
        except KVFetcherError as exc:
            found.append(f"{attack.name}: the server's own request is refused: {exc}")
    if len(texts) > 1:
        found.append("refusals differ, which tells what exists")
    if found:
        return Check(
            "trust",
            "fail",
            "; ".join(found),
            "do not let clients reach this server; report it as SECURITY.md says",
        )
    return Check("trust", "ok", f"{count} attacks between two tenants refused, with one text")


def _attacks(site: _Site) -> Iterator[Attack]:
    yield from _arena_attacks(site)
    yield from _ticket_attacks(site)


def _arena_attacks(site: _Site) -> Iterator[Attack]:
    from kvfetcher.memory.permits import KEY_BYTES, Permits

    permits, of_a, of_b = site.permits, site.of_a, site.of_b
    text = of_a.to_json()
    good_read, good_write = permits.seal("read", text), permits.seal("write", text)
    own_permit = permits.seal("write", of_b.to_json()).partition(" ")[0]
    other_run = Permits(bytes(KEY_BYTES), folder=permits.folder)
    forged = {
        "of its own making": text,
        "of another run": other_run.seal("write", text),
        "that expired": permits.seal("write", text, expires_at=0.0),
        "with the permit of its own blocks": f"{own_permit} {text}",
        "that gives another right": good_read,
    }
    for how, target in forged.items():
        yield Attack(
            f"write with a target {how}",
            lambda target=target: _restore(site, target),  # type: ignore[misc]
            lambda: _restore(site, good_write),
        )
    forged["that gives another right"] = good_write
    forged["of another run"] = other_run.seal("read", text)
    forged["that expired"] = permits.seal("read", text, expires_at=0.0)
    for how, target in forged.items():
        yield Attack(
            f"read with a target {how}",
            lambda target=target: _encode(site, target),  # type: ignore[misc]
            lambda: _encode(site, good_read),
        )
    ticket = {"table": str(permits.folder / "permits.key"), "gpu": 0}
    yield Attack(
        "restore planes from a file that it names",
        lambda: _restore(site, good_write, planes_at=json.dumps(ticket)),
        lambda: _restore(site, good_write),
    )


def _ticket_attacks(site: _Site) -> Iterator[Attack]:
    from kvfetcher.backend.params import GenerationOptions, open_options, seal_options
    from kvfetcher.backend.saving import open_ticket, seal_ticket
    from kvfetcher.memory.leases import LeaseClaim, SaveTicket

    permits = site.permits
    ids = np.arange(_TOKENS, dtype=np.int32)
    of_a = SaveTicket(site.of_a.lease_id, (site.of_a,), 0, tuple(ids.tolist()), "a")
    of_b = replace(of_a, lease_id=site.of_b.lease_id, targets=(site.of_b,), cache_salt="b")
    own = seal_ticket(of_b, ids, permits)
    renamed = own.replace('"cache_salt":"b"', '"cache_salt":"a"')
    used = seal_ticket(of_a, ids, permits)
    open_ticket(used, ids, permits)
    for how, ticket in {
        "of its own making": own.partition(" ")[2],
        "with its own permit and another salt": renamed,
        "that was used": used,
    }.items():
        yield Attack(
            f"save with a ticket {how}",
            lambda ticket=ticket: open_ticket(ticket, ids, permits),  # type: ignore[misc]
            lambda: open_ticket(seal_ticket(of_a, ids, permits), ids, permits),
        )
    claim = LeaseClaim(site.of_a.lease_id, _TOKENS, site.arena.generation).to_json()
    options = GenerationOptions(cache_salt="b")
    own_options = seal_options(options, permits, input_ids=ids)
    for how, sealed in {
        "of its own making": options.to_json(),
        "with the permit of its own request": own_options,
    }.items():
        yield Attack(
            f"be answered from another's lease with options {how}",
            lambda sealed=sealed: open_options(  # type: ignore[misc]
                sealed, permits, input_ids=ids, lease=claim, is_open=True
            ),
            lambda: open_options(
                seal_options(options, permits, input_ids=ids, lease=claim),
                permits,
                input_ids=ids,
                lease=claim,
            ),
        )


def _restore(site: _Site, sealed: str, *, planes_at: str = "") -> None:
    from kvfetcher.backend.coding import UnitDecoder, UnitRestorer

    decoder, restorer = UnitDecoder("cpu"), UnitRestorer(site.permits)
    try:
        planes, status = decoder.decode(site.unit)
        restorer.restore(
            site.unit, planes, planes_at=planes_at, target_json=sealed, decode_status=status
        )
    finally:
        restorer.close()
        decoder.close()


def _encode(site: _Site, sealed: str) -> bytes:
    from kvfetcher.backend.coding import ChunkEncoder
    from kvfetcher.config import CodecConfig

    encoder = ChunkEncoder(CodecConfig(profile="raw"), site.permits)
    try:
        return encoder.encode(
            np.arange(_TOKENS, dtype=np.int32),
            spec_json=json.dumps({"spec": _SPEC.to_dict()}),
            target_json=sealed,
            values=b"",
        )[0]
    finally:
        encoder.close()


def _unit() -> bytes:
    """One unit of zeros."""
    from kvfetcher.codec.profiles import encode_chunk, make_profile
    from kvfetcher.config import CodecConfig
    from kvfetcher.format.container import parse_header

    shape = (_SPEC.num_layers, _SPEC.kv_factor, _SPEC.num_kv_heads, _TOKENS, _SPEC.head_dim)
    chunk = encode_chunk(
        np.zeros(shape, np.uint16),
        spec=_SPEC,
        profile=make_profile(CodecConfig(profile="raw")),
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=range(_TOKENS),
        first_position=0,
        num_threads=1,
    )
    entry = parse_header(chunk).units[0]
    return chunk[entry.offset : entry.stop]
