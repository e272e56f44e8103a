"""Whose request it is, and how much each tenant gets."""

import base64
import json

import pytest

from kvfetcher.backend import tenants
from kvfetcher.backend.tenants import TenantLimits, salt_of, sign_tenant
from kvfetcher.config import TrustConfig
from kvfetcher.errors import ConfigError, EngineBusyError, PermissionDeniedError
from kvfetcher.storage.keyring import parse_keyring


def key(number):
    return base64.b64encode(bytes([number]) * 32).decode()


def ring(**more):
    data = {"names": key(1), "current": "k", "keys": {"k": key(2)}} | more
    return parse_keyring(json.dumps(data))


def test_a_clients_salt_stands_for_itself_or_for_a_keyed_hash_of_it():
    assert salt_of("a", TrustConfig(), None) == "a"
    assert salt_of("a", TrustConfig(), ring()) == ring().salt("a")


def test_only_a_salt_that_the_proxy_signed_is_taken():
    signed = TrustConfig(cache_salt="signed")
    with_proxy = ring(proxy=key(7))
    good = sign_tenant("team.a", bytes([7]) * 32)
    assert salt_of(good, signed, with_proxy) == with_proxy.salt("team.a")
    told = set()
    for bad in (
        "", "team.a", "team.b." + good[-64:], sign_tenant("team.a", bytes(32)), good + "0",
        good.upper(), "." + good[-64:], "\u00e9." + "0" * 64,
    ):  # fmt: skip
        with pytest.raises(PermissionDeniedError) as refused:
            salt_of(bad, signed, with_proxy)
        told.add(str(refused.value))
    assert len(told) == 1
    for without in (None, ring()):
        with pytest.raises(ConfigError, match="proxy"):
            salt_of(good, signed, without)


def test_a_fixed_salt_cannot_be_left_by_a_salt():
    of_a, of_ab = (TrustConfig(cache_salt="fixed", fixed_salt=s) for s in ("a", "ab"))
    assert len({salt_of(s, c, None) for c in (of_a, of_ab) for s in ("", "b", "1:a")}) == 6
    assert salt_of("b", of_a, None) != salt_of("", of_ab, None)
    for wrong in ({"cache_salt": "fixed"}, {"fixed_salt": "a"}):
        with pytest.raises(ConfigError, match="go together"):
            TrustConfig(**wrong)


def test_each_tenant_has_its_rate_of_requests():
    now = [0.0]
    limits = TenantLimits(TrustConfig(tenant_requests_per_second=2.0), clock=lambda: now[0])
    for _ in range(20):
        limits.admit("a")
    with pytest.raises(EngineBusyError, match=r"trust\.tenant_requests_per_second"):
        limits.admit("a")
    limits.admit("b")
    now[0] = 0.5
    limits.admit("a")
    with pytest.raises(EngineBusyError):
        limits.admit("a")


def test_each_tenant_has_its_rate_of_bytes():
    now = [0.0]
    limits = TenantLimits(TrustConfig(tenant_bytes_per_second=100.0), clock=lambda: now[0])
    limits.admit("a")
    limits.charge("a", 1500)
    with pytest.raises(EngineBusyError, match=r"trust\.tenant_bytes_per_second"):
        limits.admit("a")
    limits.admit("b")
    now[0] = 5.1
    limits.admit("a")


def test_limits_are_off_by_default_and_remember_a_bounded_number(monkeypatch):
    limits = TenantLimits(TrustConfig())
    for _ in range(1000):
        limits.admit("a")
        limits.charge("a", 1 << 40)
    monkeypatch.setattr(tenants, "_MAX_TENANTS", 10)
    for number in range(100):
        limits.admit(str(number))
    assert len(limits._tenants) == 10
