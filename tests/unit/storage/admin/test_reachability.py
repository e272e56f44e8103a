from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.format.container import parse_header
from kvfetcher.format.keys import parse_object_name
from kvfetcher.storage.admin.reachability import (
    Holding,
    Survey,
    chunks_from,
    chunks_of_prompts,
    plan_gc,
)
from kvfetcher.storage.base import ObjectInfo
from support.chunks import CHUNK_TOKENS, chain

LONG = list(range(1, 21))  # five chunks
FORK = [*LONG[:8], 70, 71, 72, 73, 74, 75, 76, 77]  # shares two chunks with LONG
OTHER = [9] * 8


def holdings(*prompts, salt="", age=0.0, now=1e6):
    found = {}
    for prompt in prompts:
        for name, data in chain(prompt, salt=salt).items():
            header = parse_header(data)
            found[name] = Holding(
                ObjectInfo(name, len(data), now - age),
                parse_object_name(name).scope,
                header.chunk_key,
                header.parent_key,
                header.first_position,
                header.token_ids,
            )
    return list(found.values())


def names_of(prompt, start=0, salt=""):
    return list(chain(prompt, salt=salt))[start:]


def plan(chunks, *, damaged=(), grace=10.0, ttl=0.0, now=1e6):
    survey = Survey(chunks=chunks, damaged=[(ObjectInfo(name, 1, 0), "?") for name in damaged])
    result = plan_gc(survey, now_seconds=now, grace_seconds=grace, ttl_seconds=ttl)
    return sorted(c.info.name for c in result.expired), sorted(
        c.info.name for c in result.unreachable
    )


def test_whole_chains_stay():
    assert plan(holdings(LONG, FORK, OTHER, age=1000)) == ([], [])


def test_what_follows_a_missing_chunk_is_unreachable():
    chunks = [c for c in holdings(LONG, FORK, age=1000) if c.info.name != names_of(LONG)[1]]
    assert plan(chunks) == ([], sorted({*names_of(LONG, 2), *names_of(FORK, 2)}))


def test_young_chunks_have_grace():
    chunks = [c for c in holdings(LONG, age=5) if c.info.name != names_of(LONG)[1]]
    assert plan(chunks, grace=10.0) == ([], [])
    assert plan(chunks, grace=5.0) == ([], sorted(names_of(LONG, 2)))


def test_what_follows_a_damaged_chunk_stays():
    bad = names_of(LONG)[1]
    chunks = [c for c in holdings(LONG, age=1000) if c.info.name != bad]
    assert plan(chunks, damaged=[bad, "stray"]) == ([], [])


def test_old_chunks_expire_and_take_what_follows_with_them():
    old, young = holdings(LONG[:8], age=1000), holdings(LONG, age=100)[2:]
    assert plan(old + young, ttl=500.0) == (sorted(names_of(LONG[:8])), sorted(names_of(LONG, 2)))
    assert plan(old + young, ttl=0.0) == ([], [])


def test_a_parent_of_another_tenant_does_not_help():
    mine = [c for c in holdings(LONG, salt="a", age=1000) if c.first_position]
    assert len(plan(mine + holdings(LONG, salt="b", age=1000))[1]) == 4


def test_a_chunk_and_what_continues_it():
    chunks = holdings(LONG, FORK, OTHER)

    def found(name):
        return sorted(c.info.name for c in chunks_from(chunks, name))

    assert found(names_of(LONG)[3]) == sorted(names_of(LONG, 3))
    assert found(names_of(LONG)[1]) == sorted({*names_of(LONG, 1), *names_of(FORK, 1)})
    assert found("stray") == []
    chunks = [c for c in chunks if c.info.name != names_of(LONG)[1]]
    assert found(names_of(LONG)[1]) == sorted({*names_of(LONG, 2), *names_of(FORK, 2)})


@given(
    st.lists(st.integers(1, 2), max_size=13), st.lists(st.integers(1, 2), min_size=1, max_size=13)
)
def test_chunks_of_prompts_are_those_whose_tokens_begin_so(other, wanted):
    prompts = [LONG, FORK, [*wanted, 1, 2, 1, 2, 1], other]
    expected = {
        name
        for prompt in prompts
        for index, name in enumerate(chain(prompt))
        if prompt[: (index + 1) * CHUNK_TOKENS][: len(wanted)] == wanted
        and (index + 1) * CHUNK_TOKENS >= len(wanted)
    }
    found = chunks_of_prompts(holdings(*prompts), wanted)
    assert {chunk.info.name for chunk in found} == expected
