"""Ends a server whose launcher died, however it died: a small process that waits at a pipe.

The launcher holds the other end. When the pipe closes without a word, nobody will stop the server any
more: the guardian kills its process group (tritonserver and its Python stubs) and removes its files in
/dev/shm. The run folder stays for the next start, which finds the log there and clears it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys

_END_SECONDS = 5.0

# Of a program of its own: it must not depend on what the launcher has loaded, nor on its folder.
_PROGRAM = """\
import glob, os, signal, sys
if not sys.stdin.buffer.read(1):
    try:
        os.killpg(int(sys.argv[1]), signal.SIGKILL)
    except ProcessLookupError:
        pass
    for path in glob.glob(glob.escape(sys.argv[2]) + "*"):
        os.unlink(path)
"""


class Guardian:
    """Watches over one server until `dismiss`.

    Args:
        process_group: process group of tritonserver and its stubs.
        shared_memory: start of the paths of its files in /dev/shm.
    """

    def __init__(self, process_group: int, shared_memory: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(process_group), shared_memory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C is for the launcher alone
        )

    def dismiss(self) -> None:
        """The launcher has ended the server itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(b"x")
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
