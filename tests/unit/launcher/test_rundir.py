import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvfetcher.errors import ServerError
from kvfetcher.launcher import rundir
from kvfetcher.launcher.rundir import RunDir, remove_leftovers


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """Run folders of this test alone."""
    folder = tmp_path / "base"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(rundir, "_base", lambda: folder)
    return folder


def _make_dead(path):
    """Let go of the lock without cleaning, as a killed launcher does."""
    os.close(path._lock)
    path._lock = None


def test_run_dir_is_private_and_gone_after_remove():
    run_dir = RunDir()
    assert run_dir.path.stat().st_mode & 0o777 == 0o700
    region = rundir.SHARED_MEMORY / f"{run_dir.shared_memory_prefix}region"
    region.write_bytes(b"x")
    run_dir.remove()
    run_dir.remove()
    assert not run_dir.path.exists()
    assert not region.exists()


def test_a_living_servers_folder_is_left_alone():
    run_dir = RunDir()
    assert remove_leftovers() == []
    assert run_dir.path.exists()
    run_dir.remove()


def test_a_dead_launchers_folder_memory_and_processes_go():
    run_dir = RunDir()
    region = rundir.SHARED_MEMORY / f"{run_dir.shared_memory_prefix}arena"
    region.write_bytes(b"x")
    orphan = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"],
        env={**os.environ, "KVFETCHER_RUN_DIR": str(run_dir.path)},
        stdout=subprocess.PIPE,
    )
    with orphan:
        orphan.stdout.readline()
        _make_dead(run_dir)
        assert remove_leftovers() == [run_dir.path]
        assert orphan.wait(10) == -9
    assert not run_dir.path.exists()
    assert not region.exists()


def test_folder_of_a_plain_tritonserver_goes_with_its_process(base):
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, alive = base / str(ended.pid), base / str(os.getpid())
    dead.mkdir()
    alive.mkdir()
    assert remove_leftovers() == [dead]
    assert alive.exists()


def test_folder_without_a_lock_is_not_ours_to_judge(base):
    (base / "1-abc").mkdir()
    assert remove_leftovers() == []


def test_base_that_others_may_write_to_is_refused(base, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    foreign = Path("/tmp/kvfetcher-54321")
    foreign.mkdir(mode=0o777)
    try:
        with pytest.raises(ServerError, match="must be yours"):
            RunDir()
    finally:
        foreign.rmdir()
