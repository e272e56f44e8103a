"""A launcher that dies takes its server with it; one that stops it itself does not."""

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_LAUNCHER = """
import os, subprocess, sys, time
from kvfetcher.launcher.guardian import Guardian
server = subprocess.Popen(["sleep", "120"], stdout=subprocess.DEVNULL, start_new_session=True)
guardian = Guardian(server.pid, sys.argv[1])
print(server.pid, flush=True)
sys.stdin.readline()
guardian.dismiss()
"""


@pytest.fixture
def launcher():
    """A launcher with a server; the server's process id; its file in /dev/shm."""
    path = Path(f"/dev/shm/kvfetcher-test-{secrets.token_hex(4)}-arena")
    path.write_bytes(b"x")
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, str(path).removesuffix("arena")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    server = int(process.stdout.readline())
    yield process, server, path
    process.kill()
    process.communicate()
    if is_running(server):
        os.kill(server, signal.SIGKILL)
    path.unlink(missing_ok=True)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_launcher_takes_its_server_and_files_with_it(launcher):
    process, server, path = launcher
    process.kill()
    deadline = time.monotonic() + 20
    while is_running(server) or path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_dismissed_guardian_leaves_everything(launcher):
    process, server, path = launcher
    process.stdin.write("done\n")
    process.stdin.flush()
    assert process.wait(20) == 0
    time.sleep(0.5)
    assert is_running(server)
    assert path.exists()
