"""docs/ and CONTRIBUTING.md say what the code does: names, links, commands, tables, pictures."""

import ast
import importlib.util
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from kvfetcher import cli
from kvfetcher.backend import metrics
from kvfetcher.codec.ladder.bar import QUALITY_BARS
from kvfetcher.config import SECTIONS, is_setting_variable
from kvfetcher.engines.base import GenerateTimings
from kvfetcher.fetch.planning.gate import Verdict
from kvfetcher.fetch.report import FetchReport, GateReport, Outcome, Reason
from kvfetcher.save import SaveReport
from kvfetcher.storage import StoreEvent

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LINKING = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "SECURITY.md", "findings/README.md"))]
OPERATIONS = (DOCS / "operations.md").read_text()


def ids(path):
    return str(path.relative_to(ROOT))


def module(path):
    """A program that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def explained():
    """Names in the first column of the tables of docs/operations.md."""
    firsts = re.findall(r"^\| (.*?) \|", OPERATIONS, re.MULTILINE)
    return {name for first in firsts for name in re.findall(r"`([a-z_0-9]*)`", first)}


def stages():
    """Every stage that the fetcher adds to `stages_ms`."""
    found = set()
    for path in (ROOT / "python_backends/kvfetcher/fetch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                at = {"add_ms": 0, "_timed": 1}.get(name)
                if at is not None and isinstance(node.args[at], ast.Constant):
                    found.add(node.args[at].value)
    return found


def events():
    return {event for part in get_args(StoreEvent) for event in get_args(part) or (part,)}


NAMES = {
    "outcomes": set(get_args(Outcome)),
    "reasons": set(get_args(Reason)) - {""},
    "fields": {f.name for f in fields(FetchReport)} | {"engine", "request_id"},
    "stages": stages(),
    "fields of gate": {f.name for f in fields(GateReport)},
    "verdicts": set(get_args(Verdict)),
    "fields of engine": {f.name for f in fields(GenerateTimings)},
    "metrics": set(metrics.NAMES),
    "events": events(),
}


@pytest.mark.parametrize("kind", NAMES)
def test_operations_explains_every_name(kind):
    assert len(NAMES[kind]) > 1
    missing = NAMES[kind] - explained()
    assert not missing, f"docs/operations.md has no row for {sorted(missing)}"


def test_operations_explains_every_field_of_real_reports():
    reports = json.loads((ROOT / "tests/benchmarks/results/demo_reports.json").read_text())
    assert {"miss", "hit"} <= set(reports)
    for facts in reports.values():
        report = facts["kv_report"]
        parts = [report, report["stages_ms"], report["engine"], report["gate"] or {}]
        assert not {name for part in parts for name in part} - explained()


def test_operations_explains_every_field_of_a_saves_report():
    assert not {f.name for f in fields(SaveReport) if f"`{f.name}`" not in OPERATIONS}


def test_operations_explains_no_metric_that_is_gone():
    assert {n for n in explained() if n.startswith("kvfetcher_")} == NAMES["metrics"]


@pytest.mark.parametrize("path", LINKING, ids=ids)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name) if name else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_every_setting_exists(path):
    known = {f"{name}.{f.name}" for name, cls in SECTIONS.items() for f in fields(cls)}
    named = set(re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_]+)`", path.read_text()))
    modules = {"codec.hevc", "codec.ladder", "codec.gpu", "storage.admin", "fetch.planning"}
    metrics_of_engines = {"engine.metrics"}
    assert named <= known | modules | metrics_of_engines


def commands(text):
    """Every `kvfetcher ...` in code blocks and between backticks."""
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ")
        yield from re.findall(r"(?:^|[ /])(kvfetcher (?!kvfetcher)[a-z].*)$", lines, re.MULTILINE)
    yield from re.findall(r"`(?:\.venv/bin/)?(kvfetcher [a-z][^`]*)`", text)


COMMANDS = {
    f"{path.name}: {command[:60]}": command
    for path in PAGES
    for command in commands(path.read_text())
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_and_their_flags_exist(command, capsys):
    words = shlex.split(command, comments=True)[1:]
    words = words[: words.index(">")] if ">" in words else words
    verbs = [word for word in words if not word.startswith("-")][:2]
    with pytest.raises(SystemExit) as ended:
        cli.main([*(verbs if words[0] in ("store", "bench") else verbs[:1]), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert flag in text, f"{command!r}: no flag {flag}"


def test_there_are_commands():
    assert len(COMMANDS) > 40


def test_the_page_on_the_codec_has_the_quality_bars():
    page = (DOCS / "codec.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\de.-]+) \| (\d+) % \| ([\d.]+) % \|$", page, re.MULTILINE)
    found = {name: (float(kl), int(top1), float(grows)) for name, kl, top1, grows in rows}
    assert found == {
        name: (
            bar.max_kl,
            100 * bar.min_top1_agreement,
            pytest.approx(100 * bar.max_perplexity_change),
        )
        for name, bar in QUALITY_BARS.items()
    }


def test_variables_exist():
    for path in PAGES:
        for name in re.findall(r"`\$?(KVFETCHER_[A-Z_]+)(?:=[^`]*)?`", path.read_text()):
            assert (
                is_setting_variable(name)
                or name in VARIABLES
                or name.startswith("KVFETCHER_REQUIRE_")
            ), f"{path.name}: {name}"


VARIABLES = {
    "KVFETCHER_CONFIG",
    "KVFETCHER_RUN_DIR",
    "KVFETCHER_MODEL_REPOSITORY",
    "KVFETCHER_STORE_USERNAME",
    "KVFETCHER_STORE_PASSWORD",
}


def test_written_files_are_what_the_program_writes():
    for path, text in module(DOCS / "build.py").outputs().items():
        assert path.read_text() == text, f"run `python docs/build.py`: {path.name} differs"


def test_pictures_name_what_they_show_and_know_dark_mode():
    for path in sorted((DOCS / "pictures").glob("*.svg")):
        text = path.read_text()
        assert "prefers-color-scheme" in text.replace(" ", "")
        assert "<title>" in text or "rate and quality" in text


def test_every_finding_has_its_form():
    scripts = sorted((ROOT / "findings").glob("*.sh"))
    page = (ROOT / "findings" / "README.md").read_text()
    assert re.findall(r"^\| `(.*?\.sh)`", page, re.MULTILINE) == [path.name for path in scripts]
    for path in scripts:
        text = path.read_text()
        head = text.partition("set -euo pipefail")[0]
        assert all(word in head for word in ("# Expected: ", "# Observed: ", "# Here: ")), path.name
        (used,) = re.findall(
            r"^# Here: .*?(kvfetcher/[\w/]+\.py|every unit)", head, re.MULTILINE
        ) or [""]
        assert used == "every unit" or (ROOT / "python_backends" / used).is_file(), path.name
        assert "import kvfetcher" not in text
        assert "from kvfetcher" not in text
        packages = re.findall(r" install (.*)$", text, re.MULTILINE)
        assert packages
        assert all("==" in name for line in packages for name in line.split())


@pytest.fixture(scope="module")
def report():
    return module(ROOT / "tests/benchmarks/report.py")


@pytest.mark.parametrize(
    ("page", "pattern", "make"),
    [
        ("codec", "codec_*", "table"),
        ("fetching", "fetch_*", "fetch_table"),
        ("fetching", "mixed_*", "mixed_table"),
        ("gpu", "gpu_path_*", "gpu_table"),
        ("gpu", "gpu_instances_*", "instances_table"),
    ],
)
def test_measurements_show_the_results(report, page, pattern, make):
    text = (DOCS / "measurements" / f"{page}.md").read_text()
    paths = sorted((ROOT / "tests/benchmarks/results").glob(f"{pattern}.json"))
    assert paths
    for path in paths:
        assert getattr(report, make)(json.loads(path.read_text())) in text, path.name
