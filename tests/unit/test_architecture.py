"""The product's parts and who may import whom: downward only, in every folder."""

import re

import pytest

from architecture import PACKAGE, between_children, cycles, fewest_upward, folders, imports

# From the ground up. A part imports what stands before it, never what stands after it.
ORDER = (
    "errors",
    "wire",
    "progress",
    "spec",
    "config",
    "format",
    "models",
    "memory",
    "codec",
    "storage",
    "prefill_rate",
    "fetch",
    "engines",
    "trtllm_connector",
    "save",
    "backend",
    "launcher",
    "calibration",
    "doctor",
    "openai",
    "bench",
    "chaos",
    "cli",
)

PAIRS = imports(PACKAGE)


def test_the_list_has_every_part():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert sorted(ORDER) == sorted(parts - {"__init__", "__pycache__"})


def test_the_page_on_architecture_has_every_part_in_this_order():
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text()
    table = page.partition("| package | what it holds |")[2].partition("\n\n")[0]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert tuple(name for cell in firsts for name in re.findall(r"`(\w+)`", cell)) == ORDER


def test_imports_point_downwards():
    height = {name: position for position, name in enumerate(ORDER)}
    upward = [
        f"{source} imports {target}"
        for source, target in sorted(PAIRS)
        if height[source.split(".")[0]] < height[target.split(".")[0]]
    ]
    assert not upward


@pytest.mark.parametrize("folder", folders(PAIRS))
def test_modules_and_packages_of_a_folder_import_in_one_direction(folder):
    assert not cycles(between_children(PAIRS, folder))


def test_imports_inside_functions_and_for_types_count(tmp_path):
    tree = tmp_path / "kvfetcher"
    (tree / "upper").mkdir(parents=True)
    (tree / "lower.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from kvfetcher.upper.part import Type\n"
    )
    (tree / "upper" / "part.py").write_text("def f():\n    from kvfetcher import lower\n")
    pairs = imports(tree)
    assert pairs == {("lower", "upper.part"), ("upper.part", "lower")}
    edges = between_children(pairs)
    assert cycles(edges) == [["lower", "upper"]]
    assert fewest_upward(edges) == 1
