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
    return {path.name for path in SHARED_MEMORY.glob("*kvfetcher*")}


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


def test_a_killed_server_leaves_nothing_in_shared_memory(tmp_path, prompt):
    before = shared_files()
    with start_server(tmp_path / "store") as running:
        running.client.generate(prompt(40), max_tokens=1)
        assert shared_files() > before, "the arena should be there"
        run_dir = running.server.run_dir
        running.server.kill()
    assert shared_files() <= before
    assert not run_dir.exists()


def test_requests_are_answered_without_decoders(tmp_path, prompt):
    """A lost decoder process is a miss with a reason, not a failed request."""
    question = prompt(150)
    with start_server(tmp_path / "store") as running:
        first = running.client.generate(question, max_tokens=4)
        running.settle()
        for pid in _stubs(running.server.process_id, "kv_decode"):
            os.kill(pid, signal.SIGKILL)
        again = running.client.generate(question, max_tokens=4)
        assert again.output_ids == first.output_ids
        assert again.report.hit_tokens == 0
        # Triton's error, or the gate's patience with a fetch that does not move: what ends first.
        assert again.report.reason in ("decode_error", "fell_behind")
        running.settle()  # every lease came back
        running.server.kill()  # tritonserver 2.51 does not stop cleanly without its stubs


def _stubs(server_pid: int, model: str) -> list[int]:
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if parent == server_pid and f"/{model}/".encode() in command:
            pids.append(int(folder.name))
    assert pids, f"{model} has no process under {server_pid}"
    return pids
