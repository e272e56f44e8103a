"""Start-up checks and process settings that every model shares."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvfetcher.backend.vitals import pulse
from kvfetcher.config import MPS_PIPE_VARIABLE
from kvfetcher.errors import ConfigError

if TYPE_CHECKING:
    from kvfetcher.config import Config

_LAST_ANSWER_SECONDS = 0.2

# NVIDIA's Multi-Process Service reads these from a process's environment when CUDA starts in it.
_MPS_PRIORITY_VARIABLE = "CUDA_MPS_CLIENT_PRIORITY"
_MPS_PERCENT_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
_MPS_BELOW_NORMAL = "1"

_log = logging.getLogger(__name__)


class _TritonLogHandler(logging.Handler):
    """Sends the package's log records to Triton's log."""

    def __init__(self, logger: Any, model: str) -> None:
        super().__init__()
        self._logger = logger
        self._model = model

    def emit(self, record: logging.LogRecord) -> None:
        text = f"[{self._model}] {self.format(record)}"
        if record.levelno >= logging.ERROR:
            self._logger.log_error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.log_warn(text)
        else:
            self._logger.log_info(text)


def check_stub(args: dict[str, str], pb_utils: Any) -> None:
    """Refuse an interpreter that would garble tensors, and bridge logging to Triton's.

    The process's pulse begins here (`backend.vitals`).

    Raises:
        ConfigError: numpy is 2 or newer.
    """
    if int(np.__version__.split(".")[0]) >= 2:
        raise ConfigError(
            f"numpy {np.__version__} in Triton's Python stub: its tensors would be garbled without"
            " an error; install numpy<2 into this interpreter"
        )
    logger = logging.getLogger("kvfetcher")
    logger.setLevel(logging.INFO)
    logger.addHandler(_TritonLogHandler(pb_utils.Logger, args["model_name"]))
    logger.propagate = False
    pulse()


def num_instances(args: dict[str, str]) -> int:
    """Processes of this model, as its served configuration says."""
    groups = json.loads(args["model_config"])["instance_group"]
    return max(1, sum(int(group["count"]) for group in groups))


def instance_index(args: dict[str, str]) -> int:
    """Which process of this model this is, from 0.

    tritonserver names them ``kv_decode_0_<index>``, older ones a single process ``kv_decode_0``.
    """
    _, _, index = args["model_instance_name"].rpartition("_")
    return int(index) if index.isdecimal() else 0


class DecoderShare(NamedTuple):
    """What one kv_decode process has of the GPUs that decode."""

    gpu: int
    ring_bytes: int
    """Memory there for planes."""


def decoder_share(args: dict[str, str], config: Config) -> DecoderShare:
    """This kv_decode process's share: its GPU in turn, of that GPU's memory for planes a part."""
    gpus = config.nvdec_gpus
    num_sharing = -(-num_instances(args) // len(gpus))
    return DecoderShare(
        gpus[instance_index(args) % len(gpus)], config.server.plane_bytes // num_sharing
    )


def end_if_lost(is_lost: bool) -> None:
    """End this process soon: what is answered now still gets out, and `serve` loads its model anew.

    For a process whose CUDA context is lost: a new one heals what no call here can.
    """
    if is_lost:
        _log.error("the GPU's context is lost: this process ends, to be replaced")
        timer = threading.Timer(_LAST_ANSWER_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()


def lower_priority(nice: int) -> None:
    """Make this process yield the CPU to the engine, whose requests it must not delay.

    All its threads, and those to come, get nicer by `nice`, and do not take a core from a running
    thread when they wake up (`SCHED_BATCH`): a thread of the engine that loses its core holds up
    all others, which wait for it at the end of every matrix product.
    """
    for thread in (int(folder.name) for folder in Path("/proc/self/task").iterdir()):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            if os.sched_getscheduler(thread) == os.SCHED_OTHER:
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
            now = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(19, now + nice))


def yield_gpu(*, percent: int = 100) -> None:
    """Under NVIDIA's MPS, make this process's work on the GPU yield to the engine's.

    Its kernels get the priority below normal (a hint to the GPU's scheduler) and at most `percent`
    of the multiprocessors. To be called before anything starts CUDA in this process. Without
    $CUDA_MPS_PIPE_DIRECTORY nothing happens; what the user's environment says already, stays.
    """
    if MPS_PIPE_VARIABLE not in os.environ:
        return
    os.environ.setdefault(_MPS_PRIORITY_VARIABLE, _MPS_BELOW_NORMAL)
    if percent < 100:
        os.environ.setdefault(_MPS_PERCENT_VARIABLE, str(percent))
