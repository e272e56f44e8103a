"""A stand-in for nvidia-cuda-mps-control: folder, socket, commands and processes, but no GPU.

What it does otherwise is in $MPS_STAND_IN: "absent" (starts no daemon, and says it did), "refuses"
(ends with 1), "faulty" (its server fails), "short" (its server ends), "slow" (its server takes a
while), "deaf" (does not heed `quit`). What happened is in the file $MPS_STAND_IN_LOG, a JSON line each.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

NAME = "nvidia-cuda-mps-control"
SLOW_SECONDS = 0.6


def install(folder, monkeypatch, *, manner=""):
    """Put the stand-in first on PATH. Returns the file with what happened (`events`)."""
    folder.mkdir(exist_ok=True)
    program, log = folder / NAME, folder / "events.jsonl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("MPS_STAND_IN", manner)
    monkeypatch.setenv("MPS_STAND_IN_LOG", str(log))
    return log


def events(log):
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def main():
    pipe = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if sys.argv[1:] == ["-d"]:
        return start(pipe)
    status = 0
    for line in sys.stdin:
        with socket.socket(socket.AF_UNIX) as peer:
            try:
                peer.connect(str(pipe / "control"))
            except OSError:
                sys.stdout.write("Cannot find MPS control daemon process\n")
                status = 1
                continue
            peer.sendall(line.encode())
            peer.shutdown(socket.SHUT_WR)
            sys.stdout.write(peer.makefile().read())
    return status


def start(pipe):
    manner = os.environ.get("MPS_STAND_IN", "")
    note(what="start", environ=dict(os.environ))
    if manner == "refuses":
        sys.stdout.write("no such device\n")
        return 1
    if manner != "absent" and os.fork() == 0:
        os.setsid()
        Daemon(pipe, manner).serve()
    return 0


class Daemon:
    def __init__(self, pipe, manner):
        self.pipe, self.manner = pipe, manner
        self.server, self.since = 0, 0.0

    def serve(self):
        (self.pipe / f"{NAME}.pid").write_text(f"{os.getpid()}\n")
        logs = Path(os.environ["CUDA_MPS_LOG_DIRECTORY"])
        (logs / "control.log").write_text("Starting control daemon\n")
        note(what="daemon", process=os.getpid())
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.pipe / "control"))
            listener.listen()
            while True:
                peer, _ = listener.accept()
                with peer, peer.makefile("rw") as stream:
                    command = stream.readline().strip()
                    note(what="command", command=command)
                    stream.write(self.answer(command))

    def answer(self, command):
        if command.startswith("start_server"):
            if not self.server:
                self.start_server()
            return ""
        if command == "get_server_list":
            return f"{self.server}\n" if self.server_is_listed() else ""
        if command.startswith("get_server_status"):
            if self.manner == "faulty":
                return "FAULT\n"
            is_new = time.monotonic() < self.since + SLOW_SECONDS
            starts = self.manner == "short" or (self.manner == "slow" and is_new)
            return "INITIALIZING\n" if starts else "ACTIVE\n"
        if command == "quit" and self.manner != "deaf":
            if self.server:
                os.kill(self.server, signal.SIGKILL)
                os.waitpid(self.server, 0)
            os._exit(0)
        return ""

    def start_server(self):
        self.server, self.since = os.fork(), time.monotonic()
        if self.server == 0:
            os.closerange(3, 100)  # else who asked for it would wait for the end of the answer
            signal.pause()
        note(what="server", process=self.server)

    def server_is_listed(self):
        ended = self.manner == "short" and time.monotonic() > self.since + SLOW_SECONDS
        return self.server and not ended


def note(**event):
    with open(os.environ["MPS_STAND_IN_LOG"], "a") as log:  # noqa: PTH123 - as quick as it gets
        log.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    sys.exit(main())
