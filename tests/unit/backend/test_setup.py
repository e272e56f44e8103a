"""What model processes do to themselves."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from kvfetcher.backend import setup
from kvfetcher.config import load_config

ENDS = """
import threading
from kvfetcher.backend import setup
setup.end_if_lost({is_lost})
print("answered", flush=True)
threading.Event().wait({seconds})
"""


LOWERS = """
import os, threading
from pathlib import Path
from kvfetcher.backend import setup
said = threading.Event()
threading.Thread(target=said.wait).start()
setup.lower_priority(7)
later = threading.Thread(target=said.wait)
later.start()
for task in Path("/proc/self/task").iterdir():
    print(os.sched_getscheduler(int(task.name)), os.getpriority(os.PRIO_PROCESS, int(task.name)))
setup.lower_priority(19)
print(os.getpriority(os.PRIO_PROCESS, 0))
said.set()
"""


def test_every_thread_of_a_process_yields_also_those_before_and_after():
    command = [sys.executable, "-c", LOWERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    *threads, last = done.stdout.splitlines()
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert len(threads) >= 3
    assert set(threads) == {f"{os.SCHED_BATCH} {min(19, before + 7)}"}
    assert last == "19"


def ended(*, is_lost, seconds):
    code = ENDS.format(is_lost=is_lost, seconds=seconds)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_process_without_its_gpu_answers_and_ends():
    done = ended(is_lost=True, seconds=50)
    assert (done.returncode, done.stdout) == (1, "answered\n")
    assert ended(is_lost=False, seconds=0.3).returncode == 0


def args_of(name, count=1):
    """What Triton's stub hands to `initialize`."""
    groups = [{"count": count, "kind": "KIND_CPU"}]
    return {"model_instance_name": name, "model_config": json.dumps({"instance_group": groups})}


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("kv_decode_0_0", 0),
        ("kv_decode_0_13", 13),
        ("kv_decode_0", 0),
        ("my_decoders_2", 2),
        ("alone", 0),
    ],
)
def test_processes_know_their_number(name, index):
    assert setup.instance_index(args_of(name)) == index


@pytest.mark.parametrize(
    ("gpus", "count", "expected"),
    [
        ((), 2, [(3, 500), (3, 500)]),
        ((0,), 4, [(0, 250)] * 4),
        ((2, 0), 5, [(2, 333), (0, 333), (2, 333), (0, 333), (2, 333)]),
        ((0, 1, 2), 1, [(0, 1000)]),
    ],
)
def test_decoders_take_turns_on_the_gpus_and_share_each_ones_memory(gpus, count, expected):
    config = load_config(environ={})
    config = replace(
        config,
        server=replace(config.server, decode_gpus=gpus, plane_bytes=1000),
        engine=replace(config.engine, device="cuda:3"),
    )
    args = [args_of(f"kv_decode_0_{index}", count) for index in range(count)]
    assert [setup.decoder_share(each, config) for each in args] == expected


MPS_VARIABLES = (
    "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_CLIENT_PRIORITY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "percent", "expected"),
    [
        ({}, 50, (None, None, None)),
        ({"CUDA_MPS_PIPE_DIRECTORY": "/x"}, 100, ("/x", "1", None)),
        ({"CUDA_MPS_PIPE_DIRECTORY": "/x"}, 30, ("/x", "1", "30")),
        (
            {
                "CUDA_MPS_PIPE_DIRECTORY": "/x",
                "CUDA_MPS_CLIENT_PRIORITY": "0",
                "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "70",
            },
            30,
            ("/x", "0", "70"),
        ),
    ],
    ids=["without MPS", "priority alone", "both", "the user's"],
)
def test_under_mps_a_process_yields_the_gpu(monkeypatch, given, percent, expected):
    # Set and deleted here first, so that what the call sets goes with this test.
    for name in MPS_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    setup.yield_gpu(percent=percent)
    assert tuple(map(os.environ.get, MPS_VARIABLES)) == expected
