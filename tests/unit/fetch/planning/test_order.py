from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.fetch.planning.order import Waiting, charge, next_requests

entries = st.lists(
    st.builds(
        Waiting,
        request_id=st.integers(0, 10**6),
        tenant=st.sampled_from("abc"),
        arrived_seconds=st.floats(0, 100),
        fetch_seconds=st.floats(0.001, 60),
    ),
    max_size=12,
    unique_by=lambda entry: entry.request_id,
)


def order(waiting, *, now=0.0, num_slots=99, served=None, ageing=1.0):
    found = next_requests(
        waiting, now=now, num_slots=num_slots, served_seconds=served or {}, ageing=ageing
    )
    return [entry.request_id for entry in found]


@given(entries, st.integers(0, 14), st.floats(100, 200))
def test_each_request_is_chosen_at_most_once_and_places_are_kept(waiting, num_slots, now):
    chosen = order(waiting, now=now, num_slots=num_slots)
    assert len(chosen) == len(set(chosen)) == min(num_slots, len(waiting))
    assert set(chosen) <= {entry.request_id for entry in waiting}


@given(entries, st.randoms())
def test_the_order_of_arrival_of_the_list_does_not_matter(waiting, random):
    shuffled = random.sample(waiting, len(waiting))
    assert order(waiting, now=200.0) == order(shuffled, now=200.0)


def test_short_fetches_pass_long_ones():
    assert order([Waiting(1, "a", 0.0, 9.0), Waiting(2, "a", 1.0, 1.0)], now=1.0) == [2, 1]


def test_nobody_waits_for_ever():
    old = Waiting(0, "a", 0.0, 30.0)
    now, fresh = 0.0, 1
    while order([old, Waiting(fresh, "a", now, 1.0)], now=now, num_slots=1) != [0]:
        now, fresh = now + 1.0, fresh + 1
        assert now < 31.0


def test_tenants_share_by_time_not_by_requests():
    many = [Waiting(i, "many", 0.0, 1.0) for i in range(20)]
    few = [Waiting(100 + i, "few", 0.5, 4.0) for i in range(3)]
    served, waiting, started = {}, [*many, *few], []
    while waiting:
        (entry,) = next_requests(waiting, now=1.0, num_slots=1, served_seconds=served, ageing=1.0)
        waiting.remove(entry)
        served = charge(served, entry, [w.tenant for w in waiting])
        started.append(entry)
    shares = {"many": 0.0, "few": 0.0}
    for entry in started[: started.index(few[-1])]:
        shares[entry.tenant] += entry.fetch_seconds
    assert abs(shares["many"] - shares["few"]) <= 4.0


def test_a_tenant_that_was_away_gets_no_credit_and_no_debt():
    served = {}
    for index in range(5):
        served = charge(served, Waiting(index, "a", 0.0, 10.0), ["a", "b"])
    assert served == {"a": 50.0, "b": 0.0}
    served = charge(served, Waiting(9, "a", 0.0, 1.0), ["a"])
    assert served == {"a": 1.0}
    served = charge(served, Waiting(10, "b", 0.0, 1.0), ["a", "b"])
    assert served == {"a": 0.0, "b": 1.0}


@given(entries)
def test_balances_stay_small_and_positive(waiting):
    served = {}
    for entry in waiting:
        served = charge(served, entry, ["a", "b", "c"])
        assert set(served) <= {"a", "b", "c"}
        assert min(served.values()) >= 0
