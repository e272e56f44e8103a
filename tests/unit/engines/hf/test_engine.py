"""The torch engine: equal results with and without a lease, and no request harms another."""

import asyncio
import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvfetcher.errors import EngineBusyError, EngineError, RequestError
from kvfetcher.memory.leases import LeaseClaim, tokens_digest
from support.engine_rig import (
    BLOCK,
    CHUNK,
    EOS,
    SLICE,
    collect,
    lease_with,
    saved_values,
    some_ids,
    until,
)


def claim_of(rig, ticket):
    tokens = sum(target.num_tokens for target in ticket.targets)
    return LeaseClaim(ticket.lease_id, tokens, rig.arena.generation)


def record_logits(rig, monkeypatch):
    """The list to which the logits of every chosen token are added."""
    seen, accept = [], rig.engine._accept

    def recording(sequence, logits):
        seen.append(logits.clone())
        accept(sequence, logits)

    monkeypatch.setattr(rig.engine, "_accept", recording)
    return seen


# Results


async def test_greedy_output_is_that_of_transformers(rig_of, model_folder):
    """With a float32-wide KV dtype there is no rounding worth naming; ids must agree."""
    rig = rig_of()
    ids = some_ids(50)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=EOS
        )[0, 50:].tolist()
    output = await rig.run(ids, max_tokens=12)
    assert output.ids == expected
    assert output.reason == ("stop" if expected[-1] == EOS else "length")


@pytest.mark.parametrize("prompt_tokens", [40, 64, 65, 79, 80, 96, 97])
async def test_a_hit_gives_the_same_tokens_and_kv_bytes_as_computing(
    rig, monkeypatch, prompt_tokens
):
    logits = record_logits(rig, monkeypatch)
    ids = some_ids(prompt_tokens)
    full = await rig.run(ids, max_tokens=40, min_length=40, save=True)
    values = saved_values(rig, full.ticket)
    shared = prompt_tokens // CHUNK * CHUNK
    lease_id = lease_with(rig, ids[:shared], values[:, :, :, :shared])
    hit = await rig.run(
        ids,
        max_tokens=40,
        min_length=40,
        save=True,
        lease=LeaseClaim(lease_id, shared, rig.arena.generation),
    )
    assert hit.ids == full.ids
    assert len(logits) == 80
    assert all(torch.equal(a, b) for a, b in zip(logits[:40], logits[40:], strict=True))
    assert hit.timings[0].cached_tokens == min(shared, prompt_tokens - 1)
    assert hit.ticket.first_chunk_index == shared // CHUNK
    assert np.array_equal(saved_values(rig, hit.ticket), values[:, :, :, shared:])


async def test_kv_of_a_shared_prefix_is_the_same_bytes_in_prompts_of_other_lengths(rig):
    """64 tokens end at a slice's end: with more behind them they are computed in one go too."""
    ids = some_ids(120)
    chunks = []
    for length in (64, 70, 120):
        output = await rig.run(ids[:length], max_tokens=1 + length % 7, save=True)
        chunks.append(saved_values(rig, output.ticket)[:, :, :, :64])
    assert np.array_equal(chunks[0], chunks[1])
    assert np.array_equal(chunks[0], chunks[2])


async def test_leased_kv_is_what_attention_sees(rig):
    """Heads swapped in the lease must change the answer: the lease is used, not recomputed."""
    ids = some_ids(70)
    plain = await rig.run(ids, save=True)
    values = saved_values(rig, plain.ticket)
    lease_id = lease_with(rig, ids[:64], values[:, :, ::-1, :64])
    other = await rig.run(ids, lease=LeaseClaim(lease_id, 64, rig.arena.generation))
    assert other.ids != plain.ids
    assert rig.leases.usage()["claimed"] == 0


async def test_lease_longer_than_a_prompt_of_odd_length_computes_the_last_token(rig):
    ids = some_ids(36)
    full = await rig.run(ids, save=True, max_tokens=30, min_length=30)
    values = saved_values(rig, full.ticket)
    lease_id = lease_with(rig, ids, values[:, :, :, :36])
    hit = await rig.run(ids, max_tokens=30, lease=LeaseClaim(lease_id, 36, rig.arena.generation))
    assert hit.ids == full.ids
    assert (hit.timings[0].cached_tokens, hit.timings[0].computed_tokens) == (35, 1)


async def test_neighbours_do_not_change_a_request(rig):
    alone = [await rig.run(some_ids(n, seed=n), max_tokens=20) for n in (5, 40, 100)]
    together = await asyncio.gather(
        *(rig.run(some_ids(n, seed=n), max_tokens=20) for n in (5, 40, 100))
    )
    assert [o.ids for o in together] == [o.ids for o in alone]


async def test_two_engines_of_one_model_save_the_same_bytes(rig, rig_of, tmp_path):
    ids = some_ids(80)
    first = await rig.run(ids, save=True)
    values = saved_values(rig, first.ticket)
    other = rig_of()
    assert np.array_equal(saved_values(other, (await other.run(ids, save=True)).ticket), values)


# Saving


async def test_ticket_covers_whole_chunks_of_prompt_and_output(rig):
    ids = some_ids(40)
    output = await rig.run(ids, max_tokens=30, min_length=30, save=True)
    ticket = output.ticket
    assert output.reason == "length"
    # 40 + 30 tokens, the last one's KV is never computed: 69 with KV, two whole chunks.
    assert [t.num_tokens for t in ticket.targets] == [CHUNK, CHUNK]
    assert list(ticket.token_ids) == (ids + output.ids)[: 2 * CHUNK]
    lease = rig.leases.renew(ticket.lease_id, now=0.0)
    assert lease.state == "sealed"
    assert lease.tokens_digest == tokens_digest(ticket.token_ids)
    assert lease.block_ids == tuple(b for t in ticket.targets for b in t.block_ids)


async def test_generated_tokens_are_left_out_on_request(rig_of):
    rig = rig_of(save={"generated": False})
    output = await rig.run(some_ids(40), max_tokens=30, min_length=30, save=True)
    assert len(output.ticket.targets) == 1


async def test_saving_switched_off_or_nothing_whole_gives_no_ticket(rig_of):
    rig = rig_of(save={"enabled": False})
    assert (await rig.run(some_ids(40), save=True)).tickets == []
    rig = rig_of()
    assert (await rig.run(some_ids(CHUNK - 8), max_tokens=8, save=True)).tickets == []
    assert (await rig.run(some_ids(40))).tickets == []
    assert rig.leases.usage()["free"] == rig.arena.num_blocks


async def test_full_arena_drops_the_save_and_counts_it(rig):
    rig.leases.lease(rig.arena.num_blocks * BLOCK - CHUNK, 60.0, now=0.0)
    output = await rig.run(some_ids(70), save=True)
    assert output.reason
    assert output.tickets == []
    assert rig.engine.stats()["saves_dropped"] == 1
    assert len((await rig.run(some_ids(40), save=True)).ticket.targets) == 1


async def test_save_that_outlives_its_lease_is_dropped_not_wrong(rig):
    clock_runs_away = iter(range(0, 10_000_000, 1000))
    rig.engine._clock = lambda: float(next(clock_runs_away))
    output = await rig.run(some_ids(70), save=True)
    assert output.reason
    assert output.tickets == []
    assert rig.engine.stats()["saves_dropped"] == 1
    assert rig.engine.stats()["failed"] == 0


# Leases that cannot be used


@pytest.mark.parametrize("kind", ["expired", "unknown", "restarted", "other tokens", "longer"])
async def test_unusable_lease_is_computed_and_explained(rig, kind):
    ids = some_ids(70)
    full = await rig.run(ids, save=True)
    claim = claim_of(rig, full.ticket)
    prompt = ids
    if kind == "expired":
        rig.now += 1000.0
    elif kind == "unknown":
        claim = dataclasses.replace(claim, lease_id="x")
    elif kind == "restarted":
        claim = dataclasses.replace(claim, generation="x")
    elif kind == "other tokens":
        prompt = [(ids[0] + 1) % 256, *ids[1:]]
    elif kind == "longer":
        prompt = ids[:40]
    output = await rig.run(prompt, lease=claim)
    assert output.timings[0].cached_tokens == 0
    assert output.timings[0].computed_tokens == len(prompt)
    assert output.timings[-1].lease_error
    assert rig.engine.stats()["leases_refused"] == 1
    assert output.ids == (await rig.run(prompt)).ids


async def test_lease_is_claimed_in_the_line_and_cannot_expire_there(rig_of):
    rig = rig_of(max_running_requests=1)
    ids = some_ids(70)
    claim = claim_of(rig, (await rig.run(ids, save=True)).ticket)
    first = asyncio.create_task(rig.run(some_ids(200, seed=4), max_tokens=200))
    await until(lambda: rig.engine.stats()["running"] == 1)
    second = asyncio.create_task(rig.run(ids, lease=claim))
    await until(lambda: rig.engine.stats()["waiting"] == 1)
    rig.now += 1000.0
    assert rig.leases.usage()["claimed"] > 0
    await first
    assert (await second).timings[0].cached_tokens == 64


# Scheduling


async def test_running_stream_goes_on_while_a_long_prompt_is_prefilled(rig):
    order = []

    async def follow(name, stream):
        async for event in stream:
            order.extend(name for _ in event.new_token_ids)

    short = rig.engine.generate(rig.request(some_ids(4), max_tokens=200, min_length=200))
    task = asyncio.create_task(follow("short", short))
    await until(lambda: len(order) >= 2)
    before = len(order)
    await follow("long", rig.engine.generate(rig.request(some_ids(300), max_tokens=1)))
    during = order.index("long") - before
    # 300 tokens are 19 slices: a token of the short stream comes with each.
    assert during >= 300 // SLICE - 2
    await task


async def test_long_prompts_share_prefill_in_turns(rig):
    done = []

    async def first_token(name, length):
        async for event in rig.engine.generate(rig.request(some_ids(length), max_tokens=1)):
            done.extend(name for _ in event.new_token_ids)

    await asyncio.gather(first_token("long", 480), first_token("short", 30))
    assert done == ["short", "long"]


async def test_line_is_bounded(rig_of):
    rig = rig_of(max_running_requests=1, max_waiting_requests=1)
    tasks = [
        asyncio.create_task(rig.run(some_ids(4), max_tokens=400, min_length=400)) for _ in range(2)
    ]
    await until(lambda: rig.engine.stats()["waiting"] == 1 and rig.engine.stats()["running"] == 1)
    with pytest.raises(EngineBusyError, match=r"max_waiting_requests"):
        await rig.run(some_ids(4))
    assert rig.engine.stats()["refused"] == 1
    assert [(await task).reason for task in tasks] == ["length", "length"]
    assert (await rig.run(some_ids(4))).reason


# Cancellation


async def test_cancelled_stream_ends_and_saves_whole_prompt_chunks(rig):
    stop = threading.Event()
    stream = rig.engine.generate(
        rig.request(some_ids(70), max_tokens=300, min_length=300, save=True),
        is_cancelled=stop.is_set,
    )
    await anext(stream)
    stop.set()
    output = await collect(stream)
    assert output.reason == "cancelled"
    assert len(output.ids) < 299
    assert len(output.ticket.targets) == 2
    assert rig.engine.stats()["cancelled"] == 1


async def test_cancelled_prefill_saves_what_was_computed(rig):
    polls = iter(range(1000))
    output = await rig.run(some_ids(400), save=True, is_cancelled=lambda: next(polls) >= 5)
    assert output.reason == "cancelled"
    assert output.ids == []
    saved = len(output.ticket.targets) * CHUNK
    assert 0 < saved <= output.timings[-1].computed_tokens < 400


async def test_cancelled_in_the_line(rig_of):
    rig = rig_of(max_running_requests=1)
    first = asyncio.create_task(rig.run(some_ids(4), max_tokens=100, min_length=100))
    await until(lambda: rig.engine.stats()["running"] == 1)
    output = await rig.run(some_ids(4), is_cancelled=lambda: True)
    assert output.reason == "cancelled"
    assert not first.done()
    assert (await first).reason == "length"


async def test_left_iterator_frees_everything_and_saves_nothing(rig):
    stream = rig.engine.generate(
        rig.request(some_ids(70), max_tokens=400, min_length=400, save=True)
    )
    await anext(stream)
    await stream.aclose()
    await until(lambda: rig.engine.stats()["running"] == 0)
    assert rig.leases.usage()["free"] == rig.arena.num_blocks
    assert rig.engine.stats()["saves"] == 0


async def test_cancelled_task_frees_its_request(rig):
    task = asyncio.create_task(rig.run(some_ids(70), max_tokens=400, min_length=400))
    await until(lambda: rig.engine.stats()["running"] == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: rig.engine.stats()["running"] == 0)


def test_consumer_whose_event_loop_was_closed_is_forgotten(rig):
    async def begin():
        stream = rig.engine.generate(rig.request(some_ids(70), max_tokens=400, min_length=400))
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(begin())
    loop.close()
    asyncio.run(until(lambda: rig.engine.stats()["running"] == 0))
    with pytest.raises(StopIteration):
        stream.aclose().send(None)


async def test_broken_cancel_function_ends_only_its_request(rig):
    def broken():
        raise ZeroDivisionError

    assert (await rig.run(some_ids(10), is_cancelled=broken)).reason == "cancelled"
    assert (await rig.run(some_ids(10))).reason


# Failures


async def test_failing_request_does_not_harm_the_others(rig, monkeypatch):
    forward = rig.engine._forward

    def fails_for_marked(ids, cache):
        if ids[0] == 66:
            raise RuntimeError("out of memory, say")
        return forward(ids, cache)

    expected = (await rig.run([65] * 30)).ids
    monkeypatch.setattr(rig.engine, "_forward", fails_for_marked)
    good, bad = await asyncio.gather(rig.run([65] * 30), rig.run([66] * 30), return_exceptions=True)
    assert good.ids == expected
    assert isinstance(bad, EngineError)
    assert "out of memory, say" in str(bad)
    stats = rig.engine.stats()
    assert (stats["failed"], stats["running"], stats["dead"]) == (1, 0, "")


async def test_dead_loop_fails_every_call_and_hangs_none(rig_of, monkeypatch):
    rig = rig_of(max_running_requests=1)
    task = asyncio.create_task(rig.run(some_ids(4), max_tokens=400, min_length=400))
    await until(lambda: rig.engine.stats()["running"] == 1)
    waiting = asyncio.create_task(rig.run(some_ids(4)))
    await until(lambda: rig.engine.stats()["waiting"] == 1)

    def broken():
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(rig.engine, "_turn", broken)
    async with asyncio.timeout(20):
        for running in (task, waiting):
            with pytest.raises(EngineError, match="a bug"):
                await running
        with pytest.raises(EngineError, match="restart the server"):
            await rig.run(some_ids(4))
    assert "a bug" in rig.engine.stats()["dead"]


async def test_close_ends_running_requests(rig):
    task = asyncio.create_task(rig.run(some_ids(4), max_tokens=400, min_length=400))
    await until(lambda: rig.engine.stats()["running"] == 1)
    await asyncio.to_thread(rig.engine.close)
    with pytest.raises(EngineError, match="closed"):
        await task
    with pytest.raises(EngineError, match="closed"):
        await rig.run(some_ids(4))
    rig.engine.close()


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "no tokens"),
        ([1] * 512, {}, "at most 511"),
        ([257], {}, "0 to 256"),
        ([-1], {}, "0 to 256"),
        ([1], {"max_tokens": 2000}, r"engine\.max_output_tokens"),
    ],
    ids=["empty", "oversize", "large id", "negative id", "max_tokens"],
)
async def test_bad_requests_are_refused_before_they_run(rig, ids, options, message):
    with pytest.raises(RequestError, match=message):
        await rig.run(ids, **options)
    assert rig.engine.stats()["failed"] == 0


async def test_longest_prompt_generates_until_the_positions_end(rig):
    output = await rig.run(some_ids(511), max_tokens=8)
    assert len(output.ids) == 1
    assert output.reason in ("length", "stop")


# Output


async def test_timings_come_first_and_last(rig):
    output = await rig.run(some_ids(40), max_tokens=5, min_length=5)
    assert [i for i, e in enumerate(output.events) if e.timings] == [0, 4]
    first, last = output.timings
    assert (first.computed_tokens, first.cached_tokens) == (40, 0)
    assert first.prefill_rate > 0
    assert last.generated_tokens == 5
    assert last.total_ms >= first.total_ms >= first.prefill_ms > 0


async def test_prompt_comes_first_when_asked_for(rig, tokenizer):
    ids = tokenizer.encode("Hello")
    plain = await rig.run(ids, max_tokens=4)
    output = await rig.run(ids, max_tokens=4, exclude_input_in_output=False)
    assert output.ids == ids + plain.ids
    assert output.text == "Hello" + plain.text


async def test_same_seed_same_tokens(rig):
    options = {"max_tokens": 30, "temperature": 1.5, "top_p": 0.95, "top_k": 100}
    first, second, other, fresh = await asyncio.gather(
        rig.run(some_ids(20), seed=7, **options),
        rig.run(some_ids(20), seed=7, **options),
        rig.run(some_ids(20), seed=8, **options),
        rig.run(some_ids(20), **options),
    )
    assert first.ids == second.ids
    assert first.ids != other.ids
    assert first.ids != fresh.ids


async def test_stop_word_ends_the_text_before_it(rig):
    ids = some_ids(20)
    plain = await rig.run(ids, max_tokens=40, min_length=40, temperature=2.0, seed=1)
    word = next(
        plain.text[i : i + 3]
        for i in range(4, len(plain.text) - 3)
        if plain.text[i : i + 3].isascii() and plain.text.find(plain.text[i : i + 3]) == i
    )
    output = await rig.run(
        ids, max_tokens=40, min_length=40, temperature=2.0, seed=1, stop_words=(word, "never seen")
    )
    assert output.reason == "stop"
    assert output.text == plain.text[: plain.text.index(word)]
    assert len(output.ids) < 40


async def test_describe_tells_what_others_need(rig, loaded):
    info = rig.engine.describe()
    assert info.identity == loaded.identity
    assert info.max_prompt_tokens == 511
    assert info.prefill_tokens_per_second > 0
    assert info.eos_ids == (EOS,)
    assert info.to_dict()["identity"] == loaded.identity.to_dict()
    assert [len(row) for row in info.rope.inv_freq] == [4, 4, 4]


async def test_prefill_rate_is_learnt_from_slices(rig, monkeypatch):
    forward = rig.engine._forward

    def slow(ids, cache):
        time.sleep(0.01)
        return forward(ids, cache)

    before = rig.engine.stats()["prefill"]
    monkeypatch.setattr(rig.engine, "_forward", slow)
    output = await rig.run(some_ids(400), max_tokens=1)
    after = rig.engine.stats()["prefill"]
    assert after["num_slices"] == before["num_slices"] + 400 // SLICE
    assert 0.01 / SLICE < after["base_seconds"] + 200 * after["slope_seconds"] < 1.0
    assert 0 < output.timings[0].prefill_rate < SLICE / 0.01
