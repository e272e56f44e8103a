"""Permits: what proves to one process of a server run that another process of it issued a text.

Models of a Triton repository can be called by everybody who reaches the port. Whatever names memory
or stands for a decision of another model therefore travels as a *sealed* text: a permit, a space and
the text. The permit is an HMAC-SHA256 with a key of this server run over the right that it gives,
its expiry, a random number, the text, and what the receiver knows besides (the token ids). It is
checked before anything is parsed, opened or looked up, and every refusal reads the same.

The key lies in the run folder (0700, the file 0600), so that the processes of the server can read it
and no other user. A new run has a new key.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvfetcher.errors import ConfigError, PermissionDeniedError
from kvfetcher.memory.control import run_dir

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Right = Literal["fetch", "generate", "read", "write", "save", "planes"]
"""What a permit is for: `fetch` to kv_fetch, `generate` to tensorrt_llm, `write` to kv_decode and
kv_restore, `read` to kv_encode, `save` to kv_save, `planes` to kv_restore."""

KEY_NAME = "permits.key"
KEY_BYTES = 32
PERMIT_SECONDS = 600.0
"""How long a permit holds where its issuer says nothing else: longer than a request may wait
between two steps of the ensemble."""

_PERMIT = re.compile(r"(0|[1-9a-f][0-9a-f]{0,13})\.([0-9a-f]{32})\.([0-9a-f]{64})\Z")
_MAX_USED = 1 << 18


class _Parts(NamedTuple):
    expires_ms: int
    nonce: str
    mac: str


class Permits:
    """Issues and checks permits. Thread-safe.

    Args:
        key: key of the server run.
        folder: the run folder, where arenas are published; None = `control.run_dir()`.
        clock: seconds, monotonic, the same in all processes of the machine.

    Example:
        >>> permits = Permits(bytes(32))
        >>> permits.open("write", permits.seal("write", "blocks 1 to 4"))
        'blocks 1 to 4'
    """

    def __init__(
        self,
        key: bytes,
        *,
        folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._key = key
        self._folder = folder
        self._clock = clock
        self._used: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def of_run(cls, folder: Path | None = None) -> Permits:
        """Those of the server whose run folder this is (default `control.run_dir()`).

        Raises:
            ConfigError: the key cannot be made or read, or others can read it.
        """
        folder = run_dir() if folder is None else folder
        return cls(run_key(folder), folder=folder)

    @property
    def folder(self) -> Path:
        """The run folder whose processes these permits are for."""
        return run_dir() if self._folder is None else self._folder

    def seal(
        self, right: Right, text: str, *besides: bytes, expires_at: float | None = None
    ) -> str:
        """The text with a permit in front.

        Args:
            right: what the text may be used for.
            text: what is signed.
            besides: what the receiver must know, too, in the same order.
            expires_at: seconds of the clock; None = `PERMIT_SECONDS` from now.
        """
        until = self._clock() + PERMIT_SECONDS if expires_at is None else expires_at
        # Of 14 hex digits: more milliseconds than a machine is up.
        expires_ms, nonce = max(0, int(until * 1e3)), secrets.token_hex(16)
        mac = self._mac(right, expires_ms, nonce, text.encode(), besides)
        return f"{expires_ms:x}.{nonce}.{mac} {text}"

    def open(self, right: Right, sealed: str, *besides: bytes, once: bool = False) -> str:
        """The text of `seal`, checked.

        Args:
            right: that the caller exercises.
            sealed: from a request.
            besides: as given to `seal`.
            once: refuse it the next time.

        Raises:
            PermissionDeniedError: not issued by this server run for this right and these facts, over,
                or used before. Which of them is not told.
        """
        permit, _, text = sealed.partition(" ")
        found = _PERMIT.match(permit)
        if found is None:
            raise PermissionDeniedError
        parts = _Parts(int(found[1], 16), found[2], found[3])
        try:
            data = text.encode()
        except UnicodeEncodeError:  # a lone surrogate, which no sealed text has
            raise PermissionDeniedError from None
        mac = self._mac(right, parts.expires_ms, parts.nonce, data, besides)
        now_ms = int(self._clock() * 1e3)
        if not hmac.compare_digest(mac, parts.mac) or parts.expires_ms < now_ms:
            raise PermissionDeniedError
        if once:
            self._use(parts, now_ms)
        return text

    def tenant(self, salt: str) -> str:
        """A name of the tenant whose salt this is; tells nothing of the salt without the key."""
        return hmac.digest(self._key, b"kvfetcher tenant " + salt.encode(), "sha256").hex()[:32]

    def _use(self, parts: _Parts, now_ms: int) -> None:
        with self._lock:
            used = self._used
            while used and next(iter(used.values())) < now_ms:
                used.popitem(last=False)
            # What was issued here alone gets so far; a full memory refuses instead of forgetting.
            if parts.nonce in used or len(used) >= _MAX_USED:
                raise PermissionDeniedError
            used[parts.nonce] = parts.expires_ms

    def _mac(
        self, right: str, expires_ms: int, nonce: str, text: bytes, besides: tuple[bytes, ...]
    ) -> str:
        # The lengths in front make the parts unambiguous.
        parts = (text, *besides)
        head = f"kvfetcher 1 {right} {expires_ms} {nonce} {','.join(str(len(p)) for p in parts)}|"
        return hmac.digest(self._key, b"".join((head.encode(), *parts)), "sha256").hex()


def run_key(folder: Path) -> bytes:
    """The key of the server whose run folder this is; made by whoever needs it first.

    Raises:
        ConfigError: it cannot be made or read, is not of 32 bytes, or others can read it.
    """
    path = folder / KEY_NAME
    try:
        if not path.exists():
            _make_key(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            status, key = os.fstat(descriptor), os.read(descriptor, KEY_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise ConfigError(
            f"the run's key {path} cannot be made or read: {exc.strerror}; the run folder must be"
            " on a file system that you can write to"
        ) from exc
    if len(key) != KEY_BYTES or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"the run's key {path} must be {KEY_BYTES} bytes that only you can read; stop the"
            " server and remove the run folder"
        )
    return key


def _make_key(path: Path) -> None:
    """Whole or not at all: a process that comes meanwhile takes the one that is there first."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(partial)
    finally:
        os.close(descriptor)
        partial.unlink()
