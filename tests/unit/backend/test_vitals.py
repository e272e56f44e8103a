"""A process that stood still ends before it replies, and its running requests are counted."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from kvfetcher.backend import vitals
from kvfetcher.backend.vitals import STALL_SECONDS, Pulse
from kvfetcher.errors import ServerError
from kvfetcher.memory.vitals import begin_stopping, read_vitals


class Ended(Exception):
    pass


class Times:
    """Two clocks that a test moves."""

    def __init__(self):
        self.now = self.cpu = 0.0

    def pass_by(self, seconds, *, cpu=0.0):
        self.now += seconds
        self.cpu += cpu


@pytest.fixture
def times():
    return Times()


@pytest.fixture
def pulse(times, tmp_path):
    def end(reason):
        raise Ended(reason)

    return Pulse(tmp_path, end=end, clock=lambda: times.now, cpu_clock=lambda: times.cpu)


def test_a_process_that_stood_still_with_a_request_ends_before_it_replies(pulse, times):
    since = pulse.take()
    times.pass_by(STALL_SECONDS)
    with pytest.raises(Ended, match="worked on a request"):
        pulse.check(since)


def test_a_request_that_waited_while_the_process_stood_still_is_not_taken(pulse, times):
    times.pass_by(STALL_SECONDS)
    pulse.beat()
    times.pass_by(0.1)
    with pytest.raises(Ended, match="waited"):
        pulse.take()


def test_a_stall_without_a_request_costs_nothing(pulse, times):
    times.pass_by(60.0)
    pulse.beat()
    for _ in range(6):
        times.pass_by(0.1)
        pulse.beat()
    pulse.check(pulse.take())


def test_work_that_keeps_pythons_lock_is_no_stall(pulse, times):
    since = pulse.take()
    times.pass_by(5.0, cpu=4.0)
    pulse.check(since)


def test_a_long_execution_that_beats_is_no_stall(pulse, times):
    since = pulse.take()
    for _ in range(100):
        times.pass_by(0.1)
        pulse.beat()
    pulse.check(since)


def test_the_record_counts_what_runs(pulse, tmp_path):
    pulse.take()
    pulse.take()
    pulse.done()
    record = read_vitals(tmp_path)[os.getpid()]
    assert (record.running, record.taken) == (1, 2)


def test_a_stopping_server_takes_nothing_new(pulse, tmp_path):
    pulse.refuse_when_stopping()
    begin_stopping(tmp_path)
    with pytest.raises(ServerError, match="stopping") as caught:
        pulse.refuse_when_stopping()
    assert caught.value.triton_status == "UNAVAILABLE"


def test_watched_counts_a_coroutine_until_it_ends(pulse, tmp_path, monkeypatch):
    monkeypatch.setattr(vitals, "pulse", lambda: pulse)
    seen = []

    class Model:
        @vitals.watched
        async def execute(self, requests):
            seen.append(read_vitals(tmp_path)[os.getpid()].running)
            return requests

        @vitals.watched
        def fail(self, requests):
            raise KeyError(requests)

    assert asyncio.run(Model().execute(["a"])) == ["a"]
    with pytest.raises(KeyError):
        Model().fail("b")
    assert seen == [1]
    assert read_vitals(tmp_path)[os.getpid()].running == 0


_STUB = """
import sys, time
from pathlib import Path
from kvfetcher.backend.vitals import Pulse, end_process
pulse = Pulse(Path(sys.argv[1]), end=end_process)
pulse.start()
since = pulse.take()
print("taken", flush=True)
time.sleep(0.3)
sys.stdin.readline()
pulse.check(since)
print("replied", flush=True)
"""


@pytest.mark.parametrize(("stopped_seconds", "replies"), [(1.2, False), (0.0, True)])
def test_a_real_process_that_is_stopped_does_not_reply(tmp_path, stopped_seconds, replies):
    process = subprocess.Popen(
        [sys.executable, "-c", _STUB, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "taken\n"
        if stopped_seconds:
            process.send_signal(signal.SIGSTOP)
            time.sleep(stopped_seconds)
            process.send_signal(signal.SIGCONT)
        out, err = process.communicate("go\n", timeout=30)
    assert (out == "replied\n") is replies
    assert (process.returncode == 0) is replies
    assert ("it stood still" in err) is not replies
