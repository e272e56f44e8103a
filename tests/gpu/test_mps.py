"""A server on a GPU under NVIDIA's MPS: killed clients cost no answer, and the daemon goes with it.

With ``KVFETCHER_TEST_FAULTS_ON_CPU=1`` a stand-in takes the daemon's place (see `support.gpu_site`).
"""

import os
import re
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvfetcher import wire
from kvfetcher.server import mps, supervise
from kvfetcher.server.rundir import processes_of
from kvfetcher.server.stubs import is_running
from server.test_supervision import heal, watch
from support import mps_stand_in
from support.gpu_site import NUM_DECODERS, ON_CPU, QUESTIONS, open_site

pytestmark = [pytest.mark.gpu, pytest.mark.triton, pytest.mark.slow]

NUM_RESTORERS = 2


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


def ask_daemon(site, command):
    """The numbers in the answer of the server's daemon."""
    environ = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(site.running.server.run_dir / "mps")}
    done = subprocess.run(
        [mps.MPS_CONTROL], env=environ, input=command + "\n", capture_output=True, text=True,
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
    folder = str(site.running.server.run_dir / "mps")
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
