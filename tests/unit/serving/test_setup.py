"""What model processes do to themselves."""

import os
import subprocess
import sys

ENDS = """
import threading
from kvfetcher.serving import setup
setup.end_if_lost({is_lost})
print("answered", flush=True)
threading.Event().wait({seconds})
"""


LOWERS = """
import os, threading
from pathlib import Path
from kvfetcher.serving import setup
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
