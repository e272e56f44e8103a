import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc

from kvfetcher.config import load_config
from kvfetcher.errors import ServerError
from kvfetcher.launcher import rundir
from support.triton_server import (
    IDENTITY_MODEL,
    TritonServer,
    free_ports,
    server_config,
    write_identity,
)

pytestmark = pytest.mark.triton


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    write_identity(folder)
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """Whatever a test does to its server, nothing of it stays."""
    yield
    rundir.remove_leftovers()
    assert not _own_shared_memory()


def _own_shared_memory():
    """Files in /dev/shm of launchers that are children of, or are, this process."""
    return [p.name for p in Path("/dev/shm").glob(f"kvfetcher-{os.getpid()}-*")]


def _ask(server, name="identity"):
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        values = tritonclient.grpc.InferInput("values", [3], "INT32")
        values.set_data_from_numpy(np.array([1, 2, 3], np.int32))
        result = client.infer(name, [values], client_timeout=30)
    assert result.as_numpy("same").tolist() == [1, 2, 3]
    return json.loads(result.as_numpy("facts")[0])


def _gone(process, seconds=15.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_server_starts_answers_and_leaves_nothing(repository):
    with TritonServer(server_config(), model_repository=repository) as server:
        assert server.is_ready()
        facts = _ask(server)
        run_dir, process = server.run_dir, server.process_id
        # The models run in this interpreter's environment and read exactly this configuration.
        assert facts["executable"] == sys.prefix
        assert facts["run_dir"] == str(run_dir)
        assert load_config(facts["config"], environ={}) == server.config
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert _own_shared_memory()
        (Path("/dev/shm") / f"kvfetcher-{run_dir.name}-arena").write_bytes(b"an engine's")
        assert server.stop() is True
    assert _gone(process)
    assert _gone(facts["process"])
    assert not run_dir.exists()
    assert not _own_shared_memory()


def test_settings_of_the_shell_do_not_reach_the_models_twice(repository, monkeypatch):
    config = server_config()
    monkeypatch.setenv("KVFETCHER_SAVE_NICE", "7")
    monkeypatch.setenv("KVFETCHER_CONFIG", "/absent.toml")
    with TritonServer(config, model_repository=repository) as server:
        assert load_config(_ask(server)["config"], environ={}).save.nice == config.save.nice


def test_two_servers_run_side_by_side(repository):
    with (
        TritonServer(server_config(), model_repository=repository) as first,
        TritonServer(server_config(), model_repository=repository) as second,
    ):
        assert _ask(first)["run_dir"] != _ask(second)["run_dir"]


def test_taken_port_is_refused_by_number_and_holder(repository):
    with TritonServer(server_config(), model_repository=repository) as first:
        taken = first.config.server.grpc_port
        second = TritonServer(server_config(grpc_port=taken), model_repository=repository)
        message = rf"port {taken} of 127\.0\.0\.1 \(server\.grpc_port\).*held by tritonserver"
        with pytest.raises(ServerError, match=message):
            second.start()
        _ask(first)


def test_model_that_fails_to_load_ends_the_start_with_its_reason(repository):
    write_identity(repository, "broken")
    (repository / "broken" / "1" / "model.py").write_text("raise ValueError('the reason')\n")
    server = TritonServer(server_config(), model_repository=repository)
    with pytest.raises(ServerError, match=r"ended while starting[\s\S]*the reason") as caught:
        server.start()
    kept = str(caught.value).split("kept in ")[1].split(";")[0]
    assert "the reason" in Path(kept).read_text()
    assert not server.is_alive()


def test_start_that_takes_too_long_is_given_up(repository):
    sleepy = IDENTITY_MODEL + "\n    def initialize(self, args):\n        import time\n\n"
    sleepy += "        time.sleep(60)\n"
    (repository / "identity" / "1" / "model.py").write_text(sleepy)
    reports = []
    server = TritonServer(
        server_config(ready_timeout_seconds=3.0),
        model_repository=repository,
        progress=lambda *facts: reports.append(facts),
    )
    with pytest.raises(ServerError, match=r"not ready after 3 s \(server\.ready_timeout_seconds\)"):
        server.start()
    assert {(total, missing) for _, total, missing in reports} == {(1, ("identity",))}
    assert not list(rundir.processes_of(Path("/absent")))


def test_death_of_a_running_server_is_noticed(repository):
    server = TritonServer(server_config(), model_repository=repository)
    with server:
        stub = _ask(server)["process"]
        server.kill()
        assert not server.is_alive()
        assert server.exit_status == -signal.SIGKILL
        assert server.stop() is False
        assert _gone(stub)


def test_stop_may_be_repeated_and_start_may_follow(repository):
    server = TritonServer(server_config(), model_repository=repository)
    server.start()
    assert server.stop() is True
    assert server.stop() is False
    with server:
        _ask(server)


def test_server_that_ignores_the_stop_is_killed(repository):
    stubborn = IDENTITY_MODEL + "\n    def finalize(self):\n        import time\n\n"
    stubborn += "        time.sleep(120)\n"
    (repository / "identity" / "1" / "model.py").write_text(stubborn)
    server = TritonServer(server_config(stop_timeout_seconds=1.0), model_repository=repository)
    server.start()
    stub = _ask(server)["process"]
    start = time.monotonic()
    assert server.stop() is False
    assert time.monotonic() - start < 30
    assert _gone(stub)


def _serve(repository, *more):
    ports = free_ports(3)
    flags = zip(("--http-port", "--grpc-port", "--metrics-port"), map(str, ports), strict=True)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "kvfetcher.cli", "serve"),
            *("--model-repository", str(repository)),
            *(word for flag in flags for word in flag),
            *more,
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, f"127.0.0.1:{ports[1]}"


def _read_until(stream, wanted):
    lines = []
    for line in stream:
        lines.append(line)
        if wanted in line:
            return line
    raise AssertionError("".join(lines))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_stops_cleanly_on_a_signal(repository, number):
    process, url = _serve(repository)
    with process:
        assert url in _read_until(process.stderr, "ready: gRPC")
        run_dirs = [p for p in rundir._base().iterdir() if p.name.startswith(f"{process.pid}-")]
        assert len(run_dirs) == 1
        process.send_signal(number)
        assert "stopping" in process.stderr.read()
        assert process.wait(30) == 0
    assert not run_dirs[0].exists()
    assert not list(Path("/dev/shm").glob(f"kvfetcher-{process.pid}-*"))


def _server_process(launcher):
    """The tritonserver of a `kvfetcher serve`."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return int(children[0])


def test_serve_starts_a_dead_server_again(repository):
    process, _ = _serve(repository)
    with process:
        _read_until(process.stderr, "ready: gRPC")
        os.kill(_server_process(process.pid), signal.SIGKILL)
        _read_until(process.stderr, "ended by itself (killed by SIGKILL); starting tritonserver")
        _read_until(process.stderr, "its log is kept in")
        _read_until(process.stderr, "was started again")
        process.send_signal(signal.SIGINT)
        assert "stopping" in process.stderr.read()
        assert process.wait(30) == 0


def test_serve_ends_with_a_dead_server_where_repairs_are_off(repository, monkeypatch):
    monkeypatch.setenv("KVFETCHER_SERVER_MAX_REPAIRS", "0")
    process, _ = _serve(repository)
    with process:
        _read_until(process.stderr, "ready: gRPC")
        os.kill(_server_process(process.pid), signal.SIGKILL)
        assert "ended by itself (killed by SIGKILL)" in process.stderr.read()
        assert process.wait(30) == 1


def test_leftovers_of_a_killed_launcher_are_cleaned_by_the_next_start(repository):
    process, _ = _serve(repository)
    with process:
        _read_until(process.stderr, "ready: gRPC")
        run_dir = next(p for p in rundir._base().iterdir() if p.name.startswith(f"{process.pid}-"))
        children = list(rundir.processes_of(run_dir))
        assert len(children) == 2  # tritonserver and the stub
        process.kill()
    with TritonServer(server_config(), model_repository=repository):
        assert not run_dir.exists()
        assert all(_gone(child) for child in children)
        assert not list(Path("/dev/shm").glob(f"kvfetcher-{run_dir.name}-*"))


def test_plain_tritonserver_works_with_the_printed_environment(repository):
    http, grpc, metrics = free_ports(3)
    script = (
        f'eval "$({sys.executable} -m kvfetcher.cli env)"\n'
        f"exec tritonserver --model-repository {repository} --http-port {http}"
        f" --grpc-port {grpc} --metrics-port {metrics}\n"
    )
    process = subprocess.Popen(
        ["sh", "-ec", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with process:
        plain = TritonServer(server_config(http_port=http, grpc_port=grpc))
        deadline = time.monotonic() + 60
        while not plain.is_ready():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        try:
            assert _ask(plain)["executable"] == sys.prefix
        finally:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


def test_a_first_start_that_a_signal_ends_is_tried_once_more(repository, tmp_path):
    """tritonserver 2.51 aborts at about one of fourteen first starts."""
    crash = (
        IDENTITY_MODEL + "\n    def initialize(self, args):\n        import os, pathlib, signal\n"
    )
    crash += f"        flag = pathlib.Path({str(tmp_path / 'crashed')!r})\n"
    crash += "        if not flag.exists():\n            flag.touch()\n"
    crash += "            os.kill(os.getppid(), signal.SIGABRT)\n"
    (repository / "identity" / "1" / "model.py").write_text(crash)
    with TritonServer(server_config(), model_repository=repository) as server:
        assert (tmp_path / "crashed").exists()
        _ask(server)


def test_a_reload_notices_that_the_server_died(repository):
    """Its stubs keep the connection open; the wait was 180 s."""
    slow = IDENTITY_MODEL + "\n    def initialize(self, args):\n        import os, time\n"
    slow += "        if os.path.exists(os.environ['KVFETCHER_RUN_DIR'] + '/slow'):\n"
    slow += "            time.sleep(60)\n"
    (repository / "identity" / "1" / "model.py").write_text(slow)
    with TritonServer(server_config(), model_repository=repository) as server:
        (server.run_dir / "slow").touch()
        killer = threading.Timer(1.0, os.kill, (server.process_id, signal.SIGKILL))
        killer.start()
        started = time.monotonic()
        with pytest.raises(ServerError, match="identity again"):
            server.reload("identity")
        assert time.monotonic() - started < 30
        killer.join()
