import asyncio
import json
import threading
import time
from contextlib import aclosing, closing

import pytest

from kvfetcher_client import (
    AsyncClient,
    Client,
    RequestCancelledError,
    RequestError,
    ResponseError,
    ResponseTimeoutError,
    ServerUnavailableError,
    UnsupportedError,
)
from kvfetcher_client import client as client_module
from kvfetcher_client.protocol import checked_report
from support.triton_server import free_ports

pytestmark = pytest.mark.triton

EVERYTHING = {
    "max_tokens": 7,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.25,
    "seed": 2**64 - 1,
    "stop_words": ["ä", "stop here"],
    "min_length": 2,
    "exclude_input_in_output": False,
    "kv_policy": "recompute",
    "cache_salt": "tenant é",
}


@pytest.fixture
def client(server):
    with Client(server.grpc_url, timeout_seconds=30.0) as client:
        yield client


@pytest.fixture
async def async_client(server):
    async with AsyncClient(server.grpc_url, timeout_seconds=30.0) as client:
        yield client


def _cancellations(client):
    return int(client.generate("cancelled").text)


def _await_cancellation(client, before):
    deadline = time.monotonic() + 10
    while _cancellations(client) == before:
        assert time.monotonic() < deadline, "the server never heard of the cancellation"
        time.sleep(0.02)


def test_only_what_is_given_is_sent(client):
    sent = json.loads(client.generate("inputs").text)
    assert sent == {
        "text_input": {"shape": [1], "values": ["inputs"]},
        "stream": {"shape": [1], "values": [True]},
    }


def test_every_option_arrives_as_its_tensor(client):
    sent = json.loads(client.generate("inputs", **EVERYTHING).text)
    for name, value in EVERYTHING.items():
        values = value if isinstance(value, list) else [value]
        assert sent[name] == {"shape": [len(values)], "values": values}, name


def test_generate_joins_the_pieces_and_reads_the_last_report(client):
    answer = client.generate("count 5")
    assert answer.text == "0 1 2 3 4 "
    assert answer.output_ids == (0, 1, 2, 3, 4)
    assert answer.finish_reason == "length"
    assert 0 < answer.time_to_first_token_seconds < 10
    report = answer.report
    assert (report.prompt_tokens, report.hit_tokens, report.bytes_fetched) == (10, 9, 1234)
    assert (report.reason, report.stages_ms) == ("not_stored", {"lookup": 0.5})
    assert report.raw["of_a_later_version"] == [1]


def test_time_to_first_token_is_not_that_of_the_whole_answer(client):
    start = time.monotonic()
    answer = client.generate("count 100")
    assert answer.time_to_first_token_seconds < (time.monotonic() - start) / 2


def test_stream_gives_the_pieces_as_they_come(client):
    deltas = list(client.stream("count 3"))
    assert [d.text for d in deltas] == ["0 ", "1 ", "2 ", ""]
    assert [d.output_ids for d in deltas] == [(0,), (1,), (2,), ()]
    assert [d.finish_reason for d in deltas] == ["", "", "", "length"]
    assert [d.report is not None for d in deltas] == [True, False, False, True]


def test_closing_a_stream_cancels_the_request(client):
    before = _cancellations(client)
    with closing(client.stream("endless")) as stream:
        assert next(stream).text == "more "
    _await_cancellation(client, before)


def test_closing_the_client_cancels_what_runs(server, client):
    before = _cancellations(client)
    other = Client(server.grpc_url)
    stream = other.stream("endless")
    next(stream)
    other.close()
    with pytest.raises(RequestCancelledError):
        list(stream)
    _await_cancellation(client, before)


def test_several_threads_share_a_client(client):
    answers = {}

    def ask(number):
        answers[number] = client.generate(f"count {number}").output_ids

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: tuple(range(n)) for n in range(1, 9)}


def test_slow_answer_ends_in_a_timeout_and_is_cancelled(server, client):
    before = _cancellations(client)
    with (
        Client(server.grpc_url, timeout_seconds=0.3) as hasty,
        pytest.raises(ResponseTimeoutError, match=r"no whole answer within 0\.3 s"),
    ):
        hasty.generate("endless")
    _await_cancellation(client, before)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("INVALID_ARG", RequestError),
        ("NOT_FOUND", RequestError),
        ("CANCELLED", RequestCancelledError),
        ("UNAVAILABLE", ServerUnavailableError),
        ("INTERNAL", ResponseError),
        ("UNSUPPORTED", UnsupportedError),
    ],
)
def test_server_errors_keep_their_meaning_and_message(server, client, code, expected):
    with pytest.raises(expected, match=f"{server.grpc_url}: .*the reason") as caught:
        client.generate(f"fail {code} the reason")
    assert type(caught.value) is expected


def test_one_failed_request_leaves_the_client_usable(client):
    with pytest.raises(ResponseError):
        client.generate("fail INTERNAL boom")
    assert client.generate("count 1").output_ids == (0,)


def test_unknown_model_is_the_callers_mistake(server):
    with (
        Client(server.grpc_url, model="absent") as client,
        pytest.raises(RequestError, match="absent"),
    ):
        client.generate("count 1")


def test_answer_without_finish_reason_is_an_error(client):
    with pytest.raises(ResponseError, match="without a finish_reason"):
        client.generate("unfinished")


def test_answer_with_no_pieces_is_an_error(client):
    with pytest.raises(ResponseError, match="without a finish_reason"):
        client.generate("nothing at all")


def test_report_that_is_none_is_an_error(client):
    with pytest.raises(ResponseError, match="kv_report is not one"):
        client.generate("garbage")


def test_nobody_there_is_told_with_the_remedy():
    url = f"127.0.0.1:{free_ports(1)[0]}"
    with (
        Client(url) as client,
        pytest.raises(ServerUnavailableError, match="is `kvfetcher serve` running"),
    ):
        client.generate("x")


def test_readiness(server, client):
    assert client.is_ready()
    assert not Client(server.grpc_url, model="absent").is_ready()
    assert not Client(f"127.0.0.1:{free_ports(1)[0]}").is_ready()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_token": 3}, "unknown option 'max_token'"),
        ({"max_tokens": 2**31}, "max_tokens does not fit"),
        ({"max_tokens": "3"}, "max_tokens does not fit"),
        ({"seed": -1}, "seed does not fit"),
        ({"temperature": 1e300}, "temperature does not fit"),
        ({"stop_words": "stop"}, "must be a sequence of texts"),
        ({"stop_words": 3}, "must be a sequence of texts"),
        ({"stop_words": [3]}, "stop_words must be text"),
        ({"cache_salt": b"x"}, "cache_salt must be text"),
        ({"cache_salt": "\ud800"}, "not valid Unicode"),
    ],
)
def test_bad_option_is_refused_before_sending(client, options, message):
    with pytest.raises(RequestError, match=message):
        client.generate("inputs", **options)
    with pytest.raises(RequestError, match=message):
        client.stream("inputs", **options)


@pytest.mark.parametrize("url", ["localhost", "http://localhost:8001", ":8001", "a:b", ""])
def test_bad_url_is_refused(url):
    with pytest.raises(RequestError, match="must be host:port"):
        Client(url)
    with pytest.raises(RequestError, match="must be host:port"):
        AsyncClient(url)


async def test_async_generate(async_client):
    answer = await async_client.generate("count 5", max_tokens=5)
    assert answer.text == "0 1 2 3 4 "
    assert answer.report.hit_tokens == 9
    assert await async_client.is_ready()


async def test_async_requests_run_at_once(async_client):
    answers = await asyncio.gather(*(async_client.generate(f"count {n}") for n in range(1, 9)))
    assert [a.output_ids for a in answers] == [tuple(range(n)) for n in range(1, 9)]


async def test_async_close_of_a_stream_cancels_the_request(async_client, client):
    before = _cancellations(client)
    async with aclosing(async_client.stream("endless")) as stream:
        assert (await anext(stream)).text == "more "
    await asyncio.to_thread(_await_cancellation, client, before)


async def test_async_cancelled_task_cancels_the_request(async_client, client):
    before = _cancellations(client)
    task = asyncio.create_task(async_client.generate("endless"))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(_await_cancellation, client, before)


async def test_async_errors(server, async_client):
    with pytest.raises(RequestError, match="the reason"):
        await async_client.generate("fail INVALID_ARG the reason")
    async with AsyncClient(server.grpc_url, timeout_seconds=0.3) as hasty:
        with pytest.raises(ResponseTimeoutError):
            await hasty.generate("endless")
    async with AsyncClient(f"127.0.0.1:{free_ports(1)[0]}") as nobody:
        assert not await nobody.is_ready()
        with pytest.raises(ServerUnavailableError, match="is `kvfetcher serve` running"):
            await nobody.generate("x")


def test_warming_a_text_is_a_request_of_its_own_policy(client):
    sent = json.loads(client.generate("inputs", kv_policy="warm", cache_salt="").text)
    assert sent["kv_policy"]["values"] == ["warm"]
    assert client.warm("count 5").hit_tokens == 9


async def test_async_warming(async_client):
    assert (await async_client.warm("count 5")).hit_tokens == 9
    with pytest.raises(RequestError, match="kv_fetch"):
        await async_client.warm([1, 2, 3])  # this server has no such model


def test_warming_token_ids_needs_a_server_with_that_model(client):
    with pytest.raises(RequestError, match="kv_fetch"):
        client.warm([1, 2, 3])
    with pytest.raises(RequestError, match="at least one"):
        client.warm([])
    with pytest.raises(RequestError, match="input_ids does not fit"):
        client.warm([2**40])


def test_a_report_that_is_missing_is_an_error():
    with pytest.raises(ResponseError, match="no report"):
        checked_report("here", None)


@pytest.mark.parametrize(
    ("url", "uses_proxy"),
    [
        ("127.0.0.1:8001", False),
        ("localhost:8001", False),
        ("[::1]:8001", False),
        ("a.example:1", True),
    ],
)
def test_a_server_of_this_machine_is_not_reached_through_a_proxy(url, uses_proxy):
    options = dict(client_module._channel_options(url))
    assert ("grpc.enable_http_proxy" not in options) is uses_proxy
