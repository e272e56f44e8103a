"""Leases: no block has two holders, nothing leaks, late writers harm nobody."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.errors import ArenaFullError, LeaseError
from kvfetcher.memory.leases import LeaseClaim, LeaseTable, tokens_digest


@pytest.fixture
def table():
    return LeaseTable(num_blocks=8, tokens_per_block=4)


def test_life_of_a_lease(table):
    lease = table.lease(10, 5.0, now=0.0)
    assert len(lease.block_ids) == 3
    assert lease.state == "open"
    table.seal(lease.id, 10, "digest", now=1.0)
    claimed = table.claim(lease.id, now=2.0)
    assert (claimed.state, claimed.tokens_digest, claimed.num_tokens) == ("claimed", "digest", 10)
    assert table.usage()["claimed"] == 3
    table.release(lease.id, now=3.0, is_claimer=True)
    assert table.usage() == {
        "total": 8, "free": 8, "open": 0, "sealed": 0, "claimed": 0, "resting": 0
    }  # fmt: skip


def test_full_arena_refuses_and_counts(table):
    table.lease(20, 5.0, now=0.0)
    with pytest.raises(ArenaFullError, match="need 4 arena blocks, 3 of 8 are free"):
        table.lease(13, 5.0, now=0.0)
    assert table.counts.refused_full == 1
    assert len(table.lease(12, 5.0, now=0.0).block_ids) == 3


def test_sealing_fewer_tokens_gives_the_rest_back(table):
    lease = table.lease(32, 5.0, now=0.0)
    sealed = table.seal(lease.id, 5, "d", now=0.0)
    assert sealed.block_ids == lease.block_ids[:2]
    assert table.usage()["free"] == 6


def test_open_lease_that_expires_rests_before_reuse(table):
    lease = table.lease(32, 5.0, now=0.0)
    with pytest.raises(ArenaFullError):
        table.lease(1, 5.0, now=9.9)
    assert table.usage()["resting"] == 8
    with pytest.raises(LeaseError, match="unknown, expired or released"):
        table.seal(lease.id, 32, "d", now=9.9)
    assert len(table.lease(32, 5.0, now=10.0).block_ids) == 8
    assert table.counts.expired == 1


def test_sealed_lease_that_expires_is_free_at_once(table):
    lease = table.lease(32, 5.0, now=0.0)
    table.seal(lease.id, 32, "d", now=4.0)
    with pytest.raises(ArenaFullError):
        table.lease(1, 5.0, now=8.9)  # sealing started its time again
    table.lease(32, 5.0, now=9.0)
    with pytest.raises(LeaseError):
        table.claim(lease.id, now=9.0)


def test_claimed_lease_never_expires(table):
    lease = table.lease(32, 5.0, now=0.0)
    table.seal(lease.id, 32, "d", now=0.0)
    table.claim(lease.id, now=0.0)
    assert table.expire(1e6) == 0
    table.release(lease.id, now=1e6, is_claimer=True)
    assert table.usage()["free"] == 8


def test_abandoned_blocks_rest_and_released_do_not(table):
    first, second = table.lease(16, 5.0, now=0.0), table.lease(16, 5.0, now=0.0)
    table.abandon(first.id, now=1.0)
    table.release(second.id, now=1.0)
    assert (table.usage()["resting"], table.usage()["free"]) == (4, 4)
    table.expire(6.0)
    assert table.usage()["free"] == 8


def test_renew_keeps_a_lease_and_tells_that_it_lives(table):
    lease = table.lease(4, 5.0, now=0.0)
    table.renew(lease.id, now=4.0)
    assert table.renew(lease.id, now=8.0).expires_at == 13.0
    with pytest.raises(LeaseError):
        table.renew(lease.id, now=13.0)


@pytest.mark.parametrize("verb", ["seal", "share", "claim", "release", "renew", "abandon"])
def test_unknown_lease_is_refused(table, verb):
    args = ("nope", 1, "d") if verb == "seal" else ("nope",)
    with pytest.raises(LeaseError, match=f"cannot {verb}"):
        getattr(table, verb)(*args, now=0.0)


def test_wrong_states_are_refused(table):
    lease = table.lease(4, 5.0, now=0.0)
    with pytest.raises(LeaseError, match="is open, not sealed"):
        table.claim(lease.id, now=0.0)
    with pytest.raises(LeaseError, match="1 to 4 tokens, sealed with 5"):
        table.seal(lease.id, 5, "d", now=0.0)
    table.seal(lease.id, 4, "d", now=0.0)
    with pytest.raises(LeaseError, match="is sealed, not open"):
        table.seal(lease.id, 4, "d", now=0.0)
    table.claim(lease.id, now=0.0)
    with pytest.raises(LeaseError, match="is claimed, not sealed"):
        table.claim(lease.id, now=0.0)
    for verb in (table.abandon, table.release):
        with pytest.raises(LeaseError, match="only its claimer"):
            verb(lease.id, now=0.0)


@pytest.mark.parametrize(("tokens", "ttl"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, 1e9)])
def test_senseless_leases_are_refused(table, tokens, ttl):
    with pytest.raises(LeaseError, match="at least 1 token"):
        table.lease(tokens, ttl, now=0.0)


steps = st.lists(
    st.tuples(
        st.sampled_from(["lease", "seal", "claim", "release", "abandon", "renew", "wait"]),
        st.integers(1, 12),
    ),
    max_size=60,
)


@given(steps)
def test_no_block_is_ever_held_twice_and_none_is_lost(actions):
    table = LeaseTable(num_blocks=6, tokens_per_block=2)
    now, held = 0.0, {}
    for verb, number in actions:
        lease_id = sorted(held)[number % len(held)] if held else "none"
        try:
            if verb == "lease":
                lease = table.lease(number, 5.0, now=now)
                held[lease.id] = lease
            elif verb == "wait":
                now += number
            elif verb == "seal":
                held[lease_id] = table.seal(lease_id, number, "d", now=now)
            elif verb in ("release", "abandon"):
                getattr(table, verb)(lease_id, now=now)
                del held[lease_id]
            elif lease_id != "none":
                held[lease_id] = getattr(table, verb)(lease_id, now=now)
        except LeaseError:
            pass
        except ArenaFullError:
            assert verb == "lease"
        held = {
            i: lease for i, lease in held.items()
            if lease.state == "claimed" or lease.expires_at > now
        }  # fmt: skip
        blocks = [b for lease in held.values() for b in lease.block_ids]
        assert len(blocks) == len(set(blocks))
        table.expire(now)
        usage = table.usage()
        assert usage["total"] == sum(v for k, v in usage.items() if k != "total")
        assert usage["open"] + usage["sealed"] + usage["claimed"] == len(blocks)
    table.expire(now + 5.0)
    table.expire(now + 10.0)
    assert table.usage()["free"] == 6 - table.usage()["claimed"]


def test_the_last_of_several_holders_frees_the_blocks(table):
    lease = table.lease(8, 5.0, now=0.0)
    table.seal(lease.id, 8, "d", now=0.0, num_holders=2)
    assert table.share(lease.id, now=0.0).state == "sealed"
    assert table.claim(lease.id, now=0.0).state == "sealed"
    assert table.claim(lease.id, now=0.0).state == "sealed"
    table.release(lease.id, now=0.0)  # the third holder goes without claiming
    with pytest.raises(LeaseError, match="only its claimer"):
        table.release(lease.id, now=0.0)
    table.release(lease.id, now=0.0, is_claimer=True)
    assert table.usage()["claimed"] == 2
    assert table.share(lease.id, now=0.0).state == "sealed"  # late, but the blocks are still there
    table.abandon(lease.id, now=0.0)
    table.release(lease.id, now=0.0, is_claimer=True)
    assert table.usage()["free"] == 8


def test_holders_that_never_claim_expire_and_readers_go_on(table):
    lease = table.lease(8, 5.0, now=0.0)
    table.seal(lease.id, 8, "d", now=0.0, num_holders=3)
    table.claim(lease.id, now=1.0)
    assert table.expire(5.0) == 1
    assert (table.usage()["claimed"], table.usage()["free"]) == (2, 6)
    with pytest.raises(LeaseError, match="is claimed, not sealed"):
        table.claim(lease.id, now=6.0)
    table.release(lease.id, now=9.0, is_claimer=True)
    assert table.usage()["free"] == 8


def test_an_open_lease_is_not_shared_and_needs_a_holder(table):
    lease = table.lease(8, 5.0, now=0.0)
    with pytest.raises(LeaseError, match="is open, not sealed"):
        table.share(lease.id, now=0.0)
    with pytest.raises(LeaseError, match="at least 1 holder"):
        table.seal(lease.id, 8, "d", now=0.0, num_holders=0)


def test_a_live_tail_rests_before_anybody_gets_it(table):
    lease = table.lease(32, 5.0, now=0.0)
    table.seal(lease.id, 8, "d", now=1.0, tail_is_live=True)
    assert table.usage() == {
        "total": 8, "free": 0, "open": 0, "sealed": 2, "claimed": 0, "resting": 6
    }  # fmt: skip
    with pytest.raises(ArenaFullError):
        table.lease(4, 5.0, now=5.9)
    table.lease(4, 5.0, now=6.0)


@given(st.lists(st.sampled_from(["share", "claim", "release", "claimer"]), max_size=40))
def test_a_shared_lease_lives_exactly_as_long_as_its_holders(actions):
    table = LeaseTable(num_blocks=4, tokens_per_block=4)
    lease = table.lease(8, 5.0, now=0.0)
    table.seal(lease.id, 8, "d", now=0.0)
    unclaimed, claims = 1, 0
    for action in actions:
        try:
            if action == "share":
                table.share(lease.id, now=0.0)
                unclaimed += 1
            elif action == "claim":
                table.claim(lease.id, now=0.0)
                unclaimed, claims = unclaimed - 1, claims + 1
            else:
                table.release(lease.id, now=0.0, is_claimer=action == "claimer")
                if action == "claimer" and claims:
                    claims -= 1
                else:
                    unclaimed -= 1
        except LeaseError:
            assert not unclaimed
        assert table.usage()["free"] == (2 if unclaimed or claims else 4)
        if not unclaimed and not claims:
            return


def test_claim_text_round_trips_and_is_checked():
    claim = LeaseClaim("id", 256, "gen")
    assert LeaseClaim.from_json(claim.to_json()) == claim
    assert LeaseClaim.from_json("") is None
    for text in ("{", "[]", "{}", '{"lease_id":"a","num_tokens":0,"generation":"g"}',
                 '{"lease_id":1,"num_tokens":2,"generation":"g"}', "3"):  # fmt: skip
        with pytest.raises(LeaseError):
            LeaseClaim.from_json(text)


def test_tokens_digest_is_over_little_endian_int32():
    assert tokens_digest([1, 258]) == hashlib.sha256(b"\1\0\0\0\2\1\0\0").hexdigest()
