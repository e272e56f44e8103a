"""What the supervisor decides, and what it does to real servers with small models."""

from __future__ import annotations

import hashlib
import http.server
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from kvfetcher import wire
from kvfetcher.codec import profiles
from kvfetcher.codec.gpu.nvdec import MIN_WIDTH
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import ServerError
from kvfetcher.format.unit import parse_unit
from kvfetcher.launcher import probe, supervise
from kvfetcher.launcher.stubs import work_seconds
from kvfetcher.launcher.supervise import (
    MAX_LOST_BYTES,
    MAX_RELOADS,
    WINDOW_SECONDS,
    Repaired,
    Sighting,
    Supervisor,
    decide,
)
from support.triton_server import TritonServer, server_config, write_identity

SHARED_MEMORY = Path("/dev/shm")


def decided(sighting, history=(), *, now=1000.0, max_repairs=8):
    repair = decide(sighting, tuple(history), now=now, max_repairs=max_repairs)
    return repair and (repair.kind, repair.models, repair.delay_seconds)


@pytest.mark.parametrize(
    ("sighting", "expected"),
    [
        (Sighting(), None),
        (Sighting(failed_probes=1, probe_error="slow"), None),
        (Sighting(lost_bytes=MAX_LOST_BYTES), None),
        (Sighting(dead=("kv_decode",)), ("reload", ("kv_decode",), 0.0)),
        (Sighting(dead=("a", "b")), ("reload", ("a", "b"), 0.0)),
        (Sighting(dead=("a", "llm"), dead_decoupled=("llm",)), ("restart", (), 0.0)),
        (Sighting(failed_probes=2), ("reload", (wire.KV_DECODE, wire.KV_RESTORE), 0.0)),
        (Sighting(lost_bytes=MAX_LOST_BYTES + 1), ("restart", (), 0.0)),
        (Sighting(ended="it ended"), ("restart", (), 0.0)),
    ],
)
def test_each_sight_has_its_repair(sighting, expected):
    assert decided(sighting) == expected


def test_repairs_of_one_model_wait_longer_each_time_and_end_in_a_restart():
    history, seen = [], []
    for _ in range(MAX_RELOADS + 2):
        repair = decided(Sighting(dead=("a",)), history)
        seen.append((repair[0], repair[2]))
        history.append(Repaired(1000.0, "a" if repair[0] == "reload" else ""))
    assert seen == [
        ("reload", 0.0),
        ("reload", 1.0),
        ("reload", 2.0),
        ("restart", 0.0),
        ("restart", 1.0),
    ]


def test_too_many_repairs_give_up_and_old_ones_are_forgotten():
    history = [Repaired(1000.0 + n, "") for n in range(3)]
    now = 1010.0
    repair = decide(Sighting(ended="it ended"), tuple(history), now=now, max_repairs=3)
    assert (repair.kind, repair.models) == ("give_up", ())
    assert "it ended; 3 repairs within 600 s did not last (server.max_repairs)" in repair.reason
    later = 1000.5 + WINDOW_SECONDS
    assert decided(Sighting(ended="x"), history, now=later, max_repairs=3) == ("restart", (), 2.0)


def test_back_off_is_bounded():
    history = [Repaired(1000.0, "")] * 30
    assert decided(Sighting(ended="x"), history, max_repairs=100)[2] == 60.0


def test_the_probe_is_a_unit_that_nvdec_takes_and_restores_to_its_values():
    unit = probe.probe_unit()
    parsed = parse_unit(unit)
    assert parsed.geometry.width >= MIN_WIDTH
    planes = profiles.decode_unit(unit, VideoDecoder())
    values = profiles.restore_unit(unit, planes.view(np.uint8)).values
    assert hashlib.sha256(values.tobytes()).hexdigest() == probe.VALUES_SHA256


@contextmanager
def answering(status, body):
    """An HTTP server that gives every request this answer; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (400, b'{"error":"kv_decode is not healthy"}', "kv_decode is not healthy"),
        (200, b"hello", "not Triton's"),
        (200, b'{"outputs":[]}', "not Triton's"),
        (200, json.dumps({"outputs": [{"data": [1, 2]}]}).encode(), "differ"),
    ],
)
def test_a_failing_pipeline_is_told_with_its_reason(status, body, reason):
    with answering(status, body) as port:
        assert reason in probe.probe_pipeline("127.0.0.1", port, timeout_seconds=5)
    assert "no answer" in probe.probe_pipeline("127.0.0.1", port, timeout_seconds=5)


def ask(server, name="identity"):
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        values = tritonclient.grpc.InferInput("values", [3], "INT32")
        values.set_data_from_numpy(np.array([1, 2, 3], np.int32))
        result = client.infer(name, [values], client_timeout=30)
    assert result.as_numpy("same").tolist() == [1, 2, 3]
    return json.loads(result.as_numpy("facts")[0])["process"]


def ask_often(server, times):
    for _ in range(times):
        ask(server)


def kill(server, *, model="identity", count=None):
    """Kill processes of a model and wait until they are gone."""
    victims = [stub.process_id for stub in server.stubs() if stub.model == model][:count]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(stub.process_id in victims for stub in server.stubs()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return victims


def repaired(supervisor):
    """The next repair; a process is known to be dead a moment after it was killed."""
    deadline = time.monotonic() + 20
    while (repair := supervisor.look()) is None:
        assert time.monotonic() < deadline, "nothing was repaired"
        time.sleep(0.02)
    return repair


def files_of(server):
    return {path.name for path in SHARED_MEMORY.glob(f"kvfetcher-{server.run_dir.name}-*")}


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    write_identity(folder)
    return folder


@contextmanager
def supervised(repository, **settings):
    server = TritonServer(server_config(**settings), model_repository=repository)
    server.start()
    supervisor = Supervisor(server)
    try:
        yield server, supervisor
    finally:
        supervisor.close()
        server.stop()


@pytest.mark.triton
def test_a_healthy_server_is_left_alone(repository):
    with supervised(repository) as (server, supervisor):
        before = ask(server)
        assert [supervisor.look() for _ in range(3)] == [None] * 3
        assert ask(server) == before


@pytest.mark.triton
def test_a_dead_process_is_replaced_and_the_server_stops_cleanly(repository):
    with supervised(repository) as (server, supervisor):
        before, tritonserver, files = ask(server), server.process_id, files_of(server)
        kill(server)
        assert repaired(supervisor).kind == "reload"
        assert ask(server) != before
        assert server.process_id == tritonserver
        assert supervisor.look() is None
        deadline = time.monotonic() + 10
        while len(files_of(server)) > len(files):  # the old model takes a second to end
            assert time.monotonic() < deadline
            time.sleep(0.05)
        supervisor._tidy(time.monotonic() + 60)
        assert not supervisor._known.lost
        assert len(files_of(server)) == len(files)
        assert server.stop() is True


@pytest.mark.triton
def test_what_a_request_to_a_dead_process_leaves_is_removed(repository, monkeypatch):
    """tritonserver 2.51 keeps the old model, with its living processes, once that happened."""
    config = repository / "identity" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    with supervised(repository) as (server, supervisor):
        old, num_files = {stub.process_id for stub in server.stubs()}, len(files_of(server))
        assert len(old) == 2
        kill(server, count=1)
        with pytest.raises(InferenceServerException, match="not healthy"):
            ask_often(server, 4)  # one of them meets the dead process
        assert repaired(supervisor).kind == "reload"
        ask(server)
        monkeypatch.setattr(supervise, "_RETIRE_SECONDS", 0.0)
        assert supervisor.look() is None
        deadline = time.monotonic() + 10
        while old & {stub.process_id for stub in server.stubs()}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(files_of(server)) == num_files
        mapped = [os.fstat(lost.descriptor) for lost in supervisor._known.lost]
        assert len(mapped) == 2
        assert all(0 < status.st_blocks * 512 < 64 << 20 for status in mapped)
        descriptors = [os.dup(lost.descriptor) for lost in supervisor._known.lost]
        monkeypatch.setattr(supervise, "_RECLAIM_SECONDS", 0.0)
        assert supervisor.look() is None
        assert not supervisor._known.lost
        assert [os.fstat(each).st_blocks for each in descriptors] == [0, 0]
        for each in descriptors:
            os.close(each)
        ask(server)
        start = time.monotonic()
        assert server.stop() is True, "all models were finalised"
        assert time.monotonic() - start < 15, "not the exit timeout of 20 s"


@pytest.mark.triton
def test_a_dead_process_of_a_decoupled_model_restarts_the_server(repository):
    write_identity(repository, "stream")
    config = repository / "stream" / "config.pbtxt"
    config.write_text(config.read_text() + "model_transaction_policy { decoupled: true }\n")
    with supervised(repository) as (server, supervisor):
        tritonserver, run_dir = server.process_id, server.run_dir
        kill(server, model="stream")
        repair = repaired(supervisor)
        assert (repair.kind, repair.reason) == ("restart", "a process of stream died")
        assert server.process_id != tritonserver
        assert not run_dir.exists()
        assert not list(SHARED_MEMORY.glob(f"kvfetcher-{run_dir.name}-*"))
        ask(server)
        assert supervisor.look() is None


@pytest.mark.triton
def test_a_dead_server_is_started_again(repository, caplog):
    with supervised(repository) as (server, supervisor):
        server.kill()
        assert repaired(supervisor).reason == "tritonserver ended by itself (killed by SIGKILL)"
        ask(server)
        assert "its log is kept in" in caplog.text


@pytest.mark.triton
def test_a_model_that_does_not_load_again_is_tried_again_and_then_given_up(
    repository, monkeypatch, caplog
):
    delays = []
    with supervised(repository, max_repairs=2) as (server, supervisor):
        monkeypatch.setattr(supervise.time, "sleep", delays.append)
        (repository / "identity" / "1" / "model.py").write_text("raise ValueError('the reason')\n")
        kill(server)
        assert repaired(supervisor).kind == "reload"
        assert "the reason" in caplog.text
        assert repaired(supervisor).kind == "reload"
        with pytest.raises(ServerError, match=r"a process of identity died; 2 repairs within"):
            supervisor.look()
    assert 1.0 in delays


@pytest.mark.triton
def test_a_server_that_cannot_start_again_is_given_up(repository, monkeypatch, caplog):
    with supervised(repository, max_repairs=2) as (server, supervisor):
        (repository / "identity" / "1" / "model.py").write_text("raise ValueError('the reason')\n")
        server.kill()
        with pytest.raises(ServerError, match="did not load identity again"):
            server.reload("identity")
        assert repaired(supervisor).kind == "restart"
        assert "the reason" in caplog.text
        assert repaired(supervisor).reason == "tritonserver could not be started again"
        with pytest.raises(ServerError, match="could not be started again; 2 repairs"):
            supervisor.run()


@pytest.mark.triton
def test_failing_probes_reload_the_pipeline(repository, monkeypatch):
    for name in (wire.KV_DECODE, wire.KV_RESTORE):
        write_identity(repository, name)
    errors = iter(["first", "second", "third"])
    monkeypatch.setattr(supervise, "probe_pipeline", lambda *_, **__: next(errors, ""))
    with supervised(repository, probe_seconds=0.05, decode_instances=1) as (server, supervisor):
        repair = repaired(supervisor)
        assert (repair.kind, repair.models) == ("reload", (wire.KV_DECODE, wire.KV_RESTORE))
        assert repair.reason.startswith("kv_pipeline fails: ")
        assert ask(server, wire.KV_DECODE) != ask(server, wire.KV_RESTORE)
        time.sleep(0.5)
        assert supervisor.look() is None


@pytest.mark.triton
@pytest.mark.parametrize(("is_busy", "most"), [(True, 10_000), (True, 3), (False, 10_000)])
def test_d7_a_busy_machine_is_no_dead_decoder(repository, monkeypatch, is_busy, most):
    for name in (wire.KV_DECODE, wire.KV_RESTORE):
        write_identity(repository, name)
    probes = []

    def probe(*_, **__):
        probes.append(1)
        time.sleep(0.05)
        return "no answer (timed out)"

    worked = itertools.count(step=1.0 if is_busy else 0.0)
    monkeypatch.setattr(supervise, "probe_pipeline", probe)
    monkeypatch.setattr(supervise, "work_seconds", lambda _: next(worked))
    monkeypatch.setattr(supervise, "_MAX_BUSY_PROBES", most)
    with supervised(repository, probe_seconds=0.05, decode_instances=1) as (_, supervisor):
        if is_busy and most > 100:
            while len(probes) < 6:
                time.sleep(0.05)
            assert supervisor.look() is None
        else:  # it hangs, or works in vain
            repair = repaired(supervisor)
            assert repair.models == (wire.KV_DECODE, wire.KV_RESTORE)
            assert "no answer" in repair.reason
            assert len(probes) > (most if is_busy else 1)


def test_d7_work_is_time_that_a_process_ran_or_waited_for_a_processor():
    code = "import sys, time; print(flush=True); sys.stdin.readline()\nwhile True: pass"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        before = work_seconds(process.pid)
        time.sleep(0.5)
        assert work_seconds(process.pid) - before < 0.05  # it waits for a line
        process.stdin.write(b"\n")
        process.stdin.flush()
        time.sleep(0.5)
        assert work_seconds(process.pid) - before > 0.25  # however busy this machine is
        process.kill()
    assert work_seconds(process.pid) == 0


@pytest.mark.triton
def test_only_the_launcher_may_load_models(repository):
    with (
        supervised(repository) as (server, _),
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as client,
        pytest.raises(InferenceServerException, match="restricted"),
    ):
        client.unload_model("identity")
