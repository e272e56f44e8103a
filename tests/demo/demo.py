"""One server saves a prefix, another one reuses it: the demo behind `make demo`.

Server A answers a question about a document (a miss) and saves the prefix to a folder. Server A
stops. Server B, with nothing but that folder, answers another question about the same document (a
hit), and once more with `kv_policy=recompute`. Talk goes to stderr, the table and the last line
`DEMO {json}` to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvfetcher.config import Config, load_config
from kvfetcher.launcher import TritonServer
from kvfetcher.models.folders import prepare_model
from kvfetcher.storage import open_store
from kvfetcher_client import Client, Generation
from kvfetcher_client.protocol import Assembler
from support.triton_server import server_config

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENT = Path(__file__).parents[1] / "data" / "documents" / "references_and_borrowing.txt"
QUESTIONS = (
    "What is the difference between a reference and a pointer in Rust?",
    "Why does Rust forbid two mutable references to the same data at one time?",
)
MAX_TOKENS = 48
SAVE_TIMEOUT_SECONDS = 300.0


def talk(text: str, *, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def chat(question: str) -> list[dict[str, str]]:
    """The document and a question, for the model's own chat template."""
    return [
        {"role": "system", "content": "You answer questions about a document."},
        {"role": "user", "content": f"{DOCUMENT.read_text()}\n\nQuestion: {question}"},
    ]


def demo_config(store: Path, profile: str | None) -> Config:
    config = server_config(load_config(), stop_timeout_seconds=60.0)
    return replace(
        config,
        store=replace(config.store, kind="file", path=str(store)),
        codec=replace(config.codec, profile=profile) if profile else config.codec,
    )


def serve(name: str, config: Config) -> TritonServer:
    def progress(seconds: float, models: int, missing: tuple[str, ...]) -> None:
        ready = models - len(missing)
        talk(f"\rserver {name}: starting, {seconds:3.0f} s, {ready}/{models} models ", end="")

    talk(f"server {name}: starting ", end="")
    return TritonServer(config, progress=progress)


@contextmanager
def ticking(what: str) -> Iterator[None]:
    """Show the seconds of a wait."""
    over, start = threading.Event(), time.monotonic()

    def tick() -> None:
        while not over.wait(0.5):
            talk(f"\r  {what}, {time.monotonic() - start:4.1f} s ", end="")

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        talk("\r" + " " * 60, end="")


def ask(client: Client, question: str, **options: str) -> Generation:
    """One streamed answer, shown as it comes."""
    talk(f"  question: {question}")
    start = time.monotonic()
    answer = Assembler()
    with ticking("waiting for the first token"):
        deltas = client.stream_chat(chat(question), max_tokens=MAX_TOKENS, **options)
        first = next(deltas)
    talk(f"\r  answer:   {first.text}", end="")
    answer.add(first, time.monotonic() - start)
    for delta in deltas:
        answer.add(delta, time.monotonic() - start)
        talk(delta.text, end="")
    talk("")
    return answer.finish(time.monotonic() - start)


def wait_until_saved(config: Config, num_chunks: int) -> None:
    """Saving happens after the answer; the demo must not stop the server in the middle of it."""

    async def count() -> int:
        store = open_store(config.store)
        try:
            return len([info async for info in store.list_prefix()])
        finally:
            await store.close()

    deadline = time.monotonic() + SAVE_TIMEOUT_SECONDS
    while (saved := asyncio.run(count())) < num_chunks:
        talk(f"\r  saving in the background: {saved}/{num_chunks} chunks ", end="")
        if time.monotonic() > deadline:
            raise SystemExit(f"only {saved} of {num_chunks} chunks were saved in time")
        time.sleep(0.5)
    talk(f"\r  saved {num_chunks} chunks of {config.codec.chunk_tokens} tokens      ")


def table(rows: list[tuple[str, Generation]]) -> str:
    lines = [f"{'request':<22}{'tokens hit':>14}{'bytes fetched / bf16':>28}{'first token':>14}"]
    for name, answer in rows:
        report = answer.report
        hit = f"{report.hit_tokens}/{report.prompt_tokens}"
        size = "-"
        if report.hit_tokens:
            size = f"{report.bytes_fetched / 1e6:.1f} / {report.raw['bytes_bf16'] / 1e6:.1f} MB"
        first = f"{answer.time_to_first_token_seconds * 1e3:.0f} ms"
        lines.append(f"{name:<22}{hit:>14}{size:>28}{first:>14}")
    return "\n".join(lines)


def summary(miss: Generation, hit: Generation, recomputed: Generation, chunk_tokens: int) -> str:
    """What the table means, and what to do next."""
    seconds = [answer.time_to_first_token_seconds for answer in (miss, hit, recomputed)]
    stages = hit.report.stages_ms
    rest = hit.report.prompt_tokens - hit.report.hit_tokens
    same = "the same answer" if hit.text == recomputed.text else "DIFFERENT answers"
    return "\n".join(
        [
            f"The hit was {seconds[2] / seconds[1]:.1f} times faster than computing the same prompt.",
            f"The hit and the recomputation gave {same}.",
            (
                f"{rest} tokens of the hit were computed: the question, and the end of the document that"
                f" fills no whole chunk of {chunk_tokens} tokens."
            ),
            (
                f"Of its {seconds[1] * 1e3:.0f} ms, {stages.get('total', 0):.0f} went by until the prefix"
                f" was restored, and the rest until the first token was computed."
            ),
            (
                "Next: `make serve`, and in another terminal `.venv/bin/kvfetcher generate --stream"
                ' --file DOCUMENT "QUESTION"`.'
            ),
        ]
    )


def as_facts(answer: Generation) -> dict[str, object]:
    """What `docs/build.py` draws: the report, and the first token as the client saw it."""
    first_ms = round(answer.time_to_first_token_seconds * 1e3, 1)
    return {"time_to_first_token_ms": first_ms, "kv_report": dict(answer.report.raw)}


def run(store: Path, profile: str | None, reports: Path | None) -> dict[str, object]:
    talk("preparing the model (the first time: a 93 MB download and a conversion)")
    prepare_model(load_config().engine.model, progress=lambda text: talk(f"  {text}"))
    config = demo_config(store, profile)
    with serve("A", config) as server, Client(server.grpc_url) as client:
        talk("- ready")
        miss = ask(client, QUESTIONS[0])
        wait_until_saved(config, miss.report.prompt_tokens // config.codec.chunk_tokens)
    talk("server A: stopped")
    config = demo_config(store, profile)
    with serve("B", config) as server, Client(server.grpc_url) as client:
        talk("- ready")
        hit = ask(client, QUESTIONS[1])
        recomputed = ask(client, QUESTIONS[1], kv_policy="recompute")
    talk("server B: stopped\n")
    rows = [("A, miss", miss), ("B, hit", hit), ("B, recompute", recomputed)]
    print(table(rows))
    print(summary(miss, hit, recomputed, config.codec.chunk_tokens))
    if reports is not None:
        facts = {"miss": as_facts(miss), "hit": as_facts(hit), "recompute": as_facts(recomputed)}
        reports.write_text(json.dumps(facts, indent=1) + "\n")
    return {
        "prompt_tokens": hit.report.prompt_tokens,
        "hit_tokens": hit.report.hit_tokens,
        "ttft_miss_ms": round(miss.time_to_first_token_seconds * 1e3, 1),
        "ttft_hit_ms": round(hit.time_to_first_token_seconds * 1e3, 1),
        "ttft_recompute_ms": round(recomputed.time_to_first_token_seconds * 1e3, 1),
        "bytes_fetched": hit.report.bytes_fetched,
        "bytes_bf16": hit.report.raw["bytes_bf16"],
        "profile": hit.report.raw["profile"],
        "same_answer": hit.text == recomputed.text,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--profile", help="codec profile; default: the configured one")
    parser.add_argument(
        "--reports", type=Path, metavar="FILE", help="write the three requests' reports"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvfetcher-demo-") as folder:
        result = run(Path(folder), args.profile, args.reports)
    print("DEMO " + json.dumps(result))
    return 0 if result["hit_tokens"] else 1


if __name__ == "__main__":
    sys.exit(main())
