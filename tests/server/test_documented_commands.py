"""The commands of README and docs/ that need a server, run as they stand there."""

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from kvfetcher.config import dump_config
from server.conftest import DOCUMENT

pytestmark = [pytest.mark.triton, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("generate", "warm", "config", "store", "inspect", "doctor")


def command_lines():
    """Command lines of code blocks that run within seconds, each once."""
    found = set()
    for path in PAGES:
        for block in re.findall(r"^```\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = (
                    shlex.split(line, comments=True) if "'" not in line or "curl" in line else []
                )
                if words and words[0] in ("kvfetcher", ".venv/bin/kvfetcher") and words[1] in RUN:
                    found.add(shlex.join(["kvfetcher", *words[1:]]))
                elif words and words[0] == "curl":
                    found.add(shlex.join(words))
    return sorted(found)


LINES = command_lines()


@pytest.fixture(scope="module")
def place(running, tmp_path_factory):
    """A folder with what the commands name, and the environment that leads to the server."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "kvfetcher.toml").write_text(dump_config(running.config))
    document = DOCUMENT[:2_000]
    (folder / "document.txt").write_text(document)
    readmes = folder / "tests" / "data" / "documents" / "references_and_borrowing.txt"
    readmes.parent.mkdir(parents=True)
    readmes.write_text(document)
    running.client.generate(document, max_tokens=1)
    (folder / "FILE").write_bytes(running.settle()[0].read_bytes())
    environ = {**os.environ, "KVFETCHER_CONFIG": str(folder / "kvfetcher.toml")}
    return folder, environ


@pytest.mark.parametrize("line", LINES)
def test_it_runs(line, running, place):
    folder, environ = place
    words = shlex.split(line)
    if words[0] == "kvfetcher":
        words[:1] = [sys.executable, "-m", "kvfetcher.cli"]
        if words[3] in ("generate", "warm"):
            words += ["--url", running.server.grpc_url]
    else:
        words = [word.replace("localhost:8000", running.server.http_url) for word in words]
    done = subprocess.run(
        words, cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    # `doctor` fails where this server has the ports that it would need.
    assert done.returncode in ((0, 1) if "doctor" in line else (0,)), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout or "warm" in line
    if words[0] == "curl":
        assert json.loads(done.stdout)["text_output"]


def test_all_kinds_are_there():
    assert {line.split()[0] for line in LINES} == {"kvfetcher", "curl"}
    assert set(RUN) - {"config"} <= {line.split()[1] for line in LINES}


def test_readmes_python_runs(running, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    code = code.replace("127.0.0.1:8001", running.server.grpc_url)
    exec(code, {"document": DOCUMENT[:1_000], "question": "\n\nWhat is a reference?"})  # noqa: S102
    assert capsys.readouterr().out.strip()


def test_operations_explains_what_a_running_server_says(running):
    page = (ROOT / "docs" / "operations.md").read_text()
    report = running.client.generate(DOCUMENT[:1_000], max_tokens=1).report.raw
    parts = [report, report["stages_ms"], report["engine"], report.get("gate") or {}]
    url = f"http://{running.server.metrics_url}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        series = set(re.findall(r"^# TYPE (kvfetcher_\w+)", answer.read().decode(), re.MULTILINE))
    assert series
    names = {name for part in parts for name in part} | series
    assert not {name for name in names if f"`{name}`" not in page}
