"""MPS around a server, with a stand-in for NVIDIA's control program."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from kvfetcher.errors import ServerError
from kvfetcher.launcher import mps, rundir
from kvfetcher.launcher.mps import find_daemon, start_mps
from kvfetcher.launcher.rundir import RunDir, remove_leftovers
from support import mps_stand_in
from support.mps_stand_in import events
from support.triton_server import TritonServer, server_config, write_identity

PIPE, LOG = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"


@pytest.fixture
def short():
    """A folder with a path short enough for sockets; pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="kvf-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _machine(short, monkeypatch):
    """A machine with a driver, no daemon, and folders of this test alone."""
    for name in ("base", "tmp"):
        (short / name).mkdir(mode=0o700)
    monkeypatch.setattr(rundir, "_base", lambda: short / "base")
    monkeypatch.setattr(rundir, "TEMPORARY", short / "tmp")
    monkeypatch.setattr(mps, "TEMPORARY", short / "tmp")
    monkeypatch.setattr(mps, "_has_driver", lambda: True)
    for name in (PIPE, LOG, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function: the stand-in is installed, with its manner. Returns its log."""
    return lambda manner="": mps_stand_in.install(tmp_path / "bin", monkeypatch, manner=manner)


@pytest.fixture
def run_dir():
    made = RunDir()
    yield made
    made.remove()


def started(log):
    """Ids of the daemons and of their servers."""
    return [event["process"] for event in events(log) if "process" in event]


def running(log):
    return [process for process in started(log) if runs(process)]


def runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def commands(log):
    return [event["command"] for event in events(log) if event["what"] == "command"]


def wait_for_none(log, *, seconds=10.0):
    deadline = time.monotonic() + seconds
    while running(log):
        assert time.monotonic() < deadline, f"still running: {running(log)}"
        time.sleep(0.02)


def crash(run_dir):
    """Let go of the lock without cleaning, as a killed launcher does."""
    os.close(run_dir._lock)
    run_dir._lock = None


def test_daemon_and_server_are_up_before_anything_else_and_end_at_stop(install, run_dir):
    log = install()
    found = start_mps("on", run_dir.path)
    folder = run_dir.path / "mps"
    assert found.variables == {PIPE: str(folder), LOG: str(folder)}
    assert folder.stat().st_mode & 0o777 == 0o700
    environ = events(log)[0]["environ"]
    assert (environ[PIPE], environ[LOG]) == (str(folder), str(folder))
    assert len(running(log)) == 2
    assert f"start_server -uid {os.getuid()}" in commands(log)
    found.stop()
    assert commands(log)[-1] == "quit"
    assert not running(log)
    found.stop()


def test_nothing_of_a_clients_environment_renumbers_gpus(install, run_dir, monkeypatch):
    log = install()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    start_mps("on", run_dir.path).stop()
    assert "CUDA_VISIBLE_DEVICES" not in events(log)[0]["environ"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,2"


def test_gpus_named_by_identifier_mean_the_same_to_the_daemon(install, run_dir, monkeypatch):
    log = install()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ebe9f43")
    start_mps("on", run_dir.path).stop()
    assert events(log)[0]["environ"]["CUDA_VISIBLE_DEVICES"] == "GPU-5ebe9f43"


def test_a_server_that_takes_a_while_is_waited_for(install, run_dir):
    log = install("slow")
    start = time.monotonic()
    found = start_mps("on", run_dir.path)
    assert time.monotonic() - start > mps_stand_in.SLOW_SECONDS
    assert len(running(log)) == 2
    found.stop()


@pytest.mark.parametrize(
    ("manner", "message"),
    [
        ("refuses", r"cannot be started: [\s\S]*start\.log: no such device"),
        ("absent", r"did not answer within 0\.5 s"),
        ("faulty", r"its server failed[\s\S]*control\.log: Starting control daemon"),
        ("short", "its server ended"),
        ("slow", r"its server was not ready within 0\.3 s"),
    ],
)
def test_mps_that_does_not_come_up_is_refused_or_done_without(
    install, run_dir, monkeypatch, caplog, manner, message
):
    log = install(manner)
    monkeypatch.setattr(mps, "_DAEMON_SECONDS", 0.5)
    monkeypatch.setattr(mps, "_SERVER_SECONDS", 0.3 if manner == "slow" else 5.0)
    with pytest.raises(ServerError, match=message) as caught:
        start_mps("on", run_dir.path)
    assert 'server.mps = "off"' in str(caught.value)
    wait_for_none(log)
    shutil.rmtree(run_dir.path / "mps")
    with caplog.at_level("WARNING", "kvfetcher"):
        assert start_mps("auto", run_dir.path).variables == {}
    assert "without MPS (server.mps = auto)" in caplog.text
    wait_for_none(log)


def test_a_machine_without_the_program_or_driver_is_told_what_to_do(
    install, run_dir, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(ServerError, match=r"not on PATH; it comes with the NVIDIA driver"):
            start_mps("on", run_dir.path)
        assert start_mps("auto", run_dir.path).variables == {}
    log = install()
    monkeypatch.setattr(mps, "_has_driver", lambda: False)
    with pytest.raises(ServerError, match=r"no NVIDIA driver here.*set server\.mps = \"off\""):
        start_mps("on", run_dir.path)
    assert start_mps("auto", run_dir.path).variables == {}
    assert not events(log)


def test_off_starts_nothing_and_changes_nothing(install, run_dir):
    log = install()
    found = start_mps("off", run_dir.path)
    assert found.variables == {}
    found.stop()
    assert not events(log)


def test_a_daemon_that_does_not_heed_is_killed_with_its_server(install, run_dir, monkeypatch):
    log = install("deaf")
    monkeypatch.setattr(mps, "_QUIT_SECONDS", 0.5)
    found = start_mps("on", run_dir.path)
    assert len(running(log)) == 2
    found.stop()
    wait_for_none(log)


def test_the_users_daemon_is_used_and_left_alone(install, run_dir, short, monkeypatch):
    log = install()
    theirs = short / "theirs"
    theirs.mkdir()
    for name in (PIPE, LOG):
        monkeypatch.setenv(name, str(theirs))
    subprocess.run([mps_stand_in.NAME, "-d"], check=True)
    deadline = time.monotonic() + 10
    while find_daemon(os.environ) is None:
        assert time.monotonic() < deadline
    found = start_mps("on", run_dir.path)
    assert found.variables == {}, "what names it is inherited"
    found.stop()
    run_dir.remove()
    assert len(running(log)) == 1
    assert set(commands(log)) == {"get_server_list"}
    subprocess.run([mps_stand_in.NAME], input=b"quit\n", check=True)
    wait_for_none(log)


def test_where_the_named_daemon_does_not_answer_one_is_started(
    install, run_dir, short, monkeypatch
):
    log = install()
    monkeypatch.setenv(PIPE, str(short / "nobody"))
    assert find_daemon(os.environ) is None
    found = start_mps("on", run_dir.path)
    assert found.variables[PIPE] == str(run_dir.path / "mps")
    assert len(running(log)) == 2
    found.stop()


@pytest.fixture
def deep_run_dir(short, monkeypatch):
    """A run folder whose path leaves no room for a socket's name."""
    deep = short / ("d" * 100)
    deep.mkdir(mode=0o700)
    monkeypatch.setattr(rundir, "_base", lambda: deep)
    return RunDir()


def test_a_run_folder_too_deep_for_sockets_has_its_daemon_elsewhere(install, deep_run_dir, short):
    log = install()
    found = start_mps("on", deep_run_dir.path)
    folder = Path(found.variables[PIPE])
    assert folder.parent == short / "tmp"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(running(log)) == 2
    found.stop()
    assert not folder.exists()
    deep_run_dir.remove()


@pytest.mark.parametrize("kind", ["run_dir", "deep_run_dir"])
def test_the_daemon_of_a_crashed_launcher_ends_at_the_next_start(install, request, short, kind):
    log = install()
    run_dir = request.getfixturevalue(kind)
    start_mps("on", run_dir.path)
    assert len(running(log)) == 2
    crash(run_dir)
    assert remove_leftovers() == [run_dir.path]
    wait_for_none(log)
    assert not run_dir.path.exists()
    assert not list((short / "tmp").iterdir())


@pytest.fixture
def repository(tmp_path):
    write_identity(tmp_path / "repository")
    return tmp_path / "repository"


def environ_of(process):
    lines = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return dict(line.decode().split("=", 1) for line in lines if line)


@pytest.mark.triton
def test_all_processes_of_a_server_are_clients_of_its_daemon(install, repository):
    log = install()
    server = TritonServer(server_config(mps="on"), model_repository=repository)
    with server:
        folder = str(server.run_dir / "mps")
        for process in (server.process_id, *(stub.process_id for stub in server.stubs())):
            environ = environ_of(process)
            assert (environ[PIPE], environ[LOG]) == (folder, folder)
        first = running(log)
        assert len(first) == 2
        server.kill()  # as the supervisor starts a server again
        server.stop()
        assert not running(log)
        server.start()
        assert len(running(log)) == 2
        run_dir = server.run_dir
        assert server.stop() is True
    assert not running(log)
    assert not run_dir.exists()


@pytest.mark.triton
def test_a_server_that_does_not_start_takes_its_daemon_along(install, repository):
    log = install()
    (repository / "identity" / "1" / "model.py").write_text("raise ValueError('the reason')\n")
    server = TritonServer(server_config(mps="on"), model_repository=repository)
    with pytest.raises(ServerError, match="the reason"):
        server.start()
    assert started(log)
    assert not running(log)


@pytest.mark.triton
def test_mps_that_does_not_come_up_ends_the_start_with_its_reason(install, repository, short):
    install("refuses")
    server = TritonServer(server_config(mps="on"), model_repository=repository)
    with pytest.raises(ServerError, match="no such device"):
        server.start()
    assert not server.is_started()
    assert not list((short / "base").iterdir())
