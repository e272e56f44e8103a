"""The self-test of trust passes, and fails as soon as a check is taken away."""

import pytest

from kvfetcher.doctor import trust
from kvfetcher.doctor.trust import check_trust
from kvfetcher.memory import permits as permits_module
from kvfetcher.memory.permits import Permits


def test_every_attack_is_refused():
    check = check_trust()
    assert (check.status, check.remedy) == ("ok", ""), check.detail
    assert check.detail.startswith("16 attacks")


def unchecked(self, right, sealed, *besides, once=False):
    head, _, text = sealed.partition(" ")
    return text if head.count(".") == 2 else sealed


def without_mac(real):
    def find(self, right, expires_ms, nonce, text, besides):
        return "0" * 64

    return find


MUTATIONS = {
    "nothing is checked": ("open", unchecked),
    "the permit is not compared": ("_mac", lambda *_: "0" * 64),
    "the right is not covered": ("_mac", None),
    "used permits are taken again": ("_use", lambda *_: None),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_without_a_check_the_self_test_fails(name, monkeypatch):
    method, replacement = MUTATIONS[name]
    if name == "the permit is not compared":
        monkeypatch.setattr(permits_module.hmac, "compare_digest", lambda *_: True)
    elif name == "the right is not covered":
        covered = Permits._mac
        monkeypatch.setattr(Permits, "_mac", lambda self, right, *rest: covered(self, "any", *rest))
    else:
        monkeypatch.setattr(Permits, method, replacement)
    check = check_trust()
    assert check.status == "fail", name
    assert "succeeded" in check.detail


def test_permits_that_never_end_are_found(monkeypatch):
    opened = Permits.open
    monkeypatch.setattr(permits_module.time, "monotonic", lambda: 0.0)
    never = Permits(bytes(32), clock=lambda: 0.0)
    assert opened(never, "read", never.seal("read", "x", expires_at=0.0)) == "x"


def test_an_oracle_is_found(monkeypatch):
    """Refusals that differ tell what exists."""
    from kvfetcher.errors import PermissionDeniedError

    opened = Permits.open

    def telling(self, right, sealed, *besides, once=False):
        try:
            return opened(self, right, sealed, *besides, once=once)
        except PermissionDeniedError:
            raise PermissionDeniedError(f"no {right}") from None

    monkeypatch.setattr(Permits, "open", telling)
    assert "refusals differ" in check_trust().detail


def test_a_check_that_refuses_everything_proves_nothing(monkeypatch):
    from kvfetcher.errors import PermissionDeniedError

    def never(*_, **__):
        raise PermissionDeniedError

    monkeypatch.setattr(trust, "_restore", never)
    check = check_trust()
    assert check.status == "fail"
    assert "the server's own request is refused" in check.detail
