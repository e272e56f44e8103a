"""A server on a GPU under NVIDIA's MPS: killed clients cost no answer, and the daemon goes with it.

With ``KVFETCHER_TEST_FAULTS_ON_CPU=1`` a stand-in takes the daemon's place (see `support.gpu_site`).
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from kvfetcher import wire
from kvfetcher.errors import KVFetcherError
from kvfetcher.launcher import mps, supervise
from kvfetcher.launcher.rundir import processes_of
from kvfetcher.launcher.stubs import is_running
from server.test_supervision import heal, watch
from support import mps_stand_in
from support.gpu_site import NUM_DECODERS, ON_CPU, QUESTIONS, open_site

pytestmark = [pytest.mark.gpu, pytest.mark.triton, pytest.mark.slow]

NUM_RESTORERS = 2
RESTART_SECONDS = 120.0
# A client of the daemon whose kernel writes where no memory is; says how its context ended.
FAULTY_CLIENT = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
source = b'''
.version 7.0
.target sm_70
.address_size 64
.visible .entry fault()
{
    .reg .u64 %place;
    .reg .u32 %value;
    mov.u64 %place, 64;
    mov.u32 %value, 1;
    st.global.u32 [%place], %value;
    ret;
}
'''
device, context, module, kernel = (ctypes.c_int(), *(ctypes.c_void_p() for _ in range(3)))
one, none = ctypes.c_uint(1), ctypes.c_void_p()
for status in (
    cuda.cuInit(0),
    cuda.cuDeviceGet(ctypes.byref(device), 0),
    cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device),
    cuda.cuModuleLoadData(ctypes.byref(module), source),
    cuda.cuModuleGetFunction(ctypes.byref(kernel), module, b"fault"),
    cuda.cuLaunchKernel(kernel, one, one, one, one, one, one, 0, none, none, none),
):
    assert status == 0, status
print("the context ended with", cuda.cuCtxSynchronize())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)  # a daemon of its own
        if ON_CPU:
            mps_stand_in.install(tmp_path_factory.mktemp("bin"), patch)
            patch.setattr(mps, "_has_driver", lambda: True)
        elif shutil.which(mps.MPS_CONTROL) is None and not os.environ.get("KVFETCHER_REQUIRE_GPU"):
            pytest.skip(f"{mps.MPS_CONTROL} not available: not tested")
        with open_site(
            tmp_path_factory.mktemp, mps="on", restore_instances=NUM_RESTORERS
        ) as opened:
            yield opened


def client_environ(site):
    """Of a process that the server's daemon has as a client."""
    folder = site.running.server.run_dir / "mps"
    return {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(folder)}


def ask_daemon(site, command):
    """The numbers in the answer of the server's daemon."""
    done = subprocess.run(
        [mps.MPS_CONTROL], env=client_environ(site), input=command + "\n", capture_output=True, text=True,
        timeout=30, check=True,
    )  # fmt: skip
    return set(map(int, re.findall(r"\d+", done.stdout)))


def environ_of(process):
    lines = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return dict(line.decode().split("=", 1) for line in lines if line)


def test_a_fetched_answer_is_the_computed_one_and_all_that_made_it_are_clients(site):
    site.expect_hit()
    site.used()  # by now every process has worked
    workers = {
        model: site.stubs(model) for model in (wire.KV_DECODE, wire.KV_RESTORE, wire.TENSORRT_LLM)
    }
    counts = {model: len(found) for model, found in workers.items()}
    assert counts == {
        wire.KV_DECODE: NUM_DECODERS, wire.KV_RESTORE: NUM_RESTORERS, wire.TENSORRT_LLM: 1
    }  # fmt: skip
    folder = client_environ(site)["CUDA_MPS_PIPE_DIRECTORY"]
    every = set().union(*workers.values())
    assert {environ_of(process)["CUDA_MPS_PIPE_DIRECTORY"] for process in every} == {folder}
    servers = ask_daemon(site, "get_server_list")
    assert len(servers) == 1
    if not ON_CPU:
        assert every <= ask_daemon(site, f"get_client_list {min(servers)}")


@pytest.mark.parametrize("model", [wire.KV_DECODE, wire.KV_RESTORE])
def test_a_killed_client_costs_no_answer_and_is_replaced(site, model, monkeypatch):
    site.expect_hit()
    old = site.stubs(model)
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = [pool.submit(site.ask, question) for question in QUESTIONS]
        os.kill(min(old), signal.SIGKILL)
        repair = heal(site.supervisor)
        # A fault that spread to other clients would take more repairs, and end here, too.
        repairs = [repair, *watch(site.supervisor, answers)]
        for answer in answers:
            answer.result()  # `ask` has compared it with the computed one
        hit = pool.submit(site.expect_hit)
        repairs += watch(site.supervisor, [hit])
        hit.result()
    assert [(each.kind, each.models) for each in repairs] == [("reload", (model,))]
    # What is left of the old model ends now, not in a while: the stop would wait for it.
    monkeypatch.setattr(supervise, "_RETIRE_SECONDS", 0.0)
    assert site.supervisor.look() is None
    new = site.stubs(model)
    assert len(new) == len(old)
    assert not new & old
    site.expect_hit()


def fail_fatally(site):
    """A fatal GPU error in one more client; on a CPU, what it does to all others."""
    if ON_CPU:
        for model in (wire.KV_DECODE, wire.KV_RESTORE, wire.TENSORRT_LLM):
            for process in site.stubs(model):
                os.kill(process, signal.SIGKILL)
        return
    done = subprocess.run(
        [sys.executable, "-c", FAULTY_CLIENT], env=client_environ(site), capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    found = re.search(r"the context ended with (\d+)", done.stdout)
    assert found, done.stderr
    assert int(found[1]) != 0, "the error was none"


def test_a_fatal_gpu_error_ends_all_clients_and_the_server_is_started_again(site):
    site.expect_hit()
    before, old = site.used(), {stub.process_id for stub in site.running.server.stubs()}
    fail_fatally(site)
    # Who uses the GPU next finds that its context is lost.
    repairs, deadline = [], time.monotonic() + RESTART_SECONDS
    with ThreadPoolExecutor(1) as pool:
        while not any(repair.kind == "restart" for repair in repairs):
            assert time.monotonic() < deadline, f"not started again: {repairs}"
            answer = pool.submit(site.ask)
            repairs += watch(site.supervisor, [answer], seconds=RESTART_SECONDS)
            error = answer.exception()
            assert error is None or isinstance(error, (KVFetcherError, InferenceServerException))
            if (repair := site.supervisor.look()) is not None:
                repairs.append(repair)
    assert not old & {stub.process_id for stub in site.running.server.stubs()}
    site.expect_hit()  # and the answer is the one of before
    site.expect_nothing_left(before)


def test_after_the_stop_neither_daemon_nor_folder_is_left(site):
    server = site.running.server
    run_dir = server.run_dir
    site.running.settle()
    daemons = set(processes_of(run_dir, variable=mps._OWNER_VARIABLE))
    daemons |= ask_daemon(site, "get_server_list")
    assert len(daemons) >= 2, "the daemon and its server"
    assert server.stop() is True
    assert not [process for process in daemons if is_running(process)]
    assert not run_dir.exists()
