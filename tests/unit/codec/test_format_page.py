"""docs/format.md states the limits that the code enforces."""

import re
from pathlib import Path

from kvfetcher import spec
from kvfetcher.format import container, unit
from kvfetcher.format import pictures as base

PAGE = (Path(__file__).parents[3] / "docs" / "format.md").read_text()
UNITS = {"": 1, "bytes": 1, "MiB": 1 << 20, "GiB": 1 << 30}


def limits():
    """{what: [numbers]} of the table in section 7."""
    table = PAGE.split("## 7. Limits")[1].split("## 8.")[0]
    found = {}
    for what, numbers in re.findall(r"^\| (.+?) \| (.+?) \|$", table, re.MULTILINE)[1:]:
        values = []
        for number in numbers.split(", "):
            digits, unit_name = re.fullmatch(r"([0-9^,]+) ?(\w*)", number).groups()
            base_number, _, power = digits.replace(",", "").partition("^")
            values.append(int(base_number) ** int(power or 1) * UNITS[unit_name])
        found[what] = values
    return found


def test_limits_are_the_ones_of_the_code():
    assert limits() == {
        "chunk object, unit, raw section": [container.MAX_CHUNK_BYTES],
        "chunk header": [container.MAX_HEADER_BYTES],
        "tokens of a chunk": [container.MAX_CHUNK_TOKENS],
        "units, variants of a chunk": [container.MAX_UNITS, container.MAX_VARIANTS],
        "profile text": [container.MAX_PROFILE_BYTES],
        "`first_position`": [container.MAX_POSITION],
        "layers, KV heads, head dim": [1024, 1024, 4096],
        "params, sections of a unit": [unit.MAX_PARAMS_BYTES, unit.MAX_SECTIONS],
        "pictures of a unit": [base.MAX_FRAMES],
        "planes of a unit (one byte per sample at 8 bits, else two)": [base.MAX_PLANE_BYTES],
        "values of a unit": [base.MAX_VALUE_BYTES],
    }
    assert container.MAX_CHUNK_BYTES == unit.MAX_UNIT_BYTES


def test_page_is_of_this_version():
    assert f"# The KVFetcher format, version {spec.FORMAT_VERSION}\n" in PAGE
