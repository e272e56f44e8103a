"""What model processes do to themselves."""

import subprocess
import sys

ENDS = """
import threading
from kvfetcher.serving import setup
setup.end_if_lost({is_lost})
print("answered", flush=True)
threading.Event().wait({seconds})
"""


def ended(*, is_lost, seconds):
    code = ENDS.format(is_lost=is_lost, seconds=seconds)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_process_without_its_gpu_answers_and_ends():
    done = ended(is_lost=True, seconds=50)
    assert (done.returncode, done.stdout) == (1, "answered\n")
    assert ended(is_lost=False, seconds=0.3).returncode == 0
