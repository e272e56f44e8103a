"""How a server ends, and what a process that stands still may do: nothing is mixed up or lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvfetcher import wire
from kvfetcher.config import dump_config
from kvfetcher.errors import KVFetcherError
from kvfetcher.launcher import Supervisor, rundir
from kvfetcher_client import Client

from .conftest import DOCUMENT, make_config, start_server

pytestmark = [pytest.mark.triton, pytest.mark.slow]

SHARED_MEMORY = Path("/dev/shm")
ROOT = Path(__file__).parents[2]
STOPPED_SECONDS = 1.6  # Triton gives a process up after 1 s


def question(number: int, num_words: int = 150) -> str:
    words = DOCUMENT.split()
    return f"Text {number}. " + " ".join(words[13 * number : 13 * number + num_words])


def serve(tmp_path, **sections):
    """`kvfetcher serve` with the tests' configuration; its config and process, once ready."""
    config = make_config(tmp_path / "store", **sections)
    file = tmp_path / "config.toml"
    file.write_text(dump_config(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "kvfetcher.cli", "serve", "--config", str(file)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "ready: gRPC" in line:
            return config, process
    raise AssertionError("".join(lines))


def run_dir_of(process):
    return next(p for p in rundir._base().iterdir() if p.name.startswith(f"{process.pid}-"))


def is_gone(process_id, *, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_sigterm_finishes_what_runs_saves_it_and_takes_nothing_new(tmp_path):
    config, process = serve(tmp_path, server={"stop_timeout_seconds": 120.0})
    url = f"127.0.0.1:{config.server.grpc_port}"
    with process, Client(url, timeout_seconds=120) as client, ThreadPoolExecutor(4) as pool:
        running = [pool.submit(client.generate, question(n), max_tokens=40) for n in range(3)]
        time.sleep(1.0)
        assert not all(answer.done() for answer in running)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(KVFetcherError, match="stopping") as caught:
            client.generate(question(9), max_tokens=2)
        assert caught.value.triton_status == "UNAVAILABLE"
        err = process.stderr.read()
        assert process.wait(60) == 0, err
        assert [answer.exception() for answer in running] == [None] * 3, err
        answers = [answer.result() for answer in running]
        assert [len(answer.output_ids) for answer in answers] == [40] * 3
        assert time.monotonic() - started < config.server.stop_timeout_seconds, err
    chunks = [path for path in (tmp_path / "store").glob("*/*/*/*") if path.is_file()]
    saved = sum(len(answer.output_ids) > 0 for answer in answers)
    assert len(chunks) >= 2 * saved, "every prompt has at least two whole chunks"


def test_what_does_not_finish_in_time_is_named_and_costs_the_exit_status(tmp_path):
    config, process = serve(tmp_path, server={"stop_timeout_seconds": 2.0})
    url = f"127.0.0.1:{config.server.grpc_port}"
    with process, Client(url, timeout_seconds=60) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.generate, question(1), max_tokens=1000)
        time.sleep(1.0)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        err = process.stderr.read()
        assert process.wait(60) == 1
        assert time.monotonic() - started < 15
        assert "still ran after 2 s (server.stop_timeout_seconds) in: tensorrt_llm" in err
        assert isinstance(running.exception(), KVFetcherError)


def test_a_killed_launcher_takes_all_processes_and_shared_memory_with_it(tmp_path):
    config, process = serve(tmp_path)
    url = f"127.0.0.1:{config.server.grpc_port}"
    with process, Client(url, timeout_seconds=60) as client, ThreadPoolExecutor(1) as pool:
        run_dir = run_dir_of(process)
        children = list(rundir.processes_of(run_dir))
        assert len(children) > 8
        running = pool.submit(client.generate, question(1), max_tokens=1000)
        time.sleep(1.0)
        process.kill()
        assert all(is_gone(child) for child in children)
        assert isinstance(running.exception(timeout=30), KVFetcherError)
        assert not list(SHARED_MEMORY.glob(f"kvfetcher-{run_dir.name}-*"))
    rundir.remove_leftovers()


@pytest.mark.parametrize(
    "model", [wire.PREPROCESSING, wire.KV_FETCH, wire.KV_DECODE, wire.KV_RESTORE, wire.KV_SAVE]
)
def test_a_process_that_stands_still_never_answers_for_another(tmp_path, model):
    """Each request gets its own answer or a clean error, and service is back within seconds."""
    with start_server(tmp_path / "store", server={"probe_seconds": 0}) as running:
        supervisor = Supervisor(running.server)
        expected = [running.client.generate(question(n), max_tokens=6).output_ids for n in range(4)]
        running.settle()
        answers = []
        with ThreadPoolExecutor(4) as pool:
            for round_number in range(8):
                answers += [
                    (n, pool.submit(running.client.generate, question(n), max_tokens=6))
                    for n in range(4)
                ]
                if round_number == 2:
                    victims = [s.process_id for s in running.server.stubs() if s.model == model]
                    for victim in victims:
                        os.kill(victim, signal.SIGSTOP)
                    stopped = time.monotonic()
                    while time.monotonic() - stopped < STOPPED_SECONDS:
                        supervisor.look()
                        time.sleep(0.1)
                    for victim in victims:
                        if not is_gone(victim, seconds=0.1):
                            os.kill(victim, signal.SIGCONT)
                deadline = time.monotonic() + 60
                while not all(answer.done() for _, answer in answers):
                    supervisor.look()
                    assert time.monotonic() < deadline, "a request hangs"
                    time.sleep(0.1)
        outcomes = [(n, answer.exception(), answer) for n, answer in answers]
        failed = [str(error) for _, error, _ in outcomes if error is not None]
        assert all(isinstance(e, KVFetcherError) for _, e, _ in outcomes if e is not None), failed
        for n, error, answer in outcomes:
            if error is None:
                assert answer.result().output_ids == expected[n], model
        assert [e for _, e, _ in outcomes[-4:]] == [None] * 4, failed
        supervisor.close()
