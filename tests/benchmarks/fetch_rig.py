"""What the fetch benchmarks share: a real Redis behind a shaped link, real servers, prompts, JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import redis

from kvfetcher import __version__
from kvfetcher.config import Config, load_config
from kvfetcher.launcher import TritonServer
from kvfetcher.memory.control import ControlClient, socket_path
from kvfetcher.models.folders import prepare_model
from kvfetcher.models.tokenizer import Tokenizer
from kvfetcher_client import Client
from support.servers import RedisServer
from support.shaping import LinkShape, ShapedLink
from support.triton_server import server_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvfetcher_client import Generation

DOCUMENT = Path(__file__).parents[1] / "data" / "documents" / "references_and_borrowing.txt"
SETTLE_SECONDS = 240.0


def talk(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Prompts:
    """Prompts that share a beginning of `prefix_tokens` tokens and go on differently."""

    def __init__(self, config: Config, prefix_tokens: int) -> None:
        tokenizer = Tokenizer(prepare_model(config.engine.model).path)
        document = DOCUMENT.read_text()
        characters = len(document) * prefix_tokens // len(tokenizer.encode(document))
        while len(tokenizer.encode(document[:characters])) < prefix_tokens:
            characters += 8
        self._document = document[:characters]
        self._next = 0

    def another(self, title: str = "") -> str:
        """The shared beginning (of its own for each `title`) and a question never asked before."""
        self._next += 1
        return f"{title}{self._document}\n\nQuestion {self._next}: what does rule {self._next} say?"


@dataclass(frozen=True, slots=True)
class Served:
    """A ready server and its client."""

    server: TritonServer
    config: Config
    client: Client

    def first_token(self, prompt: str, policy: str, **options: object) -> Generation:
        """One request for one token."""
        return self.client.generate(prompt, max_tokens=1, kv_policy=policy, **options)

    def settle(self) -> None:
        """Wait until no request runs and nothing is left to save."""
        deadline = time.monotonic() + SETTLE_SECONDS
        with ControlClient(socket_path(self.server.run_dir), timeout_seconds=10) as control:
            while (stats := control.stats())["running"] or (
                stats["blocks"]["free"] != stats["blocks"]["total"]
            ):
                if time.monotonic() > deadline:
                    raise SystemExit(f"the server is not idle after {SETTLE_SECONDS} s: {stats}")
                time.sleep(0.05)


@contextmanager
def store_behind_link(folder: Path) -> Iterator[tuple[RedisServer, ShapedLink]]:
    """An empty Redis, and the link through which servers reach it."""
    with (
        RedisServer(folder / "redis") as store,
        ShapedLink(("127.0.0.1", store.port), LinkShape()) as link,
    ):
        yield store, link


@contextmanager
def serving(link: ShapedLink, **sections: dict[str, object]) -> Iterator[Served]:
    """A server over the store behind `link`; `sections` override fields of the configuration."""
    config = server_config(load_config(environ={}), stop_timeout_seconds=60.0)
    fields: dict[str, dict[str, object]] = {
        "store": {"kind": "redis", "url": f"redis://{link.host}:{link.port}/0"},
    }
    for name, values in sections.items():
        fields[name] = {**fields.get(name, {}), **values}
    config = replace(
        config, **{name: replace(getattr(config, name), **v) for name, v in fields.items()}
    )
    with TritonServer(config) as server, Client(server.grpc_url, timeout_seconds=300) as client:
        yield Served(server, config, client)


@contextmanager
def reads_of(store: RedisServer) -> Iterator[dict[str, list[tuple[int, int]]]]:
    """Ranges read meanwhile by object, as the store itself saw them; complete at the end."""
    reads: dict[str, list[tuple[int, int]]] = {}
    with redis.Redis(port=store.port) as client, client.monitor() as monitor:
        yield reads
        client.set("monitor:end", 1)
        for command in monitor.listen():
            words = command["command"].split(" ")
            if words[0].upper() == "GETRANGE" and words[1].startswith("kvf:o:"):
                reads.setdefault(words[1], []).append((int(words[2]), int(words[3])))
            elif words[1:2] == ["monitor:end"]:
                break
        client.delete("monitor:end")


def cpu_seconds(server: TritonServer) -> dict[str, float]:
    """CPU time so far: each model's processes, the rest of the server, and all that is around it.

    Around it are the store, its link and this program (`benchmark`).
    """
    around = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    processes = {int(child): "benchmark" for child in (*around, os.getpid())}
    processes[server.process_id] = "tritonserver"
    processes |= {stub.process_id: stub.model for stub in server.stubs()}
    used: dict[str, float] = {}
    for process, name in processes.items():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # user and system
        used[name] = used.get(name, 0.0) + ticks / os.sysconf("SC_CLK_TCK")
    return used


@contextmanager
def servers_first(nice: int) -> Iterator[None]:
    """Let servers have the cores first, before store, link and this program.

    These stand for other machines. Linux shares the cores between sessions first (`autogroup`,
    where it has it), and a server has a session of its own: this one gets a smaller share.

    Args:
        nice: of this session above a server's; 0 = as much as the server.

    Raises:
        SystemExit: the kernel does not group processes so, and shares the cores among all.
    """
    setting = Path("/proc/self/autogroup")
    if nice and not setting.exists():
        raise SystemExit("no /proc/self/autogroup: this kernel cannot let the server go first")
    if nice:
        before = setting.read_text().split()[-1]
        setting.write_text(str(nice))
    try:
        yield
    finally:
        if nice:
            setting.write_text(before)


def spread(seconds: list[float]) -> dict[str, object]:
    """Median and range of some times."""
    return {
        "median_seconds": round(median(seconds), 4),
        "min_seconds": round(min(seconds), 4),
        "max_seconds": round(max(seconds), 4),
        "runs": [round(s, 4) for s in seconds],
    }


def machine() -> dict[str, object]:
    """Where and with what a result was made."""
    root = Path(__file__).parents[2]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True,
        check=False,
    ).stdout.strip()  # fmt: skip
    cpu = next(
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    return {
        "commit": commit,
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "kvfetcher": __version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def write(path: Path, report: dict[str, object]) -> None:
    """Keep a result; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    talk(f"written: {path.name}")
