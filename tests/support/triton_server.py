"""Real tritonservers for tests: free ports, short time limits, small models written on the spot."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from kvfetcher.config import Config, load_config
from kvfetcher.errors import ServerError
from kvfetcher.launcher import TritonServer
from kvfetcher.launcher.installation import find_installation

_PORTS = range(15_000, 32_000)
# Open files: the kernel gives each lock back when this process ends, however it ends.
_reserved: dict[int, TextIO] = {}

IDENTITY_CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 0
input [ {{ name: "values" data_type: TYPE_INT32 dims: [ -1 ] }} ]
output [
  {{ name: "same" data_type: TYPE_INT32 dims: [ -1 ] }},
  {{ name: "facts" data_type: TYPE_STRING dims: [ 1 ] }}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""

IDENTITY_MODEL = """
import json
import os
import sys

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        facts = {
            "executable": sys.prefix,
            "run_dir": os.environ.get("KVFETCHER_RUN_DIR"),
            "config": os.environ.get("KVFETCHER_CONFIG"),
            "process": os.getpid(),
        }
        return [
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(
                        "same", pb_utils.get_input_tensor_by_name(request, "values").as_numpy()
                    ),
                    pb_utils.Tensor("facts", np.array([json.dumps(facts)], dtype=object)),
                ]
            )
            for request in requests
        ]
"""


def has_tritonserver() -> bool:
    """Whether a real tritonserver can run Python models here."""
    try:
        find_installation()
    except ServerError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports that no other test process gets while this one lives, all different.

    They lie below the range that the kernel gives to outgoing connections. Each is reserved by a
    lock on a file named after it, so that tests may run in several processes side by side.

    Raises:
        RuntimeError: too few ports are left.
    """
    folder = Path(tempfile.gettempdir()) / f"kvfetcher-test-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(found) == count:
            return found
        if port not in _reserved and _is_free(port) and _reserve(folder / str(port), port):
            found.append(port)
    raise RuntimeError(f"fewer than {count} free ports from {_PORTS[0]} to {_PORTS[-1]}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TIME_WAIT is no owner
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _reserve(path: Path, port: int) -> bool:
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return False
    _reserved[port] = lock
    return True


def server_config(config: Config | None = None, **server) -> Config:
    """`config` (default: no file, no environment) with free ports and limits fit for tests."""
    config = config or load_config(environ={})
    http, grpc, metrics = free_ports(3)
    settings = {
        "http_port": http,
        "grpc_port": grpc,
        "metrics_port": metrics,
        "ready_timeout_seconds": 120.0,
        "stop_timeout_seconds": 20.0,
    }
    return replace(config, server=replace(config.server, **{**settings, **server}))


def write_model(repository: Path, name: str, *, config: str, model: str | None) -> Path:
    """Put one model into `repository`; `model` None = an ensemble (an empty version folder)."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(config)
    if model is not None:
        (version / "model.py").write_text(model)
    return version.parent


def write_identity(repository: Path, name: str = "identity") -> Path:
    """A model that returns its input, and facts about its process."""
    return write_model(
        repository, name, config=IDENTITY_CONFIG.format(name=name), model=IDENTITY_MODEL
    )


__all__ = [
    "TritonServer",
    "free_ports",
    "has_tritonserver",
    "server_config",
    "write_identity",
    "write_model",
]
