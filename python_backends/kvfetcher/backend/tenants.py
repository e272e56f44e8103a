"""Whose request it is, and how much each tenant may ask for."""

from __future__ import annotations

import hmac
import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfetcher.errors import ConfigError, EngineBusyError, PermissionDeniedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.config import TrustConfig
    from kvfetcher.storage.keyring import KeyRing

_SIGNED = re.compile(r"(.{1,256})\.([0-9a-f]{64})", re.DOTALL)
_MAX_TENANTS = 10_000
# A tenant that was silent may ask for so many seconds' worth at once.
_BURST_SECONDS = 10.0


def salt_of(cache_salt: str, config: TrustConfig, ring: KeyRing | None) -> str:
    """The salt that stands for a request's tenant in keys and names.

    Args:
        cache_salt: as the request has it.
        config: section `trust`.
        ring: of the store, if it has one.

    Raises:
        PermissionDeniedError: `trust.cache_salt` is "signed", and the salt is not signed by a holder of
            the keyring's key `proxy`.
        ConfigError: there is no such key.
    """
    salt = cache_salt
    if config.cache_salt == "signed":
        salt = _signed_tenant(cache_salt, ring)
    elif config.cache_salt == "fixed":
        # The lengths keep two pairs from meaning the same text.
        salt = f"{len(config.fixed_salt)}:{config.fixed_salt}{cache_salt}"
    return salt if ring is None else ring.salt(salt)


def sign_tenant(tenant: str, key: bytes) -> str:
    """The `cache_salt` that a trusted proxy sends for a tenant (`trust.cache_salt = "signed"`).

    Example:
        >>> sign_tenant("team-a", bytes(32))[:12]
        'team-a.fe5c1'
    """
    mac = hmac.digest(key, b"kvfetcher tenant 1\0" + tenant.encode(), "sha256").hex()
    return f"{tenant}.{mac}"


def _signed_tenant(cache_salt: str, ring: KeyRing | None) -> str:
    if ring is None or not ring.proxy:
        raise ConfigError('trust.cache_salt = "signed" needs the key "proxy" in store.keys')
    found = _SIGNED.fullmatch(cache_salt)
    if found is None or not hmac.compare_digest(
        sign_tenant(found[1], ring.proxy).encode(), cache_salt.encode()
    ):
        raise PermissionDeniedError
    return found[1]


@dataclass(slots=True)
class _Use:
    """What a tenant may still ask for, and when that was known."""

    requests: float
    num_bytes: float
    at: float


class TenantLimits:
    """Requests and fetched bytes per second of each tenant. One event loop.

    Args:
        config: section `trust`; a limit of 0 is none.
        clock: seconds, monotonic.
    """

    def __init__(self, config: TrustConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests = config.tenant_requests_per_second
        self._bytes = config.tenant_bytes_per_second
        self._clock = clock
        self._tenants: OrderedDict[str, _Use] = OrderedDict()

    def admit(self, salt: str) -> None:
        """Count one request.

        Raises:
            EngineBusyError: the tenant asked for too much lately.
        """
        use = self._use(salt)
        if self._requests and use.requests < 1:
            raise EngineBusyError(
                f"this tenant sends more than {self._requests:g} requests per second"
                " (trust.tenant_requests_per_second); try again later"
            )
        if self._bytes and use.num_bytes <= 0:
            raise EngineBusyError(
                f"this tenant's requests fetch more than {self._bytes:g} bytes per second"
                " (trust.tenant_bytes_per_second); try again later"
            )
        use.requests -= 1

    def charge(self, salt: str, num_bytes: int) -> None:
        """Count bytes that a request brought from the store."""
        self._use(salt).num_bytes -= num_bytes

    def _use(self, salt: str) -> _Use:
        now = self._clock()
        most = _Use(max(1.0, self._requests * _BURST_SECONDS), self._bytes * _BURST_SECONDS, now)
        use = self._tenants.pop(salt, most)
        passed = now - use.at
        use.requests = min(most.requests, use.requests + passed * self._requests)
        use.num_bytes = min(most.num_bytes, use.num_bytes + passed * self._bytes)
        use.at = now
        self._tenants[salt] = use
        if len(self._tenants) > _MAX_TENANTS:
            self._tenants.popitem(last=False)
        return use
