"""Real tritonservers for tests: free ports, short time limits, small models written on the spot."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from kvfetcher.config import Config, load_config
from kvfetcher.errors import ServerError
from kvfetcher.launcher import TritonServer
from kvfetcher.launcher.installation import find_installation

if TYPE_CHECKING:
    from pathlib import Path

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
    """Ports that were free a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


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
