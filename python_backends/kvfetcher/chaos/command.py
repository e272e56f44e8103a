"""`kvfetcher chaos`: run every kind of fault on real servers, and count what must not happen.

Each run is one fault on a server under supervision, over a store of its own. It is *wrong* where an
answer differs from the computed one, *hung* where a request took longer than its deadline or service
did not come back, and *leaked* where leases, shared memory, memory or descriptors did.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvfetcher.chaos.faults import fault_kinds
from kvfetcher.chaos.stores import ChaosStore, missing_program
from kvfetcher.chaos.world import DEADLINE_SECONDS, World
from kvfetcher.errors import KVFetcherError, ServerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvfetcher.chaos.faults import FaultKind
    from kvfetcher.chaos.stores import StoreKind
    from kvfetcher.chaos.world import Asked

_STORES: tuple[StoreKind, ...] = ("file", "redis", "s3")
_SEEDS = 20
_OWN_SPACE = "--in-its-own-space"
# Of the run's own /dev/shm, and of the folder of its file store.
_SHARED_BYTES = 1 << 30
_STORE_BYTES = 64 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One run."""

    fault: str
    store: str
    seed: int
    requests: int
    answered: int
    wrong: int
    hung: int
    leaked: int
    seconds: float
    detail: str = ""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="kvfetcher chaos",
        description="Run faults on real servers of this host and count wrong answers, requests that"
        " hang, and what is not given back. Exit status: 0 none, 3 some.",
    )
    parser.add_argument("--quick", action="store_true", help="one run per kind of fault")
    parser.add_argument(
        "--seeds", type=int, default=_SEEDS, metavar="N", help=f"runs per kind and store ({_SEEDS})"
    )
    parser.add_argument(
        "--store", action="append", choices=_STORES, help="only this store; may be repeated"
    )
    parser.add_argument(
        "--fault", action="append", metavar="NAME", help="only this kind; may be repeated"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="engine.model")
    parser.add_argument("--list", action="store_true", help="print the kinds of faults")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument(_OWN_SPACE, action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see this module's text."""
    arguments = make_parser().parse_args(argv)
    kinds = [k for k in fault_kinds() if not arguments.fault or k.name in arguments.fault]
    if arguments.list:
        print("\n".join(f"{kind.name}: {', '.join(kind.stores)}" for kind in kinds))
        return 0
    if not kinds:
        raise ServerError(
            f"no such fault: {', '.join(arguments.fault)}; see kvfetcher chaos --list"
        )
    has_space = arguments.in_its_own_space
    if not has_space and (space := _own_space()):
        words = sys.argv[2:] if argv is None else argv
        command = [sys.executable, "-m", "kvfetcher.cli", "chaos", *words, _OWN_SPACE]
        return subprocess.run([*space, *command], check=False).returncode
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(
        prefix="kvfetcher-chaos-",
        ignore_cleanup_errors=True,  # what is mounted there goes by itself
    ) as folder:
        for store in arguments.store or _STORES:
            if reason := missing_program(store):
                skipped[store] = reason
                continue
            chosen = [kind for kind in kinds if store in kind.stores]
            if arguments.quick and not arguments.store:  # each kind once, over all stores
                done = {row.fault for row in rows}
                chosen = [
                    k for k in chosen if k.name not in done and store == _quick_store(k, skipped)
                ]
            chosen = _possible(chosen, skipped, has_space=has_space)
            if not chosen:
                continue
            seeds = 1 if arguments.quick else arguments.seeds
            try:
                rows.extend(
                    _run_store(
                        store,
                        chosen,
                        Path(folder),
                        model=arguments.model,
                        seeds=seeds,
                        has_space=has_space,
                    )
                )
            except KeyboardInterrupt:  # what was run is told all the same
                skipped[f"{store}, the rest"] = "interrupted"
                break
    return _report(rows, skipped, as_json=arguments.json)


def _quick_store(kind: FaultKind, skipped: dict[str, str]) -> str:
    """Kinds are dealt out to the stores that are here, evenly and always in the same way."""
    possible = [
        store for store in kind.stores if store not in skipped and not missing_program(store)
    ]
    return possible[sum(kind.name.encode()) % len(possible)] if possible else ""


def _possible(
    kinds: list[FaultKind], skipped: dict[str, str], *, has_space: bool
) -> list[FaultKind]:
    for kind in kinds:
        if kind.needs_small_file_systems and not has_space:
            skipped[kind.name] = "no file systems of its own: needs `unshare` and root"
    return [kind for kind in kinds if has_space or not kind.needs_small_file_systems]


def _run_store(
    store: StoreKind,
    kinds: list[FaultKind],
    folder: Path,
    *,
    model: str,
    seeds: int,
    has_space: bool,
) -> Iterator[Row]:
    """Rows as they come; those before an interruption are kept."""
    place = folder / store
    place.mkdir()
    if has_space:
        _mount(place, _STORE_BYTES if store == "file" else _SHARED_BYTES)
        _mount(Path("/dev/shm"), _SHARED_BYTES)
    with ChaosStore(store, place / "objects") as running, World(running, model=model) as world:
        for seed in range(seeds):
            for kind in kinds:
                row = run_one(world, kind, seed)
                yield row
                _log.info(
                    "%s over %s, seed %d: %d of %d answered in %.1f s%s",
                    *(row.fault, row.store, row.seed, row.answered, row.requests, row.seconds),
                    f"; {row.detail}" if row.detail else "",
                )


def run_one(world: World, kind: FaultKind, seed: int) -> Row:
    """One fault on a running server, from before it to after everything is as it was."""
    rng = random.Random(f"{kind.name} {world.store.kind} {seed}")
    started = time.monotonic()
    problems: list[str] = []
    asked: list[Asked] = []
    answered = wrong = hung = leaked = 0
    try:
        asked = kind.run(world, rng)
        answers = []
        for each in asked:
            left = started + DEADLINE_SECONDS + 10 - time.monotonic()
            try:
                each.future.exception(max(0.1, left))
                answers.append((each, each.ids()))
            except FutureTimeoutError:
                hung += 1
                problems.append("a request has no end")
        world.heal()
        for each, ids in answers:
            if ids is None:
                continue
            answered += 1
            if ids != world.compute(each.prompt):
                wrong += 1
                problems.append(f"{ids} is not {world.compute(each.prompt)}")
        hit = world.ask(world.prompts[0]).ids()
        if hit != world.expected[world.prompts[0]]:
            wrong += 1
            problems.append(f"after the fault: {hit}")
    except KVFetcherError as exc:  # no service, or no store, when the fault was over
        hung += 1
        problems.append(str(exc).splitlines()[0])
    else:
        try:
            world.settle()
            leak = world.leaks()
        except ServerError as exc:
            leak = str(exc).splitlines()[0]
        if leak:
            leaked += 1
            problems.append(leak)
    return Row(
        kind.name,
        world.store.kind,
        seed,
        requests=len(asked),
        answered=answered,
        wrong=wrong,
        hung=hung,
        leaked=leaked,
        seconds=round(time.monotonic() - started, 2),
        detail="; ".join(problems),
    )


def _report(rows: list[Row], skipped: dict[str, str], *, as_json: bool) -> int:
    facts = {
        "fault_kinds": len({row.fault for row in rows}),
        "runs": len(rows),
        "wrong": sum(row.wrong for row in rows),
        "hung": sum(row.hung for row in rows),
        "leaked": sum(row.leaked for row in rows),
        "skipped": skipped,
    }
    if as_json:
        print(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        for row in rows:
            if row.detail:
                print(f"{row.fault} over {row.store}, seed {row.seed}: {row.detail}")
        for name, reason in skipped.items():
            print(f"not run: {name}: {reason}")
        print(
            f"{facts['fault_kinds']} kinds of faults, {facts['runs']} runs: {facts['wrong']} wrong,"
            f" {facts['hung']} hung, {facts['leaked']} leaked"
        )
    return 3 if facts["wrong"] or facts["hung"] or facts["leaked"] else 0


def _own_space() -> list[str]:
    """A command's beginning that gives it mounts of its own; [] where that cannot be."""
    unshare = shutil.which("unshare")
    if unshare is None or os.getuid() != 0:
        return []
    begin = [unshare, "--mount", "--propagation", "private"]
    tried = subprocess.run([*begin, "true"], capture_output=True, check=False)
    return begin if tried.returncode == 0 else []


def _mount(folder: Path, num_bytes: int) -> None:
    """A small file system of this process's own at `folder`."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerError(f"no small file system at {folder}: {done.stderr.strip()}")
