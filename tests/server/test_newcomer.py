"""A newcomer's path, with README's own text: an own model folder, `serve --openai`, the document in
chat form, the Python example, curl, and OpenAI's client."""

import json
import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from support.triton_server import free_ports

pytestmark = [pytest.mark.triton, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
KVFETCHER = [sys.executable, "-m", "kvfetcher.cli"]


def block(language, word):
    """The README's code block of a language that holds `word`."""
    found = [
        text
        for kind, text in re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
        if kind == language and word in text
    ]
    assert found, f"the README has no block with {word}"
    return found[0]


def command(word):
    """The words of the README's command that holds `word`."""
    text = block("", word).replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if word in line]
    return shlex.split(line, comments=True)


def run(arguments, **options):
    done = subprocess.run(
        arguments, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    """What `kvfetcher serve --openai --json` prints, over a model folder of one's own."""
    folder = tmp_path_factory.mktemp("newcomer")
    own = folder / "my-model"
    own.mkdir()
    for file in model.path.iterdir():
        (own / file.name).symlink_to(file)
    ports = dict(zip(("http", "grpc", "metrics"), map(str, free_ports(4)), strict=False))
    entrance = str(free_ports(1)[0])
    environ = {
        **os.environ,
        "KVFETCHER_ENGINE_MODEL": str(own),
        "KVFETCHER_STORE_PATH": str(folder / "store"),
    }
    flags = [part for name, port in ports.items() for part in (f"--{name}-port", port)]
    with (folder / "talk").open("w") as talk:
        process = subprocess.Popen(
            [*KVFETCHER, "serve", "--json", "--openai", entrance, *flags],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=talk,
            text=True,
        )
    with process, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            assert selector.select(timeout=200), (folder / "talk").read_text()
            line = process.stdout.readline()
            assert line, (folder / "talk").read_text()
            yield json.loads(line)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 0, (folder / "talk").read_text()


def test_the_document_in_chat_form(served):
    words = command("kvfetcher generate")
    assert words[0] == ".venv/bin/kvfetcher"
    arguments = [*KVFETCHER, *words[1:], "--url", served["grpc"], "--timeout", "200"]
    done = run(arguments)
    assert "borrow" in done.stdout.lower()
    assert "prompt tokens fetched" in done.stderr


def test_curl(served):
    words = command("curl -s")
    url = words[2].replace("localhost:8000", served["http"])
    done = run([*words[:2], url, *words[3:]])
    assert json.loads(done.stdout)["text_output"]


def test_the_python_example_hits_the_second_time(served):
    code = block("python", "kvfetcher_client").replace("127.0.0.1:8001", served["grpc"])
    document = (ROOT / "tests/data/documents/references_and_borrowing.txt").read_text()[:4000]
    before = f"document = {document!r}\nquestion = 'What is borrowing?'\n"
    run([sys.executable, "-c", before + code])
    deadline = time.monotonic() + 120
    while True:
        *_, line = run([sys.executable, "-c", before + code]).stdout.splitlines()
        hit = re.search(r"(\d+) *(\w*)$", line)
        assert hit, line
        # `fell_behind` and `slower_than_computing` are right answers on a busy machine.
        if int(hit[1]) or hit[2] in ("fell_behind", "slower_than_computing"):
            break
        assert time.monotonic() < deadline, "the prefix was not saved"
        time.sleep(1)


def test_openais_client(served):
    assert "serve --openai" in README
    with openai.OpenAI(base_url=served["openai"], api_key="unused", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["my-model"]
        answer = client.chat.completions.create(
            model="my-model", messages=[{"role": "user", "content": "Hello"}], max_tokens=5
        )
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
