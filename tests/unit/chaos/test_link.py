"""What the link of a chaos run does to a connection; and what a run counts."""

import contextlib
import json
import random
import socket
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from kvfetcher.chaos import command
from kvfetcher.chaos.faults import FaultKind, fault_kinds
from kvfetcher.chaos.link import Link, LinkFault
from kvfetcher.chaos.world import Asked, make_prompt
from kvfetcher.errors import EngineBusyError

ANSWER = bytes(range(256)) * 400


@pytest.fixture
def store():
    """A server that answers each connection's first byte with ANSWER; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    if connection.recv(1):
                        connection.sendall(ANSWER)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def ask(link, *, timeout=5.0):
    with socket.create_connection(("127.0.0.1", link.port), timeout=timeout) as connection:
        connection.sendall(b"x")
        data = b""
        while len(data) < len(ANSWER) and (part := connection.recv(1 << 16)):
            data += part
    return data


def test_a_link_without_a_fault_passes_everything_on(store):
    with Link(store) as link:
        assert ask(link) == ANSWER


def test_bits_flip_and_only_bits(store):
    with Link(store) as link:
        link.fault = LinkFault(flip_every_bytes=10_000, random=random.Random(1))
        got = ask(link)
    assert len(got) == len(ANSWER)
    wrong = [a ^ b for a, b in zip(got, ANSWER, strict=True) if a != b]
    assert 5 <= len(wrong) <= 20
    assert all(difference.bit_count() == 1 for difference in wrong)


def test_answers_are_cut(store):
    with Link(store) as link:
        link.fault = LinkFault(cut_after_bytes=1234)
        assert ask(link) == ANSWER[:1234]


def test_answers_are_slow(store):
    with Link(store) as link:
        link.fault = LinkFault(latency_seconds=0.2)
        started = time.monotonic()
        assert ask(link) == ANSWER
        assert time.monotonic() - started >= 0.2


def test_a_stalled_link_says_nothing_and_heals(store):
    with Link(store) as link:
        link.fault = LinkFault(stalls=True)
        with pytest.raises(TimeoutError):
            ask(link, timeout=0.3)
        link.fault = LinkFault()
        assert ask(link) == ANSWER


def test_connections_are_reset(store):
    with Link(store) as link:
        link.fault = LinkFault(resets=True)
        with contextlib.suppress(ConnectionError):
            assert ask(link) == b""


def test_there_are_thirty_kinds_with_names_of_their_own_for_every_store():
    names = [kind.name for kind in fault_kinds()]
    assert len(names) == len(set(names)) >= 30
    for store in ("file", "redis", "s3"):
        assert sum(store in kind.stores for kind in fault_kinds()) >= 30


def test_prompts_of_other_seeds_differ_from_their_first_words():
    prompts = [make_prompt(f"{n}") for n in range(50)]
    assert len({prompt[:20] for prompt in prompts}) == 50
    assert make_prompt("1") == prompts[1]


class StandIn:
    """A world whose answers a test chooses."""

    def __init__(self, *answers, leak=""):
        self.store = SimpleNamespace(kind="file")
        self.prompts = ("p",)
        self.expected = {"p": (1, 2)}
        self.answers = answers
        self.leak = leak

    def fault(self):
        def run(world, rng):
            return [world.asked(answer) for answer in self.answers]

        return FaultKind("test", run)

    def asked(self, answer):
        future = Future()
        if isinstance(answer, Exception):
            future.set_exception(answer)
        elif answer is not None:
            future.set_result(SimpleNamespace(output_ids=answer))
        return Asked("p", future)

    def ask(self, prompt):
        return self.asked((1, 2))

    def compute(self, prompt):
        return self.expected[prompt]

    def heal(self):
        pass

    def settle(self):
        pass

    def leaks(self):
        return self.leak


@pytest.mark.parametrize(
    ("world", "counted"),
    [
        (StandIn((1, 2), (1, 2)), (2, 0, 0, 0)),
        (StandIn((1, 2), EngineBusyError("full")), (1, 0, 0, 0)),
        (StandIn((1, 2), (9, 9)), (2, 1, 0, 0)),
        (StandIn((1, 2), None), (1, 0, 1, 0)),
        (StandIn((1, 2), leak="descriptors 3 -> 999"), (1, 0, 0, 1)),
    ],
)
def test_a_run_counts_wrong_answers_hangs_and_leaks(world, counted, monkeypatch):
    monkeypatch.setattr(command, "DEADLINE_SECONDS", -10.0)  # no waiting for what never ends
    row = command.run_one(world, world.fault(), 0)
    assert (row.answered, row.wrong, row.hung, row.leaked) == counted
    assert bool(row.detail) == any(counted[1:])


def test_the_report_has_the_keys_and_the_status(capsys):
    row = command.Row("f", "file", 0, 3, 2, wrong=1, hung=0, leaked=0, seconds=1.0, detail="x")
    assert command._report([row], {"s3": "absent"}, as_json=True) == 3
    facts = json.loads(capsys.readouterr().out)
    assert {k: facts[k] for k in ("fault_kinds", "runs", "wrong", "hung", "leaked")} == {
        "fault_kinds": 1, "runs": 1, "wrong": 1, "hung": 0, "leaked": 0,
    }  # fmt: skip
    assert facts["rows"][0]["fault"] == "f"
    assert command._report([], {}, as_json=True) == 0
