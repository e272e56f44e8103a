"""How the other processes reach the engine process: a Unix socket, one JSON object per line.

Request ``{"op": name, "args": {...}}``, answer ``{"ok": true, "result": {...}}`` or
``{"ok": false, "error": class of errors.py, "message": text}``. Operations: ``describe``,
``lease``, ``seal``, ``share``, ``renew``, ``release``, ``abandon``, ``cancel``,
``was_cancelled``, ``stats``. All are quick table
look-ups, so one thread serves every peer. The socket's folder is 0700 and the socket 0600: whoever
may connect is the same user, and the lines are still checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvfetcher import errors
from kvfetcher.config import RUN_DIR_VARIABLE
from kvfetcher.errors import ConfigError, EngineError, KVFetcherError, RequestError
from kvfetcher.memory.arena import Arena, BlockTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvfetcher.memory.leases import Lease, LeaseTable

SOCKET_NAME = "engine.sock"
MAX_LINE_BYTES = 1 << 20
"""A line longer than this ends the connection; `describe` of 128 layers is about 130 kB."""

_SUN_PATH_BYTES = 107  # sizeof(sockaddr_un.sun_path) - 1 on Linux
_WRITE_TIMEOUT_SECONDS = 5.0
_EXPIRE_EVERY_SECONDS = 1.0
_IDEMPOTENT = frozenset({"describe", "stats", "renew", "was_cancelled"})

_log = logging.getLogger(__name__)


def run_dir(*, environ: Mapping[str, str] | None = None) -> Path:
    """The folder where the processes of one server find each other; made when missing.

    $KVFETCHER_RUN_DIR, else ``/tmp/kvfetcher-<uid>/<parent pid>``: all Python stubs of one
    tritonserver have it as their parent.

    Raises:
        ConfigError: the folder cannot be made, or belongs to somebody else.
    """
    chosen = (os.environ if environ is None else environ).get(RUN_DIR_VARIABLE, "")
    base = Path(chosen) if chosen else Path(f"/tmp/kvfetcher-{os.getuid()}")
    path = base if chosen else base / str(os.getppid())
    for folder in (base, path):
        try:
            folder.mkdir(mode=0o700, parents=bool(chosen), exist_ok=True)
            status = folder.stat(follow_symlinks=False)
        except OSError as exc:
            raise ConfigError(
                f"run folder {folder} cannot be made: {exc.strerror}; set ${RUN_DIR_VARIABLE} to a"
                " folder that you own"
            ) from exc
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise ConfigError(
                f"run folder {folder} belongs to uid {status.st_uid} with mode"
                f" {status.st_mode & 0o777:o}; it must be yours and writable by nobody else: set"
                f" ${RUN_DIR_VARIABLE} to such a folder"
            )
    return path


def socket_path(folder: Path | None = None) -> Path:
    """Path of the engine's socket in `folder` (default `run_dir()`).

    Raises:
        ConfigError: the path is too long for a Unix socket.
    """
    path = (run_dir() if folder is None else folder) / SOCKET_NAME
    if len(os.fsencode(path)) > _SUN_PATH_BYTES:
        raise ConfigError(
            f"socket path {path} is longer than {_SUN_PATH_BYTES} bytes; set ${RUN_DIR_VARIABLE} to"
            " a shorter folder"
        )
    return path


class ControlServer:
    """Answers the control socket from a thread of its own. A context manager.

    Args:
        path: path of the socket; an old file there is replaced (its owner is gone or being replaced).
        arena: whose blocks `leases` names.
        leases: the table; shared with the engine.
        describe: JSON-serialisable facts of the engine; called per request, must be quick.
        stats: JSON-serialisable counters; the server adds leases and arena usage.
        cancel: ends the answer of that stream id; False where there is none (`Streams.cancel`).
        was_cancelled: whether that was called for an id of another process.
        clock: seconds, monotonic; the one that the engine claims with.

    Raises:
        EngineError: the socket cannot be bound.
    """

    def __init__(
        self,
        path: Path,
        *,
        arena: Arena,
        leases: LeaseTable,
        describe: Callable[[], dict[str, Any]],
        stats: Callable[[], dict[str, Any]],
        cancel: Callable[[str], bool] = lambda _: False,
        was_cancelled: Callable[[str], bool] = lambda _: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._arena = arena
        self._leases = leases
        self._describe = describe
        self._stats = stats
        self._cancel = cancel
        self._was_cancelled = was_cancelled
        self._clock = clock
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        try:
            self._listener = _listen(path)
        except OSError as exc:
            self._loop.close()
            raise EngineError(f"control socket {path} cannot be bound: {exc.strerror}") from exc
        self._inode = path.stat().st_ino
        self._stop: asyncio.Event = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="kvfetcher-control", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering, drop every connection, remove the socket. Safe to call twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        # Another server may have taken the path over meanwhile: leave its socket alone.
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_unix_server(
            self._peer, sock=self._listener, limit=MAX_LINE_BYTES
        )
        timer = asyncio.create_task(self._expire_forever())
        await self._stop.wait()
        timer.cancel()
        server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()
        current = asyncio.current_task()
        rest = [task for task in asyncio.all_tasks() if task is not current]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_SECONDS)
            ended = self._leases.expire(self._clock())
            if ended:
                _log.warning("%d arena lease(s) expired", ended)

    async def _peer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while line := await reader.readline():
                answer = self._answer(line)
                writer.write(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
                # A peer that does not read its answers must not hold memory for ever.
                await asyncio.wait_for(writer.drain(), _WRITE_TIMEOUT_SECONDS)
        except ValueError:  # readline: the line is longer than MAX_LINE_BYTES
            _log.warning("control peer sent a line longer than %d bytes", MAX_LINE_BYTES)
        except (OSError, TimeoutError) as exc:
            _log.info("control peer went away: %s", exc)
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            return {"ok": True, "result": self._call(*_parse_request(line))}
        except KVFetcherError as exc:
            return {"ok": False, "error": type(exc).__name__, "message": str(exc)}
        except Exception as exc:  # noqa: BLE001  a bug of one operation must not end the server
            _log.exception("control operation failed")
            return {"ok": False, "error": "EngineError", "message": f"internal error: {exc!r}"}

    def _call(self, op: str, args: dict[str, Any]) -> dict[str, Any]:
        now = self._clock()
        if op == "describe":
            _take(op, args, {})
            return self._describe()
        if op == "stats":
            _take(op, args, {})
            return {
                **self._stats(),
                "leases": asdict(self._leases.counts),
                "blocks": self._leases.usage(),
            }
        if op == "cancel":
            return {"cancelled": self._cancel(_take(op, args, {"stream_id": str})["stream_id"])}
        if op == "was_cancelled":
            stream_id = _take(op, args, {"stream_id": str})["stream_id"]
            return {"cancelled": self._was_cancelled(stream_id)}
        if op == "lease":
            values = _take(op, args, {"num_tokens": int, "ttl_seconds": float})
            return self._grant(self._leases.lease(**values, now=now))
        if op == "seal":
            types = {"lease_id": str, "num_tokens": int, "digest": str}
            types |= {"num_holders": int, "tail_is_live": bool}
            return self._grant(self._leases.seal(**_take(op, args, types), now=now))
        if op == "share":
            return self._grant(self._leases.share(**_take(op, args, {"lease_id": str}), now=now))
        if op == "renew":
            return self._grant(self._leases.renew(**_take(op, args, {"lease_id": str}), now=now))
        if op == "release":
            self._leases.release(**_take(op, args, {"lease_id": str}), now=now)
            return {}
        if op == "abandon":
            self._leases.abandon(**_take(op, args, {"lease_id": str}), now=now)
            return {}
        raise RequestError(f"control operation {op!r} is unknown")

    def _grant(self, lease: Lease) -> dict[str, Any]:
        target = replace(
            self._arena.target(lease.block_ids, lease.num_tokens),
            lease_id=lease.id,
            expires_at=float(lease.expires_at),
        )
        return {"lease_id": lease.id, "target": target.to_dict()}


class ControlClient:
    """Speaks to the engine process. Thread-safe; calls of several threads take turns.

    Connects at the first call and again after a broken connection, so it may be made before the
    engine is up. Every call is bounded by `timeout_seconds`. Errors of the engine are raised here
    as their own class; EngineError where the engine cannot be reached.
    """

    def __init__(self, path: Path, *, timeout_seconds: float) -> None:
        self.path = path
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a later call opens a new one."""
        with self._lock:
            self._drop()

    def describe(self) -> dict[str, Any]:
        """Facts of the engine (`EngineInfo.to_dict`)."""
        return self._call("describe")

    def stats(self) -> dict[str, Any]:
        """Counters of engine, leases and blocks."""
        return self._call("stats")

    def cancel(self, stream_id: str) -> bool:
        """End a running answer; False where it was over already."""
        return bool(self._call("cancel", stream_id=stream_id)["cancelled"])

    def was_cancelled(self, stream_id: str) -> bool:
        """Whether somebody saw that the client of this fetch went away."""
        return bool(self._call("was_cancelled", stream_id=stream_id)["cancelled"])

    def lease(self, num_tokens: int, *, ttl_seconds: float) -> tuple[str, BlockTarget]:
        """Lease blocks for `num_tokens` tokens.

        Returns:
            Lease id and where to write.

        Raises:
            ArenaFullError: no room now.
        """
        return _granted(self._call("lease", num_tokens=num_tokens, ttl_seconds=float(ttl_seconds)))

    def seal(
        self,
        lease_id: str,
        *,
        num_tokens: int,
        digest: str,
        num_holders: int = 1,
        tail_is_live: bool = False,
    ) -> BlockTarget:
        """Say that the first `num_tokens` tokens are filled (`leases.tokens_digest` of their ids).

        Args:
            lease_id: an open one.
            num_tokens: filled tokens; the blocks behind go back.
            digest: of these tokens.
            num_holders: number of holders that will claim it.
            tail_is_live: somebody may still write behind `num_tokens`.

        Raises:
            LeaseError: unknown, expired, or not open.
        """
        return _granted(
            self._call(
                "seal",
                lease_id=lease_id,
                num_tokens=num_tokens,
                digest=digest,
                num_holders=num_holders,
                tail_is_live=tail_is_live,
            )
        )[1]

    def share(self, lease_id: str) -> BlockTarget:
        """One more holder of a sealed lease.

        Raises:
            LeaseError: unknown, already gone, or still open.
        """
        return _granted(self._call("share", lease_id=lease_id))[1]

    def renew(self, lease_id: str) -> BlockTarget:
        """Start the lease's time again; success proves that it was alive until now.

        Raises:
            LeaseError: unknown or expired; what was read from its blocks must be thrown away.
        """
        return _granted(self._call("renew", lease_id=lease_id))[1]

    def release(self, lease_id: str) -> None:
        """Give the blocks back; nobody may be writing them any more.

        Raises:
            LeaseError: unknown or expired.
        """
        self._call("release", lease_id=lease_id)

    def abandon(self, lease_id: str) -> None:
        """Give up a lease whose writers may still run; its blocks rest before reuse.

        Raises:
            LeaseError: unknown, expired or claimed.
        """
        self._call("abandon", lease_id=lease_id)

    def _call(self, op: str, **args: Any) -> dict[str, Any]:
        line = json.dumps({"op": op, "args": args}, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            fresh = self._socket is None
            try:
                answer = self._exchange(line)
            except (ConnectionError, EOFError) as exc:
                self._drop()
                # A kept connection may be of an engine that was restarted since. What changes
                # state is not sent twice: the first one may have been done.
                if fresh or op not in _IDEMPOTENT:
                    raise self._unreachable(op, exc) from exc
                try:
                    answer = self._exchange(line)
                except (OSError, EOFError) as again:
                    self._drop()
                    raise self._unreachable(op, again) from again
            except (OSError, ValueError) as exc:
                self._drop()
                raise self._unreachable(op, exc) from exc
        if answer.get("ok") is True and isinstance(answer.get("result"), dict):
            return dict(answer["result"])
        kind = getattr(errors, str(answer.get("error")), EngineError)
        if not (isinstance(kind, type) and issubclass(kind, KVFetcherError)):
            kind = EngineError
        raise kind(str(answer.get("message", "the engine gave no reason")))

    def _exchange(self, line: bytes) -> dict[str, Any]:
        deadline = time.monotonic() + self._timeout_seconds
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(self._timeout_seconds)
            self._socket.connect(os.fspath(self.path))
        self._socket.settimeout(self._timeout_seconds)
        self._socket.sendall(line)
        received = bytearray()
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no answer within {self._timeout_seconds:g} s")
            self._socket.settimeout(left)
            part = self._socket.recv(1 << 16)
            if not part:
                raise EOFError("the engine closed the connection")
            received += part
            if len(received) > 16 * MAX_LINE_BYTES:
                raise ValueError("the engine's answer does not end")
        answer = json.loads(received)
        if isinstance(answer, dict):
            return answer
        raise ValueError("the engine's answer is not an object")

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _unreachable(self, op: str, exc: Exception) -> EngineError:
        return EngineError(
            f"engine process at {self.path} did not answer {op!r}: {exc or type(exc).__name__};"
            " is model tensorrt_llm loaded?"
        )


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen(64)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _parse_request(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"a control line must be JSON, got {line[:60]!r}") from exc
    if not isinstance(data, dict) or not isinstance(data.get("op"), str):
        raise RequestError("a control line must be an object with a string 'op'")
    args = data.get("args", {})
    if not isinstance(args, dict):
        raise RequestError("'args' of a control line must be an object")
    return data["op"], args


def _take(op: str, args: dict[str, Any], types: dict[str, type]) -> dict[str, Any]:
    if set(args) != set(types):
        raise RequestError(f"{op} takes the arguments {sorted(types)}, got {sorted(args)}")
    for name, kind in types.items():
        if type(args[name]) is not kind:
            raise RequestError(f"{op}: {name} must be {kind.__name__}, got {args[name]!r}")
    return args


def _granted(result: dict[str, Any]) -> tuple[str, BlockTarget]:
    return str(result["lease_id"]), BlockTarget.from_dict(result["target"])
