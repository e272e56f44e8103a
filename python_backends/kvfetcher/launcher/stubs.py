"""Which Python stubs a tritonserver has: one process per model instance (Linux)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_STUB = b"triton_python_backend_stub"


@dataclass(frozen=True, slots=True)
class Stub:
    """One model instance's process."""

    process_id: int
    model: str
    region: str
    """Name of its shared memory in /dev/shm."""


def find_stubs(server_process_id: int) -> tuple[Stub, ...]:
    """The running stubs of one tritonserver, in order of process id."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if _parent(int(folder.name)) != server_process_id:
            continue
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        # stub, <repository>/<model>/<version>/model.py, shared-memory region, ...
        if len(command) > 2 and command[0].endswith(_STUB):
            model = Path(command[1].decode()).parts[-3]
            found.append(Stub(int(folder.name), model, command[2].decode().lstrip("/")))
    return tuple(sorted(found, key=lambda stub: stub.process_id))


def is_running(process_id: int) -> bool:
    """Whether the process exists and has not ended (tritonserver does not reap its stubs)."""
    return _parent(process_id) is not None


def is_stopped(process_id: int) -> bool:
    """Whether a signal stopped the process; one under a debugger is not."""
    return _fields(process_id)[0] == "T"


def work_seconds(process_id: int) -> float:
    """Seconds that a process's threads ran or waited for a processor; 0 where it is gone.

    It grows while a process works, however little it gets of a busy machine, and stays where all
    its threads wait for something that does not come.
    """
    nanoseconds = 0
    for task in Path(f"/proc/{process_id}/task").glob("*/schedstat"):
        try:
            ran, waited, _ = task.read_text().split()
        except (OSError, ValueError):  # the thread ended, or a kernel without these figures
            continue
        nanoseconds += int(ran) + int(waited)
    return nanoseconds / 1e9


def _parent(process_id: int) -> int | None:
    """Parent of a process; None where it is gone or a zombie."""
    fields = _fields(process_id)
    return None if fields[0] in ("Z", "X") else int(fields[1])


def _fields(process_id: int) -> list[str]:
    """State, parent and so on; state X where the process is gone."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X"]
