"""Keeps a server working: reloads models whose processes died, restarts tritonserver where it must.

Triton 2.51 does not replace a Python process that died; its model goes on answering with errors.
Measured on it (CPU): loading the model again heals within 0.3 s (kv_decode) to 9 s (the engine),
and requests meanwhile are misses. What a load does not heal:

* a request that a dead *decoupled* model had open never ends, so its death restarts tritonserver,
  which ends such requests with an error;
* a request that reached a dead process keeps the old model for ever, with its healthy processes
  and its shared memory: here the processes are killed, the files in /dev/shm removed, and two
  minutes later their pages given back. What is waiting for that is bounded: above `MAX_LOST_BYTES`
  tritonserver is restarted.

`decide` is the whole policy, pure; `Supervisor` looks and acts.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvfetcher import wire
from kvfetcher.errors import ServerError
from kvfetcher.launcher.probe import NO_ANSWER, probe_pipeline
from kvfetcher.launcher.process import status_text
from kvfetcher.launcher.rundir import SHARED_MEMORY, shared_memory_prefix
from kvfetcher.launcher.stubs import Stub, is_running, is_stopped, work_seconds
from kvfetcher.memory.vitals import take_suspects

if TYPE_CHECKING:
    from kvfetcher.launcher.process import TritonServer

WINDOW_SECONDS = 600.0
"""Repairs are counted over this time."""
MAX_LOST_BYTES = 512 << 20
"""Shared memory of dead models that was not given back yet."""
MAX_RELOADS = 3
"""Reloads of one model within the window; the next repair restarts tritonserver."""

_LOOK_SECONDS = 0.2
# A process that was stopped (SIGSTOP, a debugger's detach) must not go on after Triton gave it up,
# which it does after 1 s: `backend.vitals` says why. It is killed before.
_STOPPED_SECONDS = 0.5
_FAILED_PROBES = 2
_PROBE_TIMEOUT_SECONDS = 20.0
# A process that ran, or waited for a processor, for this part of a probe that got no answer is busy,
# not dead. One that hangs has its heartbeat's thread alone: below 1 %.
_BUSY_PART = 0.05
# But after so many in a row (10 minutes) it works in vain: a loop without an end.
_MAX_BUSY_PROBES = 30
# A unit takes milliseconds, a chunk to encode seconds: then nothing of the old model still works.
_RETIRE_SECONDS = 10.0
# What queued at the dead model fails at a second per batch; a thousand units are through by then.
# From then on nobody reads or writes those pages, though tritonserver has them mapped.
_RECLAIM_SECONDS = 120.0
_MAX_BACKOFF_SECONDS = 60.0

_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Repair:
    """What is to be done."""

    kind: Literal["reload", "restart", "give_up"]
    reason: str
    models: tuple[str, ...] = ()
    """Models to load again, for "reload"."""
    delay_seconds: float = 0.0
    """Seconds to wait before the repair."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was done, for the count."""

    time_seconds: float
    model: str
    """"" = the whole server."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """What was seen of a server at one moment."""

    ended: str = ""
    """Why tritonserver does not run; empty = it does."""
    dead: tuple[str, ...] = ()
    """Models with a process that died."""
    dead_decoupled: tuple[str, ...] = ()
    """Those of them that are decoupled."""
    failed_probes: int = 0
    """Failures of kv_pipeline in a row."""
    probe_error: str = ""
    lost_bytes: int = 0
    """Shared memory of dead models."""


def decide(
    sighting: Sighting, history: tuple[Repaired, ...], *, now: float, max_repairs: int
) -> Repair | None:
    """The repair that a sighting calls for; None = all is well.

    Args:
        sighting: what is seen now.
        history: earlier repairs; those older than `WINDOW_SECONDS` do not count.
        now: seconds, of the clock of `history`.
        max_repairs: within the window; one more gives up.
    """
    recent = [done for done in history if now - done.time_seconds < WINDOW_SECONDS]
    models: tuple[str, ...] = ()
    if sighting.ended:
        reason = sighting.ended
    elif sighting.dead_decoupled:
        reason = f"a process of {', '.join(sighting.dead_decoupled)} died"
    elif sighting.dead:
        models = sighting.dead
        reason = f"a process of {', '.join(models)} died"
    elif sighting.failed_probes >= _FAILED_PROBES:
        models = (wire.KV_DECODE, wire.KV_RESTORE)
        reason = f"{wire.KV_PIPELINE} fails: {sighting.probe_error}"
    elif sighting.lost_bytes > MAX_LOST_BYTES:
        reason = f"models that died hold {sighting.lost_bytes >> 20} MiB of shared memory"
    else:
        return None
    if len(recent) >= max_repairs:
        return Repair(
            "give_up",
            f"{reason}; {len(recent)} repairs within {WINDOW_SECONDS:.0f} s did not last"
            " (server.max_repairs)",
        )
    reloads = [sum(1 for done in recent if done.model == model) for model in models]
    if models and max(reloads) < MAX_RELOADS:
        return Repair("reload", reason, models, _backoff(max(reloads)))
    return Repair("restart", reason, (), _backoff(sum(1 for done in recent if not done.model)))


def _backoff(num_before: int) -> float:
    """Nothing before the first, then 1, 2, 4 ... seconds."""
    return min(_MAX_BACKOFF_SECONDS, 2.0 ** (num_before - 1)) if num_before else 0.0


@dataclass(frozen=True, slots=True)
class _Retired:
    """The processes of a model that was loaded again."""

    stubs: tuple[Stub, ...]
    time_seconds: float


@dataclass(frozen=True, slots=True)
class _Lost:
    """Shared memory without a name that tritonserver still maps."""

    descriptor: int
    num_bytes: int
    time_seconds: float


@dataclass(slots=True)
class _Known:
    """The processes that should run, and what is left of others."""

    stubs: dict[int, Stub] = field(default_factory=dict)
    retired: tuple[_Retired, ...] = ()
    lost: tuple[_Lost, ...] = ()
    stopped_since: dict[int, float] = field(default_factory=dict)


class Supervisor:
    """Watches and repairs one started `TritonServer`. Not thread-safe.

    `run` must be called in the thread that started the server, because it may start it again.
    """

    def __init__(self, server: TritonServer) -> None:
        self._server = server
        self._config = server.config.server
        self._history: list[Repaired] = []
        self._known = _Known()
        self._prober: _Prober | None = None
        self._learn()

    def run(self) -> None:
        """Watch until the server cannot be kept working.

        Raises:
            ServerError: given up; says why, with the last lines of the log.
        """
        try:
            while True:
                self.look()
                time.sleep(_LOOK_SECONDS)
        finally:
            self.close()

    def look(self) -> Repair | None:
        """Look once and repair what needs it. Returns the repair that was tried.

        Raises:
            ServerError: given up, or tritonserver cannot be started again.
        """
        self._tidy(time.monotonic())
        if self._server.is_alive():
            self._end_wrong_ones()
        sighting = self._sight()
        repair = decide(
            sighting,
            tuple(self._history),
            now=time.monotonic(),
            max_repairs=self._config.max_repairs,
        )
        if repair is None:
            return None
        if repair.kind == "give_up":
            self.close()
            raise ServerError(f"{repair.reason}\n{self._server.log_tail()}")
        _log.warning("%s; %s", repair.reason, _intention(repair))
        time.sleep(repair.delay_seconds)
        if repair.kind == "reload":
            self._reload(repair.models)
        else:
            self._restart()
        return repair

    def close(self) -> None:
        """Stop probing; the server is left as it is. Safe to call twice."""
        if self._prober is not None:
            self._prober.close()
            self._prober = None
        for lost in self._known.lost:
            os.close(lost.descriptor)
        self._known.lost = ()

    def _end_wrong_ones(self) -> None:
        """Kill processes that must not go on: stopped ones, and those that replied wrongly.

        A stopped tritonserver is killed, too: it answers nobody, and its clients wait for it.
        """
        suspects = take_suspects(self._server.run_dir)
        now = time.monotonic()
        processes = [*self._known.stubs, self._server.process_id]
        stopped = {process for process in processes if is_stopped(process)}
        since = self._known.stopped_since
        self._known.stopped_since = {process: since.get(process, now) for process in stopped}
        for process, moment in self._known.stopped_since.items():
            if now - moment >= _STOPPED_SECONDS:
                _log.warning("process %d was stopped by a signal and is killed", process)
                _kill(process)
        for stub in self._known.stubs.values():
            if stub.model in suspects:
                _log.warning("%s replied to another request and is killed", stub.model)
                _kill(stub.process_id)

    def _sight(self) -> Sighting:
        if not self._server.is_alive():
            return Sighting(ended=self._why_ended())
        dead = {
            stub.model for stub in self._known.stubs.values() if not is_running(stub.process_id)
        }
        failed, error = self._prober.failures if self._prober else (0, "")
        return Sighting(
            dead=tuple(sorted(dead)),
            dead_decoupled=tuple(sorted(m for m in dead if self._server.is_decoupled(m))),
            failed_probes=failed,
            probe_error=error,
            lost_bytes=sum(lost.num_bytes for lost in self._known.lost),
        )

    def _why_ended(self) -> str:
        if (status := self._server.exit_status) is not None:
            return f"tritonserver ended by itself ({status_text(status)})"
        return "tritonserver could not be started again"

    def _reload(self, models: tuple[str, ...]) -> None:
        for model in models:
            started = time.monotonic()
            self._history.append(Repaired(started, model))
            try:
                self._server.reload(model)
            except ServerError as exc:  # its old processes stay known: the next look tries again
                _log.warning("%s", exc)
                continue
            old = [stub for stub in self._known.stubs.values() if stub.model == model]
            self._known.retired += (_Retired(tuple(old), time.monotonic()),)
            for stub in old:
                del self._known.stubs[stub.process_id]
            retired = {stub.process_id for group in self._known.retired for stub in group.stubs}
            for stub in self._server.stubs():
                if stub.model == model and stub.process_id not in retired:
                    self._known.stubs[stub.process_id] = stub
            _log.warning("%s was loaded again in %.1f s", model, time.monotonic() - started)
        if self._prober is not None:
            self._prober.forget()

    def _restart(self) -> None:
        started = time.monotonic()
        self._history.append(Repaired(started, ""))
        self.close()
        if self._server.is_started():
            _log.warning("its log is kept in %s", self._server.keep_log())
        # No graceful stop: requests that wait for a dead process would hold it up.
        self._server.kill()
        self._server.stop()
        try:
            self._server.start()
        except ServerError as exc:  # the next look tries again, or gives up
            _log.warning("%s", exc)
            return
        self._learn()
        _log.warning("tritonserver was started again in %.1f s", time.monotonic() - started)

    def _learn(self) -> None:
        self._known = _Known({stub.process_id: stub for stub in self._server.stubs()})
        names = {stub.model for stub in self._known.stubs.values()}
        if self._config.probe_seconds and {wire.KV_DECODE, wire.KV_RESTORE} <= names:
            self._prober = _Prober(self._server, every_seconds=self._config.probe_seconds)

    def _tidy(self, now: float) -> None:
        """Clear away what is left of models that were loaded again a while ago."""
        known = self._known
        over = [group for group in known.retired if now >= group.time_seconds + _RETIRE_SECONDS]
        known.retired = tuple(group for group in known.retired if group not in over)
        for stub in (stub for group in over for stub in group.stubs):
            if is_running(stub.process_id):
                _kill(stub.process_id)
            self._remove_plane_table(stub)
            lost = _remove_region(stub.region, now)
            known.lost += (lost,) if lost else ()
        quiet = [lost for lost in known.lost if now >= lost.time_seconds + _RECLAIM_SECONDS]
        known.lost = tuple(lost for lost in known.lost if lost not in quiet)
        for lost in quiet:
            _give_back(lost)

    def _remove_plane_table(self, stub: Stub) -> None:
        """What a decoder that was killed leaves; the name is `gpu_coding.GpuOutput`'s."""
        prefix = shared_memory_prefix(self._server.run_dir)
        (SHARED_MEMORY / f"{prefix}planes-{stub.process_id}").unlink(missing_ok=True)


def _kill(process_id: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)


def _remove_region(name: str, now: float) -> _Lost | None:
    """Remove a file of /dev/shm; None = tritonserver did so, because the model ended in order."""
    path = SHARED_MEMORY / name
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    path.unlink(missing_ok=True)
    return _Lost(descriptor, os.fstat(descriptor).st_blocks * 512, now)


def _give_back(lost: _Lost) -> None:
    """Free the pages; a process that has them mapped reads zeros."""
    size = os.fstat(lost.descriptor).st_size
    ctypes.CDLL(None, use_errno=True).fallocate(
        lost.descriptor, _PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(size)
    )
    left = os.fstat(lost.descriptor).st_blocks * 512
    os.close(lost.descriptor)
    _log.info("%d MiB of a model that died were given back", (lost.num_bytes - left) >> 20)


def _intention(repair: Repair) -> str:
    what = (
        f"loading {', '.join(repair.models)} again"
        if repair.kind == "reload"
        else "starting tritonserver again"
    )
    return f"{what} in {repair.delay_seconds:g} s" if repair.delay_seconds else what


class _Prober:
    """Probes kv_pipeline from a thread of its own, because a probe may take its time.

    A probe without an answer is a failure only where the processes do not work: on a busy machine
    they are slow, and loading them again would make them slower.
    """

    def __init__(self, server: TritonServer, *, every_seconds: float) -> None:
        self._host, _, port = server.http_url.rpartition(":")
        self._port = int(port)
        self._headers = server.config.server.restricted_headers
        self._every_seconds = every_seconds
        self._lock = threading.Lock()
        self._failures = (0, "")
        self._num_busy = 0
        self._stubs = server.stubs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvfetcher-probe", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> tuple[int, str]:
        """Failures in a row, and what the last one was."""
        with self._lock:
            return self._failures

    def forget(self) -> None:
        """Start counting anew."""
        with self._lock:
            self._failures = (0, "")

    def close(self) -> None:
        """Stop; a probe under way is left to end by itself."""
        self._stop.set()

    def _run(self) -> None:
        host = self._host.strip("[]")
        while not self._stop.wait(self._every_seconds):
            started, worked = time.monotonic(), self._work_seconds()
            error = probe_pipeline(
                host,
                self._port,
                timeout_seconds=_PROBE_TIMEOUT_SECONDS,
                headers=self._headers,
            )
            if error.startswith(NO_ANSWER) and self._is_busy(
                self._work_seconds() - worked, time.monotonic() - started
            ):
                _log.warning("%s is slow (%s): the machine is busy", wire.KV_PIPELINE, error)
                continue
            self._num_busy = 0
            with self._lock:
                self._failures = (self._failures[0] + 1, error) if error else (0, "")

    def _work_seconds(self) -> float:
        models = (wire.KV_DECODE, wire.KV_RESTORE)
        return sum(work_seconds(s.process_id) for s in self._stubs() if s.model in models)

    def _is_busy(self, worked_seconds: float, probe_seconds: float) -> bool:
        """Whether the processes got on while a probe waited, and may still be waited for."""
        self._num_busy += 1
        return worked_seconds > _BUSY_PART * probe_seconds and self._num_busy <= _MAX_BUSY_PROBES
