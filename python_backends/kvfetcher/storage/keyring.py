"""Keys of a store: where they come from, which tenant has which, and how salts become names.

`store.keys` says where the keyring is: ``env:NAME`` (an environment variable), ``file:PATH`` (a file
that only its user can read) or ``command:PROGRAM ARGUMENTS`` (its standard output, for a vault). The
keyring is JSON; every key is 32 bytes in Base64:

    {"names": KEY,                              salts become names with it; never change it
     "current": "k2",                           new objects are sealed with this key
     "keys": {"k1": KEY, "k2": KEY},            and these open them
     "proxy": KEY,                              a trusted proxy signs tenants with it (`trust`)
     "public": {"k1": KEY},                     Ed25519 only: keys that check but cannot sign
     "tenants": {DIGITS: {"current": "t1", "keys": {"t1": KEY}}}}

Each tenant's key is derived from the current one and the tenant's digits in the object's name. A tenant
in ``tenants`` has keys of its own. Without its keys its objects can't be read any more: that is how a
tenant is shredded. Nothing here is logged, and no error quotes a key.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
import re
import shlex
import stat
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfetcher.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY_BYTES = 32
MAX_ID_CHARACTERS = 8

_ID = re.compile(r"[a-z0-9_-]{1,8}")
_DIGITS = re.compile(r"[0-9a-f]{16}")
_MAX_RING_BYTES = 4 << 20
_COMMAND_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class KeySet:
    """Keys by id, and which of them seals new objects."""

    current: str
    keys: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys of a store; see the module's text."""

    names: bytes = field(repr=False)
    general: KeySet
    tenants: Mapping[str, KeySet]
    public: Mapping[str, bytes] = field(repr=False)
    proxy: bytes = field(default=b"", repr=False)
    """A trusted proxy signs tenants with it; b"" = there is none."""

    def salt(self, cache_salt: str) -> str:
        """What takes the place of a tenant's salt in names: it can't be guessed without the key.

        Raises:
            UnicodeEncodeError: the salt is not Unicode text.
        """
        return hmac.digest(self.names, b"kvfetcher salt 1\0" + cache_salt.encode(), "sha256").hex()

    def of_tenant(self, digits: str) -> KeySet:
        """The keys of the tenant with these digits in its objects' names ("" = of no tenant)."""
        return self.tenants.get(digits, self.general)

    def derived(self, key: bytes, purpose: str, digits: str) -> bytes:
        """A tenant's key for one purpose: the first block of HKDF-Expand (RFC 5869, SHA-256)."""
        return hmac.digest(key, f"kvfetcher {purpose} 1 {digits}".encode() + b"\x01", "sha256")


def load_keyring(source: str, *, environ: Mapping[str, str] | None = None) -> KeyRing:
    """Read the keyring that `store.keys` names.

    Raises:
        ConfigError: it is not there, not a keyring, or others can read its file.
    """
    kind, _, rest = source.partition(":")
    if kind == "env" and rest:
        text = (os.environ if environ is None else environ).get(rest, "")
        if not text:
            raise ConfigError(f"store.keys: the environment variable {rest} is empty or not set")
    elif kind == "file" and rest:
        text = _read_file(Path(rest).expanduser())
    elif kind == "command" and rest.strip():
        text = _run(rest)
    else:
        raise ConfigError(
            f"store.keys must be env:NAME, file:PATH or command:PROGRAM ARGUMENTS, got {kind + ':'!r}"
        )
    return parse_keyring(text)


def parse_keyring(text: str) -> KeyRing:
    """A keyring from its JSON.

    Raises:
        ConfigError: it is not one; the message says which part, and quotes no key.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError("the keyring of store.keys is not JSON") from None
    known = {"names", "current", "keys", "public", "tenants", "proxy"}
    if not isinstance(data, dict) or not set(data) <= known:
        raise ConfigError(
            f"the keyring of store.keys must be an object with keys of {sorted(known)}"
        )
    tenants = data.get("tenants", {})
    if not isinstance(tenants, dict) or not all(_DIGITS.fullmatch(name) for name in tenants):
        raise ConfigError("the keyring's tenants must be named by 16 digits 0-9 a-f, as in names")
    return KeyRing(
        names=_key("names", data.get("names")),
        general=_key_set("the keyring", data, may_be_empty="public" in data),
        tenants={name: _key_set(f"tenant {name}", part) for name, part in tenants.items()},
        public=_keys("public", data.get("public", {})),
        proxy=_key("proxy", data["proxy"]) if "proxy" in data else b"",
    )


def _key_set(what: str, data: Any, *, may_be_empty: bool = False) -> KeySet:
    if not isinstance(data, dict):
        raise ConfigError(f"{what} must be an object with 'current' and 'keys'")
    keys, current = _keys(what, data.get("keys", {})), data.get("current", "")
    if current not in keys and not (may_be_empty and current == ""):
        raise ConfigError(f"{what}: 'current' must be the id of one of its keys {sorted(keys)}")
    return KeySet(current, keys)


def _keys(what: str, data: Any) -> dict[str, bytes]:
    if not isinstance(data, dict) or not all(_ID.fullmatch(name) for name in data):
        raise ConfigError(
            f"{what}: keys must be an object whose ids have 1 to {MAX_ID_CHARACTERS} characters"
            " a-z 0-9 _ -"
        )
    return {name: _key(f"{what}: key {name}", value) for name, value in data.items()}


def _key(what: str, value: Any) -> bytes:
    try:
        key = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{what} must be {KEY_BYTES} bytes in Base64 (openssl rand -base64 32)")
    return key


def _read_file(path: Path) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            data = file.read(_MAX_RING_BYTES) if stat.S_ISREG(status.st_mode) else b""
    except OSError as exc:
        raise ConfigError(f"store.keys: {path} cannot be read: {exc.strerror}") from exc
    if status.st_mode & 0o077:
        raise ConfigError(f"store.keys: others can read {path}; chmod 600 it")
    return data.decode(errors="replace")


def _run(command: str) -> str:
    try:
        done = subprocess.run(
            shlex.split(command),
            capture_output=True,
            timeout=_COMMAND_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.CalledProcessError as exc:
        # Its output may hold keys.
        raise ConfigError(f"store.keys: the command ended with status {exc.returncode}") from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as exc:
        raise ConfigError(f"store.keys: the command failed: {type(exc).__name__}") from None
    return done.stdout.decode(errors="replace")
