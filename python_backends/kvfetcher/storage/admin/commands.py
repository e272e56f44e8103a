"""`kvfetcher store ...`: look into the store, check it, purge it, put it in order.

Data goes to stdout, talk and progress to stderr. Exit status: 0 done; 1 an error, or objects that
could not be handled; 2 the command line is wrong; 3 `verify` found damaged chunks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfetcher.config import CONFIG_VARIABLE, load_config
from kvfetcher.errors import ChunkNotFoundError, ConfigError, RequestError
from kvfetcher.format.keys import object_name, parse_object_name, tenant_digits
from kvfetcher.progress import StatusLine
from kvfetcher.storage import TieredStore, open_store, open_tiers
from kvfetcher.storage.admin.reachability import chunks_from, chunks_of_prompts, plan_gc
from kvfetcher.storage.admin.upkeep import remove, survey, verify, warm
from kvfetcher.storage.keyring import load_keyring

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from kvfetcher.config import StoreConfig
    from kvfetcher.storage.admin.reachability import Holding
    from kvfetcher.storage.base import ObjectInfo, SetAside, Store

STATUS_FAILED = 1
STATUS_DAMAGED = 3

_SHOW_EVERY = 100


@dataclass(frozen=True, slots=True)
class _Job:
    """What a command works with.

    Attributes:
        arguments: its command line.
        config: section `store`.
        remote: the store itself, so that nothing is judged by a copy.
        store: the same behind the copies near by, so that what goes goes there too.
        line: progress.
    """

    arguments: argparse.Namespace
    config: StoreConfig
    remote: Store
    store: Store
    line: StatusLine

    def say(self, text: str) -> None:
        self.line.end()
        sys.stderr.write(f"kvfetcher: {text}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status of this module's head.

    Raises:
        KVFetcherError: the store or the configuration failed.
    """
    arguments = make_parser().parse_args(argv)
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config).store
    # No TTL: looking through a store must not renew the time of all that lies in it.
    remote = open_store(replace(config, tier_memory_bytes=0, tier_disk_bytes=0, ttl_seconds=0.0))
    # Copies in this process's memory would end with it.
    store = open_tiers(replace(config, tier_memory_bytes=0), remote)
    job = _Job(arguments, config, remote, store, StatusLine())
    try:
        status: int = await arguments.run(job)
        return status
    finally:
        job.line.end()
        await job.store.close()


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="kvfetcher store",
        description="Look into the store, check it, purge it, put it in order.",
        epilog="Exit status: 0 done, 1 error, 2 wrong command line, 3 `verify` found damage.",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[_Job], Awaitable[int]], text: str
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--config", metavar="FILE", help=f"TOML file; default ${CONFIG_VARIABLE}")
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    ls = command("ls", _ls, "List objects: bytes, time, name.")
    ls.add_argument("prefix", nargs="?", default="", help="only names that start with this")

    stat = command("stat", _stat, "Count objects and bytes by model and tenant, or look at one.")
    stat.add_argument("name", nargs="?", help="an object name")

    get = command("get", _get, "Copy an object out of the store, for `kvfetcher inspect`.")
    get.add_argument("name", help="an object name")
    get.add_argument(
        "--output", "-o", metavar="FILE", default="-", help="where to; - = stdout (the default)"
    )

    purge = command(
        "purge",
        _purge,
        "Remove what belongs to a model, a tenant or a prompt, quarantined copies too. Without"
        " --delete it only says what it would remove. Copies on other hosts, and in the memory of"
        " running servers, live on for store.tier_max_age_seconds.",
    )
    purge.add_argument("--model", metavar="DIGITS", help="first digits of names, as `stat` shows")
    purge.add_argument(
        "--tenant", metavar="SALT", help='cache_salt of the tenant; "" = requests without one'
    )
    what = purge.add_mutually_exclusive_group()
    what.add_argument("--prefix", metavar="TEXT", help="objects whose name starts with this")
    what.add_argument("--chunk", metavar="NAME", help="a chunk and all chunks that continue it")
    what.add_argument(
        "--tokens",
        metavar="FILE",
        help="JSON list of token ids: chunks of prompts that begin with them",
    )

    gc = command(
        "gc",
        _gc,
        "Remove chunks and quarantined copies that are older than store.ttl_seconds (file, s3), and"
        " chunks that nobody can reach, because one before them is gone. Without --delete it only"
        " says what it would remove.",
    )
    for sub in (purge, gc):
        sub.add_argument(
            "--delete",
            action="store_true",
            help="remove, instead of only saying what would be removed",
        )

    check = command("verify", _verify, "Read chunks whole and check every digest.")
    check.add_argument("prefix", nargs="?", default="", help="only names that start with this")
    check.add_argument(
        "--quarantine", action="store_true", help="move damaged chunks to the quarantine"
    )

    near = command(
        "warm", _warm, "Copy objects to this host's tier on disk (store.tier_disk_bytes)."
    )
    near.add_argument("prefix", nargs="*", default=[""], help="only names that start with these")
    return parser


async def _ls(job: _Job) -> int:
    found = job.remote.list_prefix(job.arguments.prefix)
    if not sys.stdout.isatty():  # there the list itself tells how far it is
        found = _counted(job, found)
    separator = "[\n"
    async for info in found:
        if job.arguments.json:
            sys.stdout.write(f"{separator}  {json.dumps(asdict(info))}")
            separator = ",\n"
            continue
        modified = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.modified_time_seconds))
        _print(f"{info.num_bytes:>12} {modified} {info.name}")
    if job.arguments.json:
        _print("[]" if separator == "[\n" else "\n]")
    return 0


async def _stat(job: _Job) -> int:
    name = job.arguments.name
    facts = await (_stat_store(job) if name is None else _stat_object(job, name))
    if job.arguments.json:
        _print_json(facts)
        return 0
    for key, value in facts.items():
        if key != "scopes":
            _print(f"{key}: {value}")
    for scope in facts.get("scopes", ()):
        _print("  " + ", ".join(f"{key} {value}" for key, value in scope.items()))
    return 0


async def _stat_store(job: _Job) -> dict[str, Any]:
    objects = num_bytes = other_objects = 0
    scopes: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    async for info in _counted(job, job.remote.list_prefix()):
        objects += 1
        num_bytes += info.num_bytes
        parts = parse_object_name(info.name)
        if parts is None:
            other_objects += 1
            continue
        count = scopes[parts.model, parts.tenant]
        count[0] += 1
        count[1] += info.num_bytes
    return {
        "objects": objects,
        "num_bytes": num_bytes,
        "other_objects": other_objects,
        "scopes": [
            {"model": model, "tenant": tenant, "chunks": count[0], "num_bytes": count[1]}
            for (model, tenant), count in sorted(scopes.items())
        ],
    }


async def _stat_object(job: _Job, name: str) -> dict[str, Any]:
    info = await job.remote.head(name)
    if info is None:
        raise ChunkNotFoundError(f"store has no object {name}; `kvfetcher store ls` lists them")
    facts: dict[str, Any] = asdict(info)
    parts = parse_object_name(name)
    if parts is None:
        return facts
    found = await survey(job.remote, name, tell=job.line.show)
    facts |= {"model": parts.model, "tenant": parts.tenant}
    for damaged, problem in found.damaged:
        if damaged.name == name:
            return facts | {"problem": problem}
    chunk = next((chunk for chunk in found.chunks if chunk.info.name == name), None)
    if chunk is None:  # it went meanwhile
        return facts
    before = object_name(chunk.scope, chunk.parent) if chunk.first_position else None
    return facts | {"first_position": chunk.first_position, "chunk_before": before}


async def _get(job: _Job) -> int:
    arguments = job.arguments
    data = await job.remote.get(arguments.name)
    if arguments.output == "-":
        if arguments.json:
            raise RequestError("--json needs --output FILE: stdout holds the object")
        sys.stdout.buffer.write(data)
        return 0
    try:
        Path(arguments.output).write_bytes(data)
    except OSError as exc:
        raise RequestError(f"{arguments.output} cannot be written: {exc.strerror}") from exc
    if arguments.json:
        _print_json({"name": arguments.name, "num_bytes": len(data), "file": arguments.output})
    return 0


async def _purge(job: _Job) -> int:
    arguments = job.arguments
    chosen = (arguments.prefix, arguments.chunk, arguments.tokens)
    if arguments.model is None and arguments.tenant is None and not any(chosen):
        raise RequestError(
            "say what to purge: --model, --tenant, --prefix, --chunk or --tokens; `kvfetcher store"
            " purge --help` explains them"
        )
    is_wanted = _scope_filter(arguments.model, _named_salt(job.config, arguments.tenant))
    if arguments.chunk or arguments.tokens:
        objects = [
            chunk.info for chunk in await _surveyed_for_purge(job) if is_wanted(chunk.info.name)
        ]
        names = {info.name for info in objects} | {arguments.chunk}

        def is_match(name: str) -> bool:
            return name in names and is_wanted(name)
    else:
        prefix = arguments.prefix or arguments.model or ""

        def is_match(name: str) -> bool:
            return name.startswith(prefix) and is_wanted(name)

        listed = _counted(job, job.remote.list_prefix(prefix))
        objects = [info async for info in listed if is_match(info.name)]
    asides = await _set_asides(job, lambda info: is_match(info.name))
    why = dict.fromkeys((info.name for info in objects), "purged")
    result = await _remove(job, objects, why, asides)
    if arguments.delete and not (arguments.chunk or arguments.tokens):
        result["copies_dropped"] = await _forget_copies(job, is_match)
    if arguments.json:
        _print_json(result)
    return STATUS_FAILED if result["failed"] else 0


def _named_salt(config: StoreConfig, tenant: str | None) -> str | None:
    """The salt that is in names: the tenant's own, or what the keyring makes of it."""
    return tenant if tenant is None or not config.keys else load_keyring(config.keys).salt(tenant)


def _scope_filter(model: str | None, tenant: str | None) -> Callable[[str], bool]:
    """Whether a name belongs to the model (first digits) and tenant (salt) asked for.

    Raises:
        RequestError: `model` is not hex digits.
    """
    if model is not None and not re.fullmatch(r"[0-9a-f]{1,16}", model):
        raise RequestError(
            f"--model {model!r} must be 1 to 16 digits 0-9 a-f; `kvfetcher store stat` shows them"
        )
    digits = None if tenant is None else tenant_digits(tenant)

    def is_wanted(name: str) -> bool:
        if model is None and digits is None:
            return True
        parts = parse_object_name(name)
        return (
            parts is not None
            and parts.model.startswith(model or "")
            and digits in (None, parts.tenant)
        )

    return is_wanted


async def _surveyed_for_purge(job: _Job) -> list[Holding]:
    """The chunks that --chunk or --tokens asks for, first ones first."""
    arguments = job.arguments
    if arguments.chunk:
        parts = parse_object_name(arguments.chunk)
        if parts is None:
            raise RequestError(
                f"--chunk {arguments.chunk!r} is not the name of a chunk; `kvfetcher store ls`"
                " lists them"
            )
        found = await survey(job.remote, f"{parts.scope}/", tell=job.line.show)
        chunks = chunks_from(found.chunks, arguments.chunk)
    else:
        token_ids = _read_tokens(arguments.tokens)
        found = await survey(
            job.remote, arguments.model or "", with_tokens=True, tell=job.line.show
        )
        chunks = chunks_of_prompts(found.chunks, token_ids)
    if found.damaged:
        job.say(
            f"{len(found.damaged)} damaged chunks are not among them; `kvfetcher store verify"
            " --quarantine` sets them aside"
        )
    return sorted(chunks, key=lambda chunk: chunk.first_position)


def _read_tokens(path: str) -> list[int]:
    """Token ids from a JSON file; ``-`` = stdin.

    Raises:
        RequestError: it cannot be read, or holds something else.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text()
        token_ids = json.loads(text)
    except (OSError, ValueError) as exc:
        raise RequestError(f"--tokens {path} cannot be read: {exc}") from exc
    if (
        not isinstance(token_ids, list)
        or not token_ids
        or not all(type(token) is int for token in token_ids)
    ):
        raise RequestError(f"--tokens {path} must hold a JSON list of at least one integer")
    return token_ids


async def _gc(job: _Job) -> int:
    config, now = job.config, time.time()
    # Redis lets objects go by itself, by when they were read, which their time does not tell.
    ttl_seconds = 0.0 if config.kind == "redis" else config.ttl_seconds
    found = await survey(job.remote, "", tell=job.line.show)
    plan = plan_gc(
        found,
        now_seconds=now,
        grace_seconds=config.gc_grace_seconds,
        ttl_seconds=ttl_seconds,
    )
    chunks = sorted([*plan.expired, *plan.unreachable], key=lambda chunk: chunk.first_position)
    why = {chunk.info.name: "expired" for chunk in plan.expired}
    why |= {chunk.info.name: "unreachable" for chunk in plan.unreachable}
    asides = await _set_asides(job, lambda info: 0 < ttl_seconds < now - info.modified_time_seconds)
    result = await _remove(job, [chunk.info for chunk in chunks], why, asides)
    result |= {"chunks": len(found.chunks), "damaged": len(found.damaged)}
    if found.damaged:
        job.say(
            f"{len(found.damaged)} chunks are damaged; `kvfetcher store verify --quarantine` sets"
            " them aside"
        )
    if job.arguments.json:
        _print_json(result)
    return STATUS_FAILED if result["failed"] else 0


async def _set_asides(job: _Job, is_match: Callable[[ObjectInfo], bool]) -> list[SetAside]:
    """The quarantined copies that match by the name that they had, size and time."""
    return [aside async for aside in job.remote.list_quarantined() if is_match(aside.info)]


async def _remove(
    job: _Job, objects: Sequence[ObjectInfo], why: dict[str, str], asides: Sequence[SetAside]
) -> dict[str, Any]:
    """Remove objects and quarantined copies if --delete was given, and tell which."""
    num_bytes = sum(info.num_bytes for info in (*objects, *(aside.info for aside in asides)))
    if not job.arguments.json:
        would = "" if job.arguments.delete else "would remove: "
        for info in objects:
            _print(f"{info.num_bytes:>12} {would}{why[info.name]:<11} {info.name}")
        for aside in asides:
            _print(f"{aside.info.num_bytes:>12} {would}quarantined {aside.info.name}")
    result: dict[str, Any] = {
        "objects": [{"name": info.name, "why": why[info.name]} for info in objects],
        "quarantined": [{"name": aside.info.name, "place": aside.place} for aside in asides],
        "num_bytes": num_bytes,
        "deleted": job.arguments.delete,
        "removed": 0,
        "failed": {},
    }
    what = f"{len(objects)} objects, {len(asides)} quarantined copies"
    if not job.arguments.delete:
        job.say(f"would remove {what}, {num_bytes} bytes; --delete does it")
        return result
    removal = await remove(job.store, objects, asides, tell=job.line.show)
    for name, error in removal.failed.items():
        job.say(f"{name} was not removed: {error}")
    job.say(f"removed {removal.removed} of {what}, {removal.num_bytes} bytes")
    return result | {"removed": removal.removed, "failed": removal.failed}


async def _forget_copies(job: _Job, is_match: Callable[[str], bool]) -> int:
    """Drop copies on this host of objects that the store may not hold any more."""
    if not isinstance(job.store, TieredStore):
        return 0
    return await job.store.forget(is_match)


async def _verify(job: _Job) -> int:
    found = await verify(
        job.remote, job.remote.list_prefix(job.arguments.prefix), tell=job.line.show
    )
    quarantined = 0
    if job.arguments.quarantine:
        for name, problem in found.damaged.items():
            await job.store.quarantine(name, problem)
            quarantined += 1
    for name, problem in (found.damaged | found.failed).items():
        job.say(f"{name}: {problem}")
    job.say(
        f"{found.sound} chunks sound, {len(found.damaged)} damaged ({quarantined} quarantined),"
        f" {len(found.failed)} not read, {found.others} other objects, {found.num_bytes} bytes read"
    )
    if job.arguments.json:
        _print_json(asdict(found) | {"quarantined": quarantined})
    if found.damaged:
        return STATUS_DAMAGED
    return STATUS_FAILED if found.failed else 0


async def _warm(job: _Job) -> int:
    if not isinstance(job.store, TieredStore):
        raise ConfigError(
            "store.tier_disk_bytes is 0, so this host keeps no copies on its disk; set it to the"
            " bytes that they may take"
        )
    result = await warm(
        job.store,
        _listed(job.remote, job.arguments.prefix),
        max_bytes=job.config.tier_disk_bytes,
        tell=job.line.show,
    )
    for name, problem in result.failed.items():
        job.say(f"{name}: {problem}")
    job.say(
        f"{result.objects} objects near, {result.num_bytes} bytes"
        + ("; more do not fit into store.tier_disk_bytes" if result.is_full else "")
    )
    if job.arguments.json:
        _print_json(asdict(result))
    return STATUS_FAILED if result.failed else 0


async def _counted(job: _Job, found: AsyncIterator[ObjectInfo]) -> AsyncIterator[ObjectInfo]:
    """Pass objects on and show how many there were."""
    count = 0
    async for info in found:
        count += 1
        if count % _SHOW_EVERY == 0:
            job.line.show(f"looked at {count} objects")
        yield info


async def _listed(store: Store, prefixes: Sequence[str]) -> AsyncIterator[ObjectInfo]:
    for prefix in prefixes:
        async for info in store.list_prefix(prefix):
            yield info


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _print_json(data: Any) -> None:
    _print(json.dumps(data, indent=2, ensure_ascii=False))
