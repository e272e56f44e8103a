"""Batches that are begun while another one is waited for; every request gets one answer."""

import threading

import pytest

from kvfetcher import errors
from kvfetcher.backend import overlapped
from kvfetcher.backend.overlapped import OverlappedResponses
from support import pb_utils

WAIT_SECONDS = 10.0


class Work:
    """Units that are begun at once, and over when a test opens their gate."""

    def __init__(self):
        self.gate = threading.Semaphore(0)
        self.waiting = threading.Semaphore(0)
        self.closed = []

    def start(self, request):
        if request.tensors["n"] == 1:
            raise errors.RequestError("n must not be 1")
        return request.tensors["n"]

    def close_batch(self, numbers):
        self.closed.append(numbers)
        if 7 in numbers:
            raise RuntimeError("/secret/path")
        return numbers

    def finish(self, numbers):
        self.waiting.release()
        assert self.gate.acquire(timeout=WAIT_SECONDS)
        if 8 in numbers:
            raise errors.GpuError("GPU 0 failed")
        return [
            errors.ChecksumError("it differs") if n == 2 else [pb_utils.Tensor("n", n)]
            for n in numbers
        ]


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def responses(work):
    made = OverlappedResponses(work.start, work.close_batch, work.finish, pb_utils)
    yield made
    work.gate.release(100)
    made.close()
    assert not made._thread.is_alive()


def ask(responses, *numbers):
    requests = [pb_utils.Request({"n": n}) for n in numbers]
    responses.execute(requests)
    return requests


def answers(requests):
    for request in requests:
        assert request.sender.is_final.wait(WAIT_SECONDS)
        assert len(request.sender.responses) == 1
    return [request.sender.responses[0] for request in requests]


def test_every_request_of_a_batch_is_answered_as_it_went(work, responses):
    work.gate.release()
    good, bad, wrong, last = answers(ask(responses, 0, 1, 2, 3))
    assert (good["n"], last["n"]) == (0, 3)
    assert bad.error.code == pb_utils.TritonError.INVALID_ARG
    assert "it differs" in wrong.error.message()
    assert work.closed == [[0, 2, 3]], "what was not begun is not waited for"


def test_the_next_batch_is_begun_while_one_is_waited_for(work, responses):
    first = ask(responses, 0)
    assert work.waiting.acquire(timeout=WAIT_SECONDS)
    second = ask(responses, 3)
    assert work.closed == [[0], [3]]
    assert not first[0].sender.responses
    work.gate.release(2)
    assert [a["n"] for a in answers(first + second)] == [0, 3]


def test_no_more_batches_are_under_way_than_there_may_be(work, responses, monkeypatch):
    batches = [ask(responses, 10 + n) for n in range(overlapped._MAX_BATCHES)]
    begun = threading.Thread(target=ask, args=(responses, 20))
    begun.start()
    begun.join(0.1)
    assert begun.is_alive()
    work.gate.release()
    begun.join(WAIT_SECONDS)
    assert not begun.is_alive()
    assert answers(batches[0])[0]["n"] == 10


def test_a_batch_that_fails_as_a_whole_answers_each_request_and_the_next_is_done(work, responses):
    work.gate.release(3)
    for numbers, code in [((7, 0), "INTERNAL"), ((8, 0), errors.GpuError.triton_status)]:
        for answer in answers(ask(responses, *numbers)):
            assert answer.error.code == getattr(pb_utils.TritonError, code)
            assert "secret" not in answer.error.message()
    (only_bad,) = answers(ask(responses, 1))
    assert only_bad.error.code == pb_utils.TritonError.INVALID_ARG
    assert answers(ask(responses, 5))[0]["n"] == 5


def test_a_response_that_cannot_be_sent_holds_up_no_other(work, responses):
    requests = [pb_utils.Request({"n": n}) for n in (0, 3)]
    requests[0].sender = None
    work.gate.release(2)
    responses.execute(requests)
    assert answers(requests[1:])[0]["n"] == 3
    assert answers(ask(responses, 5))[0]["n"] == 5


def test_closing_answers_what_is_under_way(work):
    made = OverlappedResponses(work.start, work.close_batch, work.finish, pb_utils)
    requests = ask(made, 0)
    work.gate.release()
    made.close()
    assert requests[0].sender.responses[0]["n"] == 0


def test_what_follows_a_batch_is_called_after_its_answers(work):
    seen = []
    request = pb_utils.Request({"n": 0})
    made = OverlappedResponses(
        work.start,
        work.close_batch,
        work.finish,
        pb_utils,
        after=lambda: seen.append(len(request.sender.responses)),
    )
    work.gate.release()
    made.execute([request])
    made.close()
    assert seen == [1]
