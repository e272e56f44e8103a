"""The fuzz targets hold for their seeds and for what a few mutations make of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.targets import targets
from support.examples import examples

TARGETS = targets()


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_pass(name):
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


@pytest.mark.parametrize("name", TARGETS)
@examples(60)
@given(data=st.data())
def test_mutated_seeds_are_read_or_refused(name, data):
    target = TARGETS[name]
    changed = bytearray(data.draw(st.sampled_from(target.seeds)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        new = data.draw(st.binary(max_size=4))
        changed[at : at + data.draw(st.integers(0, 4))] = new
    target.run(bytes(changed))


@pytest.mark.parametrize("name", ["config", "request", "internal_json", "control", "connector"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "9" * 100_000, '"\\ud800"'])
def test_deep_long_and_lone_values_are_refused(name, text):
    TARGETS[name].run(text.encode())
