"""The `kvfetcher` command: parse, call, print. Data goes to stdout, talk to stderr.

Exit status: 0 done; 1 a known error, told in one line (more where a server's log explains it);
2 the command line is wrong; 3 `store verify` found damage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import platform
import shlex
import signal
import stat
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kvfetcher import __version__, wire
from kvfetcher.config import CONFIG_VARIABLE, OPENAI_PORT, explain_config, load_config
from kvfetcher.errors import KVFetcherError, StoreError
from kvfetcher.progress import StatusLine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvfetcher.config import CodecConfig, Config
    from kvfetcher.launcher import TritonServer

# Commands with a command line of their own, imported only when they run: module, what runs it,
# what makes its parser, help.
_ELSEWHERE = {
    "generate": ("kvfetcher_client.cli", "main", "make_parser", "Ask a running server."),
    "warm": (
        "kvfetcher_client.cli",
        "main_warm",
        "warm_parser",
        "Copy a prompt's stored chunks into a running server's tier.",
    ),
    "calibrate": (
        "kvfetcher.calibration.commands",
        "main_calibrate",
        "calibrate_parser",
        "Make a model's calibration for near, balanced, compact and tiny.",
    ),
    "certify": (
        "kvfetcher.calibration.commands",
        "main_certify",
        "certify_parser",
        "Measure the quality of a calibration again.",
    ),
    "store": (
        "kvfetcher.storage.admin.commands",
        "main",
        "make_parser",
        "List, check, purge and clean up the store; see `kvfetcher store --help`.",
    ),
    "doctor": (
        "kvfetcher.doctor.command",
        "main_doctor",
        "make_parser",
        "Check this machine, with remedies; see `kvfetcher doctor --help`.",
    ),
    "chaos": (
        "kvfetcher.chaos.command",
        "main",
        "make_parser",
        "Run faults on real servers of this host and count what must not happen.",
    ),
    "bench": (
        "kvfetcher.bench",
        "main",
        "make_parser",
        "Run a benchmark: codec or sim; see `kvfetcher bench codec --help`.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None = sys.argv.

    Returns:
        The exit status; see this module's head.
    """
    status = _main(argv)
    if argv is None and "obstore" in sys.modules:
        # The library's threads end after the interpreter, which they may abort then (9 of 75 runs of
        # `store ls` and `stat` on S3): all is done, so leave without its finalisation.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.run is None:  # `kvfetcher` alone
        parser.print_help()
        return 0
    if arguments.run is _run_elsewhere:  # that command reads the rest of the line itself
        arguments.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="kvfetcher: %(message)s")
    try:
        status = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return status
    except KVFetcherError as exc:
        print(f"kvfetcher: {exc}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `kvfetcher store ls | head`
        # What is still buffered goes nowhere, instead of failing again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvfetcher",
        description="Remote prefix KV caches as lossless H.265 video, on NVIDIA Triton.",
        epilog="Exit status: 0 done, 1 error, 2 wrong command line, 3 damage found (`store verify`),"
        " 130 interrupted.",
    )
    parser.set_defaults(run=None)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Any, text: str, **kwargs: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, **kwargs)
        sub.set_defaults(run=run)
        return sub

    serve = command("serve", _serve, "Serve the models with tritonserver until Ctrl-C.")
    _add_config(serve)
    serve.add_argument(
        "--model-repository",
        metavar="DIR",
        help="folder of the Triton models (default: ./model_repository)",
    )
    serve.add_argument("--host", help="address to bind to (server.host)")
    for kind in ("http", "grpc", "metrics"):
        serve.add_argument(f"--{kind}-port", type=int, metavar="N", help=f"server.{kind}_port")
    serve.add_argument(
        "--openai",
        dest="openai_port",
        type=int,
        nargs="?",
        const=OPENAI_PORT,
        metavar="PORT",
        help=f"answer OpenAI's API, too, on this port (default {OPENAI_PORT}; server.openai_port)",
    )
    serve.add_argument("--log-file", metavar="FILE", help="keep the server's log in FILE")
    serve.add_argument("--json", action="store_true", help="print the addresses as JSON when ready")

    prepare = command("prepare", _prepare, "Fetch the model and check that tritonserver can run.")
    _add_config(prepare)
    prepare.add_argument("--json", action="store_true", help="print what was found as JSON")

    config = command("config", _config, "Show every setting, its value and where it came from.")
    _add_config(config)
    config.add_argument("--json", action="store_true", help="print a JSON list")

    env = command(
        "env",
        _env,
        "Print the shell variables that a tritonserver started by hand needs:"
        ' eval "$(kvfetcher env)"; tritonserver --model-repository model_repository',
    )

    env.add_argument("--json", action="store_true", help="print the variables as a JSON object")

    for name, (module, function, _, text) in _ELSEWHERE.items():
        elsewhere = command(name, _run_elsewhere, text, add_help=False)
        elsewhere.set_defaults(module=module, function=function)

    inspect = command("inspect", _inspect, "Check a chunk file and show what it holds.")
    inspect.add_argument("file", metavar="FILE", help="a chunk object; - for stdin")
    inspect.add_argument("--json", action="store_true", help="print all of it as JSON")

    version = command("version", _version, "Print the version.")
    version.add_argument("--json", action="store_true", help="print a JSON object")

    completion = command(
        "completion",
        _completion,
        'Print a shell\'s completion of this command: eval "$(kvfetcher completion bash)"',
    )
    completion.add_argument(
        "shell", choices=("bash", "zsh", "tcsh"), help="the shell that the text is for"
    )
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help=f"TOML file; default ${CONFIG_VARIABLE}")


def _serve(arguments: argparse.Namespace) -> int:
    from kvfetcher.doctor.preflight import check_before_start
    from kvfetcher.launcher import Supervisor, TritonServer
    from kvfetcher.launcher.repository import find_repository

    config = load_config(arguments.config)
    chosen = {
        name: value
        for name in ("host", "http_port", "grpc_port", "metrics_port", "openai_port")
        if (value := getattr(arguments, name)) is not None
    }
    config = replace(config, server=replace(config.server, **chosen))
    repository = find_repository(arguments.model_repository)
    with _signals_interrupt():
        if (repository / wire.TENSORRT_LLM).is_dir():
            folder = _prepare_model(config)
            config = replace(config, codec=_choose_profile(config, folder))
            for warning in check_before_start(config):
                print(f"kvfetcher: warning: {warning}", file=sys.stderr)
        line = StatusLine()
        server = TritonServer(
            config,
            model_repository=repository,
            log_path=arguments.log_file,
            progress=lambda seconds, total, missing: line.show(
                f"starting: {total - len(missing)} of {total} models ready after {seconds:.0f} s"
                + (f"; loading {', '.join(missing)}" if missing else "")
            ),
        )
        try:
            with _openai(config, server) as openai_url:
                try:
                    server.start()
                finally:
                    line.end()
                urls = {
                    "gRPC": server.grpc_url,
                    "HTTP": server.http_url,
                    "metrics": server.metrics_url,
                } | ({"OpenAI": openai_url} if openai_url else {})
                print(
                    f"kvfetcher: ready: {', '.join(f'{k} {v}' for k, v in urls.items())};"
                    f" log {server.log_path}; Ctrl-C stops",
                    file=sys.stderr,
                )
                if arguments.json:
                    facts = {name.lower(): url for name, url in urls.items()}
                    print(json.dumps({**facts, "log": str(server.log_path)}), flush=True)
                Supervisor(server).run()
        except KeyboardInterrupt:
            print(
                "kvfetcher: stopping: running requests and saves are finished (Ctrl-C again to kill)",
                file=sys.stderr,
            )
        finally:
            clean = server.stop()
    if not clean:
        print("kvfetcher: stopped by force; unfinished saves are lost", file=sys.stderr)
    return 0 if clean else 1


@contextlib.contextmanager
def _openai(config: Config, server: TritonServer) -> Iterator[str]:
    """OpenAI's API in front of the server, where it is asked for; gives its base URL, else "".

    It listens before the server starts (a taken port is found at once) and answers 503 until then.
    """
    if not config.server.openai_port:
        yield ""
        return
    from kvfetcher.openai import OpenAIServer

    with OpenAIServer(
        config.server.host,
        config.server.openai_port,
        grpc_url=server.grpc_url,
        model=Path(config.engine.model).name,
        default_max_tokens=config.engine.max_output_tokens,
    ) as entrance:
        yield entrance.url


def _prepare(arguments: argparse.Namespace) -> None:
    from kvfetcher.launcher.installation import find_installation

    config = load_config(arguments.config)
    installation = find_installation()
    print(f"tritonserver: {installation.executable} ({installation.origin})", file=sys.stderr)
    print(f"libraries: {', '.join(map(str, installation.library_folders))}", file=sys.stderr)
    folder = _prepare_model(config)
    _prepare_encoder(config)
    if arguments.json:
        _print_json({"tritonserver": str(installation.executable), "model": str(folder)})


def _prepare_model(config: Config) -> Path:
    from kvfetcher.models.folders import prepare_model

    folder = prepare_model(
        config.engine.model, progress=lambda text: print(f"kvfetcher: {text}", file=sys.stderr)
    )
    print(f"kvfetcher: model {folder.name}: {folder.path}", file=sys.stderr)
    return folder.path


def _prepare_encoder(config: Config) -> None:
    """Compile the encoder, so that the first start of a server does not wait for it."""
    if config.codec.encoder == "nvenc":
        return
    from kvfetcher.codec.encoders import choose_encoder

    chosen = choose_encoder(config.codec.encoder)
    print(f"kvfetcher: chunks are encoded by {chosen.name}", file=sys.stderr)


def _choose_profile(config: Config, model: Path) -> CodecConfig:
    from kvfetcher.launcher.profile import choose_profile

    chosen = choose_profile(config.codec, model, dtype=config.engine.kv_dtype)
    print(f"kvfetcher: profile {chosen.codec.profile} ({chosen.reason})", file=sys.stderr)
    return chosen.codec


def _config(arguments: argparse.Namespace) -> None:
    settings = explain_config(arguments.config)
    if arguments.json:
        _print_json([asdict(setting) for setting in settings])
        return
    names = max(len(setting.name) for setting in settings)
    for setting in settings:
        value = json.dumps(setting.value, ensure_ascii=False)
        print(f"{setting.name:<{names}} = {value}  ({setting.source}) {setting.doc}")


def _env(arguments: argparse.Namespace) -> None:
    from kvfetcher.launcher.process import plain_environment

    variables = plain_environment(os.environ)
    if arguments.json:
        _print_json(variables)
        return
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")


def _run_elsewhere(arguments: argparse.Namespace) -> int:
    run = getattr(importlib.import_module(arguments.module), arguments.function)
    return int(run(arguments.rest))


def _read_chunk(name: str) -> bytes:
    """A chunk object from a regular file, or from stdin; never more than the largest chunk.

    Raises:
        StoreError: it cannot be read, or is not a regular file.
        FormatError: it does not begin with a chunk's header.
    """
    from kvfetcher.format.container import PREFIX_BYTES, header_size, parse_header

    try:
        if name == "-":
            file: IO[bytes] = sys.stdin.buffer
        else:
            # Not waiting for the other end of a FIFO.
            file = os.fdopen(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        with file:
            if name != "-" and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StoreError(f"{name} is not a regular file; pipe it to `kvfetcher inspect -`")
            data = file.read(PREFIX_BYTES)
            data += file.read(header_size(data) - len(data))
            # One byte more: what follows the chunk is an error.
            return data + file.read(parse_header(data).object_bytes - len(data) + 1)
    except OSError as exc:
        raise StoreError(f"{name} cannot be read: {exc.strerror}") from exc


def _inspect(arguments: argparse.Namespace) -> None:
    from kvfetcher.codec.profiles import describe_chunk

    facts = describe_chunk(_read_chunk(arguments.file))
    if arguments.json:
        _print_json(facts)
        return
    for name, value in facts.items():
        if name != "units":
            print(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")
    print(f"units: {len(facts['units'])}")
    for unit in facts["units"]:
        print(
            f"  layers {unit['layers'][0]}-{unit['layers'][1] - 1} {unit['variant']}:"
            f" {unit['profile']}, {unit['bytes']} bytes,"
            f" {unit['bits_per_element']:.2f} bits/element, {unit['pictures']} x"
            f" {unit['picture']} {unit['chroma']} {unit['bit_depth']} bit"
        )


def _version(arguments: argparse.Namespace) -> None:
    if arguments.json:
        _print_json({"kvfetcher": __version__, "python": platform.python_version()})
        return
    print(__version__)


def _completion(arguments: argparse.Namespace) -> None:
    import shtab

    parser = _parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, (module, _, parser_name, _) in _ELSEWHERE.items():
        make = getattr(importlib.import_module(module), parser_name)
        commands.choices[name] = make()
    print(shtab.complete(parser, shell=arguments.shell))


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP act as Ctrl-C does, also where a shell has Ctrl-C ignored (``&``)."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
