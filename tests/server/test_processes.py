"""How servers start, end and die: by hand, by crash, with a dead engine process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvfetcher_client import Client
from support.triton_server import free_ports

from .conftest import start_server

pytestmark = [pytest.mark.triton, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")


def shared_files() -> set[str]:
    """Those of servers that this process started; other tests may run beside it."""
    return {path.name for path in SHARED_MEMORY.glob(f"*kvfetcher-{os.getpid()}-*")}


def test_a_plain_tritonserver_serves_the_literal_repository(tmp_path, prompt):
    http, grpc, metrics = free_ports(3)
    executable = Path(sys.executable).with_name("kvfetcher")
    command = (
        f'eval "$({executable} env)"; exec tritonserver --model-repository model_repository'
        f" --http-port {http} --grpc-port {grpc} --metrics-port {metrics}"
    )
    settings = {
        "KVFETCHER_STORE_PATH": str(tmp_path / "store"),
        "KVFETCHER_ENGINE_ARENA_BYTES": str(64 << 20),
    }
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT, env={**os.environ, **settings}, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        with Client(f"127.0.0.1:{grpc}", timeout_seconds=60) as client:
            deadline = time.monotonic() + 120
            while not client.is_ready():
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
            assert client.generate(prompt(40), max_tokens=3).text
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_server_that_cannot_save_answers_and_once_killed_leaves_nothing(tmp_path, prompt):
    """A store that cannot be written only costs the saving; a crash, what runs."""
    before = shared_files()
    not_a_folder = tmp_path / "store"
    not_a_folder.write_text("in the way")
    with start_server(not_a_folder) as running:
        question = prompt(150)
        first = running.client.generate(question, max_tokens=4)
        second = running.client.generate(question, max_tokens=4)
        assert first.text == second.text
        assert (second.report.hit_tokens, second.report.raw["outcome"]) == (0, "miss")
        assert second.report.raw["reason"] in ("store_error", "not_stored")
        running.settle()  # no lease is left behind
        assert shared_files() > before, "the arena should be there"
        run_dir = running.server.run_dir
        running.server.kill()
    assert shared_files() <= before
    assert not run_dir.exists()
