"""The paged engine behind the KV connector: a hit gives the tokens and the KV bytes of computing."""

import asyncio
import concurrent.futures
import contextlib

import numpy as np
import pytest

from kvfetcher.engines.connector import engine as connected
from kvfetcher.engines.connector.copies import BlockCopier
from kvfetcher.engines.connector.link import OwnerLink
from kvfetcher.engines.connector.worker import ConnectorWorker
from kvfetcher.engines.hf.loader import load_model
from kvfetcher.engines.paged.model import PagedModel
from kvfetcher.errors import EngineBusyError, EngineError, RequestError
from kvfetcher.memory.leases import LeaseClaim
from support.engine_rig import CHUNK, lease_with, saved_values, some_ids
from support.paged_rig import PagedRig


@pytest.fixture
def paged_of(loaded, tmp_path):
    with contextlib.ExitStack() as stack:

        def make(**options):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            rig = PagedRig(options.pop("loaded", loaded), folder, **options)
            stack.callback(rig.close)
            return rig

        yield make


@pytest.fixture
def paged(paged_of):
    return paged_of()


def claim_of(rig, ids, values):
    return LeaseClaim(lease_with(rig, ids, values), len(ids), rig.arena.generation)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("prompt_tokens", [40, 64, 65, 79, 97])
async def test_hit_gives_the_same_tokens_and_kv_bytes(paged_of, layout, prompt_tokens):
    rig = paged_of(layout=layout)
    assert rig.engine.stats()["kv_layouts"] == [layout]
    ids = some_ids(prompt_tokens)
    full = await rig.run(ids, max_tokens=40, min_length=40, save=True)
    values = saved_values(rig, full.ticket)
    shared = prompt_tokens // CHUNK * CHUNK
    claim = claim_of(rig, ids[:shared], values[:, :, :, :shared])
    hit = await rig.run(ids, max_tokens=40, min_length=40, save=True, lease=claim)
    assert hit.ids == full.ids
    assert hit.timings[0].lease_error == ""
    assert hit.timings[0].cached_tokens == min(shared, (prompt_tokens - 1) // 8 * 8)
    np.testing.assert_array_equal(saved_values(rig, hit.ticket), values[:, :, :, shared:])


def is_empty(rig):
    return rig.leases.usage()["free"] == rig.arena.num_blocks


async def until_empty(rig):
    async with asyncio.timeout(10):
        while not is_empty(rig):
            await asyncio.sleep(0.005)


async def test_leased_kv_is_what_attention_sees(paged):
    ids = some_ids(70)
    plain = await paged.run(ids, save=True)
    values = saved_values(paged, plain.ticket)
    other = await paged.run(ids, lease=claim_of(paged, ids[:64], values[:, :, ::-1, :64]))
    assert other.ids != plain.ids


async def test_tokens_are_those_of_the_plain_torch_engine(paged, rig):
    ids = some_ids(75)
    assert (await paged.run(ids, max_tokens=30)).ids == (await rig.run(ids, max_tokens=30)).ids


@pytest.mark.parametrize("kv_dtype", ["float16", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
async def test_other_pool_types(model_folder, paged_of, kv_dtype, layout):
    rig = paged_of(loaded=load_model(model_folder, device="cpu", kv_dtype=kv_dtype), layout=layout)
    ids = some_ids(97)
    full = await rig.run(ids, max_tokens=20, save=True)
    values = saved_values(rig, full.ticket)
    hit = await rig.run(ids, max_tokens=20, lease=claim_of(rig, ids[:96], values[:, :, :, :96]))
    assert hit.ids == full.ids
    assert hit.timings[0].cached_tokens == 96


@pytest.mark.parametrize("tokens_per_block", [1, 4, 16, 32])
async def test_other_block_sizes(paged_of, tokens_per_block):
    rig = paged_of(engine={"tokens_per_block": tokens_per_block})
    ids = some_ids(80)
    full = await rig.run(ids, max_tokens=20, save=True)
    values = saved_values(rig, full.ticket)
    hit = await rig.run(ids, max_tokens=20, lease=claim_of(rig, ids[:64], values[:, :, :, :64]))
    assert hit.ids == full.ids
    assert hit.timings[0].cached_tokens == 64


@pytest.mark.parametrize("async_load_tokens", [0, 1])
async def test_20_requests_at_once_are_what_each_is_alone(paged_of, async_load_tokens):
    rig = paged_of(num_bytes=8 << 20, connector={"async_load_tokens": async_load_tokens})
    prompts = [some_ids(50 + 7 * i, seed=i) for i in range(20)]
    alone = [await rig.run(ids, max_tokens=12, save=True) for ids in prompts]
    values = [saved_values(rig, output.ticket) for output in alone]
    claims = [
        claim_of(rig, ids[: len(ids) // CHUNK * CHUNK], kept[:, :, :, : len(ids) // CHUNK * CHUNK])
        for ids, kept in zip(prompts, values, strict=True)
    ]
    together = await asyncio.gather(
        *(
            rig.run(ids, max_tokens=12, lease=claim, save=True)
            for ids, claim in zip(prompts, claims, strict=True)
        )
    )
    for ids, one, other in zip(prompts, alone, together, strict=True):
        assert other.ids == one.ids
        assert other.timings[0].cached_tokens >= (len(ids) // CHUNK) * CHUNK - 8
        for ticket in other.tickets:  # only what the answer completed
            assert ticket.first_chunk_index == len(ids) // CHUNK
            rig.leases.release(ticket.lease_id, now=rig.now)
    for output in alone:
        rig.leases.release(output.ticket.lease_id, now=rig.now)
    await until_empty(rig)
    assert rig.engine.stats()["connector"]["open"] == 0


async def test_equal_prompts_at_once_each_get_their_lease(paged_of):
    rig = paged_of(num_bytes=8 << 20)
    ids = some_ids(70)
    full = await rig.run(ids, save=True)
    values = saved_values(rig, full.ticket)
    rig.leases.release(full.ticket.lease_id, now=rig.now)
    claims = [claim_of(rig, ids[:64], values[:, :, :, :64]) for _ in range(6)]
    outputs = await asyncio.gather(*(rig.run(ids, lease=claim) for claim in claims))
    assert [output.ids for output in outputs] == [full.ids] * 6
    assert all(output.timings[0].cached_tokens == 64 for output in outputs)
    await until_empty(rig)


async def test_own_blocks_come_before_the_lease(paged_of):
    rig = paged_of(connector={"device_reuse": True})
    ids = some_ids(75)
    full = await rig.run(ids, save=True)
    values = saved_values(rig, full.ticket)
    again = await rig.run(ids, lease=claim_of(rig, ids[:64], values[:, :, :, :64]))
    assert again.ids == full.ids
    assert again.timings[0].cached_tokens == 0
    assert again.timings[0].computed_tokens == 75 - 64
    assert "the engine holds 64 tokens" in again.timings[0].lease_error
    rig.leases.release(full.ticket.lease_id, now=rig.now)
    await until_empty(rig)


async def test_lease_of_other_tokens_is_not_used(paged):
    ids = some_ids(70)
    plain = await paged.run(ids, save=True)
    claim = claim_of(paged, some_ids(64, seed=9), saved_values(paged, plain.ticket)[:, :, :, :64])
    output = await paged.run(ids, lease=claim)
    assert output.ids == plain.ids
    assert "other tokens" in output.timings[0].lease_error


@pytest.mark.parametrize("async_load_tokens", [0, 1])
@pytest.mark.parametrize("after", [0, 1, 3])
async def test_cancelled_request_gives_everything_back(paged_of, async_load_tokens, after):
    rig = paged_of(connector={"async_load_tokens": async_load_tokens})
    ids = some_ids(70)
    full = await rig.run(ids, save=True)
    values = saved_values(rig, full.ticket)
    rig.leases.release(full.ticket.lease_id, now=rig.now)
    for _ in range(5):
        seen = 0
        request = rig.request(
            ids, max_tokens=200, lease=claim_of(rig, ids[:64], values[:, :, :, :64]), save=True
        )
        events = rig.engine.generate(request, is_cancelled=lambda: seen >= after)  # noqa: B023
        async for event in events:
            seen += len(event.new_token_ids)
            if event.save:
                rig.leases.release(event.save.lease_id, now=rig.now)
        await until_empty(rig)
    assert rig.engine.stats()["cancelled"] == 5
    assert (await rig.run(ids)).ids == full.ids


async def test_consumer_that_leaves_gives_everything_back(paged):
    ids = some_ids(70)
    stream = paged.engine.generate(paged.request(ids, max_tokens=200, save=True))
    async for _ in stream:
        break
    await stream.aclose()
    await until_empty(paged)
    assert paged.engine.stats()["running"] == 0


async def test_generated_tokens_are_saved_too_unless_told_not_to(paged_of):
    ids = some_ids(40)
    with_answer = await paged_of().run(ids, max_tokens=60, min_length=60, save=True)
    assert len(with_answer.ticket.targets) == 3  # 99 of 100 tokens have KV
    assert with_answer.ticket.token_ids[40:] == tuple(with_answer.ids[:56])
    without = await paged_of(save={"generated": False}).run(
        ids, max_tokens=60, min_length=60, save=True
    )
    assert len(without.ticket.targets) == 1


async def test_full_arena_drops_the_save_and_not_the_answer(paged_of):
    rig = paged_of(num_bytes=1 << 16)
    rig.leases.lease(rig.arena.num_blocks * 8, 60.0, now=0.0)
    output = await rig.run(some_ids(70), save=True)
    assert output.reason in ("length", "stop")
    assert not output.tickets
    assert rig.engine.stats()["connector"]["saves_dropped"] == 1


async def test_stop_word_ends_the_answer_and_what_was_computed_is_saved(paged):
    ids = some_ids(40)
    plain = await paged.run(ids, max_tokens=40, min_length=40)
    word = plain.text[4:6]
    output = await paged.run(ids, max_tokens=40, min_length=40, stop_words=(word,), save=True)
    assert output.reason == "stop"
    assert output.text == plain.text[: plain.text.index(word)]
    assert len(output.ticket.targets) == 1


async def test_sampling_is_that_of_the_torch_engine(paged, rig):
    options = {"max_tokens": 20, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 7}
    ids = some_ids(33)
    assert (await paged.run(ids, **options)).ids == (await rig.run(ids, **options)).ids


async def test_input_in_output(paged, tokenizer):
    ids = tokenizer.encode("hello there")
    output = await paged.run(ids, exclude_input_in_output=False)
    assert output.ids[: len(ids)] == ids
    assert output.text.startswith("hello there")


async def test_request_that_can_never_fit_is_refused(paged_of):
    rig = paged_of(connector={"pool_bytes": 1 << 16})
    with pytest.raises(RequestError, match="needs more KV blocks than the engine has"):
        await rig.run(some_ids(400), max_tokens=100)
    assert rig.engine.stats()["running"] == 0


async def test_too_many_requests_are_refused(paged_of):
    rig = paged_of(engine={"max_running_requests": 1, "max_waiting_requests": 0})
    first = rig.engine.generate(rig.request(some_ids(20), max_tokens=300, min_length=300))
    await anext(first)
    with pytest.raises(EngineBusyError, match="max_running_requests"):
        await rig.run(some_ids(20))
    await first.aclose()


async def test_closed_engine_refuses_and_ends_what_runs(paged):
    running = paged.engine.generate(paged.request(some_ids(20), max_tokens=300, min_length=300))
    await anext(running)
    await asyncio.to_thread(paged.engine.close)
    with pytest.raises(EngineError, match="closed"):
        async for _ in running:
            pass
    with pytest.raises(EngineError, match="closed"):
        await paged.run(some_ids(20))


async def test_salts_share_nothing_on_the_device(paged_of):
    rig = paged_of(connector={"device_reuse": True})
    ids = some_ids(75)
    await rig.run(ids, salt="a")
    assert (await rig.run(ids, salt="b")).timings[0].computed_tokens == 75
    assert (await rig.run(ids, salt="a")).timings[0].computed_tokens == 11


async def test_load_that_fails_ends_the_engine_before_a_wrong_token(paged, monkeypatch):
    ids = some_ids(70)
    plain = await paged.run(ids, save=True)
    claim = claim_of(paged, ids[:64], saved_values(paged, plain.ticket)[:, :, :, :64])

    def fail(*_, **__):
        raise RuntimeError("device lost")

    monkeypatch.setattr(BlockCopier, "load", fail)
    with pytest.raises(EngineError, match="a load of 8 blocks failed: device lost"):
        await paged.run(ids, lease=claim)
    with pytest.raises(EngineError, match="device lost"):
        await paged.run(ids)


async def test_failure_of_the_model_ends_everybodys_wait(paged, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PagedModel, "forward", fail)
    outputs = await asyncio.gather(
        *(paged.run(some_ids(20, seed=i)) for i in range(3)), return_exceptions=True
    )
    assert [type(output) for output in outputs] == [EngineError] * 3
    assert "out of memory" in str(outputs[0])
    assert paged.engine.stats()["failed"] == 3


def test_consumer_whose_loop_is_closed_harms_nobody(paged):
    async def begin():
        stream = paged.engine.generate(
            paged.request(some_ids(20), max_tokens=60, min_length=60, save=True)
        )
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(begin())
    loop.close()
    del stream
    ids = some_ids(30)
    assert asyncio.run(paged.run(ids)).ids == asyncio.run(paged.run(ids)).ids


async def test_save_that_never_comes_is_not_waited_for(paged_of, monkeypatch):
    rig = paged_of(connector={"save_timeout_seconds": 0.1, "kv_layout": "HND"})
    monkeypatch.setattr(ConnectorWorker, "_take_room", lambda *_: None)
    output = await rig.run(some_ids(40), save=True)
    assert output.reason
    assert not output.tickets
    rig.now = 1000.0
    rig.leases.expire(rig.now)  # the room ends by itself
    monkeypatch.undo()
    assert (await rig.run(some_ids(40), save=True)).tickets


async def test_connector_that_does_not_answer_costs_a_moment(paged, monkeypatch):
    ids = some_ids(70)
    plain = await paged.run(ids, save=True)
    claim = claim_of(paged, ids[:64], saved_values(paged, plain.ticket)[:, :, :, :64])
    monkeypatch.setattr(connected, "_ANNOUNCE_SECONDS", 0.05)
    monkeypatch.setattr(OwnerLink, "send", lambda *_: None)
    output = await paged.run(ids, lease=claim)
    assert output.ids == plain.ids
    assert "did not recognise the request" in output.timings[0].lease_error


async def test_news_of_a_load_are_awaited_before_the_first_token_only(paged, monkeypatch):
    right, waits = connected._settled, []

    async def record(future, seconds):
        waits.append(seconds)
        return await right(future, seconds)

    monkeypatch.setattr(connected, "_settled", record)
    monkeypatch.setattr(connected, "_ANNOUNCE_SECONDS", 0.01)
    monkeypatch.setattr(connected, "_NEWS_SECONDS", 0.02)
    monkeypatch.setattr(OwnerLink, "send", lambda *_: None)  # never recognised
    output = await paged.run(some_ids(20), max_tokens=30, min_length=30)
    assert len(output.ids) == 30
    assert waits == [0.01, 0.02]


async def test_save_under_way_takes_no_place_of_a_running_request(paged_of, monkeypatch):
    rig = paged_of(engine={"max_running_requests": 1, "max_waiting_requests": 0})
    right, rooms = ConnectorWorker._take_room, []
    monkeypatch.setattr(ConnectorWorker, "_take_room", lambda *given: rooms.append(given))
    first = rig.engine.generate(rig.request(some_ids(40), save=True))
    while not (await anext(first)).finish_reason:
        with pytest.raises(EngineBusyError):
            await rig.run(some_ids(20))
    assert rig.engine.stats()["running"] == 1  # who waits for saves waits for this one
    saving = asyncio.ensure_future(anext(first))
    await rig.run(some_ids(20))
    assert not saving.done()
    for given in rooms:
        right(*given)
    assert (await saving).save is not None
    await first.aclose()
    assert rig.engine.stats()["running"] == 0


def test_first_request_that_never_ends_is_an_error():
    with pytest.raises(EngineError, match="did not answer a first request"):
        connected._run_apart(asyncio.sleep(60), 0.05)


async def test_ticket_that_expired_is_thrown_away_quietly(paged):
    plain = await paged.run(some_ids(40), save=True)
    future = concurrent.futures.Future()
    future.set_result(plain.ticket)
    paged.engine._throw_away(future)
    assert is_empty(paged)
    paged.engine._throw_away(future)
