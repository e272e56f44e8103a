"""tests/gpu/run: a test that did not run is a failure, whatever pytest says."""

import importlib.machinery
import importlib.util
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu" / "run"
PASSED = '<testcase classname="a" name="passes"/>'
SKIPPED = '<testcase classname="a" name="skips"><skipped message="no GPU"/></testcase>'
FAILED = '<testcase classname="a" name="fails"><failure message="no"/></testcase>'


@pytest.fixture
def script():
    loader = importlib.machinery.SourceFileLoader("gpu_run", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_run", loader))
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("cases", "status", "failed", "not_run"),
    [
        ([PASSED], 0, [], []),
        ([PASSED, SKIPPED], 1, [], ["a::skips"]),
        ([PASSED, FAILED], 1, ["a::fails"], []),
        ([], 1, [], []),
    ],
)
def test_tests_that_did_not_run_fail(script, monkeypatch, tmp_path, cases, status, failed, not_run):
    def pytest_run(command, *, env, **_):
        assert env["KVFETCHER_REQUIRE_GPU"] == "1"
        assert "tests/gpu/some.py" in command
        counts = f'tests="{len(cases)}" failures="{cases.count(FAILED)}" errors="0"'
        suite = f'<testsuite {counts} skipped="{cases.count(SKIPPED)}">{"".join(cases)}</testsuite>'
        (tmp_path / "junit.xml").write_text(f"<testsuites>{suite}</testsuites>")
        return subprocess.CompletedProcess(command, int(FAILED in cases))

    monkeypatch.setattr(script.subprocess, "run", pytest_run)
    result = script.tests(tmp_path / "junit.xml", ["tests/gpu/some.py"])
    assert (result["status"], result["failed"], result["not_run"]) == (status, failed, not_run)


def test_the_path_is_measured_within_its_budget(script, monkeypatch, tmp_path):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script, "machine", dict)
    monkeypatch.setattr(
        script.sys,
        "argv",
        ["run", "--only", "path", "--parts", "bare", "--output", str(tmp_path / "gpu.json")],
    )
    assert script.main() == 0
    (command,) = commands
    assert command[1].endswith("bench_gpu.py")
    assert command[-3:] == ["--budget-seconds=540.0", "--parts", "bare"]
