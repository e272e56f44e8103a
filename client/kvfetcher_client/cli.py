"""`kvfetcher generate` and `warm`: ask a running server. Data goes to stdout, talk to stderr.

Exit status: 0 answered; 1 a known error, told in one line; 2 the command line is wrong; 130
interrupted (the request is cancelled).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfetcher import wire
from kvfetcher.errors import KVFetcherError
from kvfetcher_client.client import DEFAULT_TIMEOUT_SECONDS, DEFAULT_URL, Client
from kvfetcher_client.errors import RequestError, UnsupportedError
from kvfetcher_client.protocol import Assembler, Options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfetcher_client.protocol import Generation, KVReport

_OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "seed", "kv_policy", "cache_salt")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None = sys.argv.

    Returns:
        The exit status; see this module's head.
    """
    arguments = make_parser().parse_args(argv)
    try:
        return _generate(arguments)
    except KVFetcherError as exc:
        print(f"kvfetcher: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def main_warm(argv: Sequence[str] | None = None) -> int:
    """Run `kvfetcher warm`; arguments and exit status as for `main`."""
    arguments = warm_parser().parse_args(argv)
    try:
        return _warm(arguments)
    except KVFetcherError as exc:
        print(f"kvfetcher: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def warm_parser() -> argparse.ArgumentParser:
    """The command line of `kvfetcher warm`."""
    parser = argparse.ArgumentParser(
        prog="kvfetcher warm",
        description="Have a running server copy a prompt's stored chunks into its tier"
        " (store.tier_memory_bytes, store.tier_disk_bytes) before a request needs them.",
    )
    parser.add_argument(
        "prompt", metavar="TEXT", nargs="?", default="", help="the prompt; - for stdin"
    )
    parser.add_argument("--file", metavar="FILE", help="a document that goes before the text")
    parser.add_argument(
        "--token-ids", metavar="FILE", help="a JSON list of token ids instead of a text"
    )
    parser.add_argument("--url", default=DEFAULT_URL, help="host:port (default: %(default)s)")
    parser.add_argument(
        "--cache-salt", metavar="TEXT", default="", help="cache_salt of the requests to come"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="longest wait (default: %(default)g)",
    )
    return parser


def _warm(arguments: argparse.Namespace) -> int:
    prompt = _token_ids(arguments.token_ids) if arguments.token_ids else _prompt(arguments)
    with Client(arguments.url, timeout_seconds=arguments.timeout) as client:
        report = client.warm(prompt, cache_salt=arguments.cache_salt)
    if arguments.json:
        print(json.dumps(dict(report.raw), ensure_ascii=False))
    print(f"kvfetcher: {_warmed(report)}", file=sys.stderr)
    return 0


def _warmed(report: KVReport) -> str:
    """What a request of policy `warm` did."""
    raw = report.raw
    why = f"; {report.reason}: {raw.get('detail', '')}" if report.reason else ""
    return (
        f"{raw.get('outcome', '')}: {raw.get('chunks_hit', 0)} of {raw.get('chunks_stored', 0)}"
        f" stored chunks are in the local tier, {report.bytes_fetched / 1e6:.2f} MB read{why}"
    )


def _token_ids(path: str) -> list[int]:
    try:
        ids = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise RequestError(f"{path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise RequestError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise RequestError(f"{path} must hold a JSON list of integers")
    return ids


def make_parser() -> argparse.ArgumentParser:
    """The command line of `kvfetcher generate`."""
    parser = argparse.ArgumentParser(
        prog="kvfetcher generate",
        description="Ask a running KVFetcher server. The answer goes to stdout.",
    )
    parser.add_argument("prompt", metavar="QUESTION", help="the prompt, or its end; - for stdin")
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="a document that goes before the question: the prefix that is shared and fetched",
    )
    parser.add_argument("--url", default=DEFAULT_URL, help="host:port (default: %(default)s)")
    chat = parser.add_mutually_exclusive_group()
    chat.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="ask as a chat, by the model's template (the default where the model has one)",
    )
    chat.add_argument(
        "--no-chat",
        dest="chat",
        action="store_false",
        help="let the model go on from the bare text",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    parser.add_argument("--json", action="store_true", help="print answer and report as JSON")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 = the likeliest token")
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="choose among the K likeliest tokens"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="choose among the likeliest tokens of total probability P",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the random choice")
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="the answer ends before TEXT; may be repeated",
    )
    parser.add_argument(
        "--kv-policy", choices=wire.KV_POLICIES, help="what to do with the stored prefix"
    )
    parser.add_argument(
        "--cache-salt", metavar="TEXT", help="share prefixes only with requests of this salt"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="longest wait for the whole answer (default: %(default)g)",
    )
    return parser


def _generate(arguments: argparse.Namespace) -> int:
    prompt = _prompt(arguments)
    if arguments.system is not None and arguments.chat is False:
        raise RequestError("--system is part of a chat; leave out --no-chat")
    options: dict[str, Any] = {
        name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None
    }
    if arguments.stop:
        options["stop_words"] = arguments.stop
    with Client(arguments.url, timeout_seconds=arguments.timeout) as client:
        start = time.monotonic()
        prompt = _chat_prompt(client, arguments, prompt)
        answer = Assembler()
        for delta in client.stream(prompt, **Options(**options)):  # type: ignore[typeddict-item]
            answer.add(delta, time.monotonic() - start)
            if arguments.stream and not arguments.json:
                print(delta.text, end="", flush=True)
        generation = answer.finish(time.monotonic() - start)
    if arguments.json:
        print(json.dumps(_as_dict(generation), ensure_ascii=False))
    else:
        print("" if arguments.stream else generation.text)
    print(_summary(generation), file=sys.stderr)
    return 0


def _chat_prompt(client: Client, arguments: argparse.Namespace, text: str) -> str:
    """The prompt to send: the chat's where one is asked for or the model has a template."""
    if arguments.chat is False:
        return text
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    try:
        return client.chat_prompt([*system, {"role": "user", "content": text}])
    except UnsupportedError:
        if arguments.chat or system:
            raise
        return text


def _prompt(arguments: argparse.Namespace) -> str:
    try:
        question = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        document = Path(arguments.file).read_text(encoding="utf-8") if arguments.file else ""
    except OSError as exc:
        raise RequestError(f"{arguments.file} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise RequestError(f"{arguments.file or 'stdin'} is not UTF-8 text: {exc.reason}") from exc
    # The document first: only what prompts share from their start can be fetched.
    return f"{document.rstrip()}\n\n{question}" if document else question


def _as_dict(generation: Generation) -> dict[str, Any]:
    return {
        "text": generation.text,
        "output_ids": list(generation.output_ids),
        "finish_reason": generation.finish_reason,
        "time_to_first_token_seconds": round(generation.time_to_first_token_seconds, 6),
        "kv_report": dict(generation.report.raw),
    }


def _summary(generation: Generation) -> str:
    report = generation.report
    if generation.finish_reason == "warmed":
        return f"kvfetcher: {_warmed(report)}"
    if report.reason == "short_prompt":
        fetched = f"{report.prompt_tokens} prompt tokens, too few for a chunk to be fetched"
    else:
        why = f" ({report.reason})" if report.reason else ""
        fetched = (
            f"{report.hit_tokens} of {report.prompt_tokens} prompt tokens fetched{why},"
            f" {report.bytes_fetched / 1e6:.2f} MB"
        )
    return (
        f"kvfetcher: {fetched}; first token after"
        f" {generation.time_to_first_token_seconds * 1e3:.0f} ms, {len(generation.output_ids)}"
        f" tokens, {generation.finish_reason}"
    )
