"""What a model replied to another request is noticed by the step behind it."""

import pytest

from kvfetcher import wire
from kvfetcher.backend.tags import compare, prompt_tag, unit_tag
from kvfetcher.errors import FormatError, MixedUpError
from kvfetcher.format.unit import parse_unit
from kvfetcher.format.unit_rest import without_bitstream
from kvfetcher.launcher.probe import probe_unit
from kvfetcher.memory.vitals import take_suspects


def test_a_foreign_reply_is_refused_and_its_model_named(tmp_path):
    compare("same", "same", model=wire.KV_DECODE, run_folder=tmp_path)
    assert take_suspects(tmp_path) == ()
    with pytest.raises(MixedUpError, match="kv_decode replied to another request"):
        compare("a", "b", model=wire.KV_DECODE, run_folder=tmp_path)
    assert take_suspects(tmp_path) == (wire.KV_DECODE,)
    assert take_suspects(tmp_path) == ()


def test_prompts_have_tags_of_their_own():
    texts = ["", "a", "b", "ab", "a\0", "é", "e\u0301"]
    assert len({prompt_tag(text) for text in texts}) == len(texts)


def test_a_unit_and_what_is_left_of_it_have_one_tag():
    unit = probe_unit()
    rest = without_bitstream(parse_unit(unit))
    assert unit_tag(unit, "t") == unit_tag(rest, "t")
    assert unit_tag(unit, "t") != unit_tag(unit, "u")


def test_units_that_differ_in_a_fact_have_tags_of_their_own():
    unit = bytearray(probe_unit())
    tags = set()
    for at in range(24, 80):  # every byte that says what the unit holds
        changed = bytearray(unit)
        changed[at] ^= 1
        tags.add(unit_tag(bytes(changed), ""))
    assert len(tags | {unit_tag(bytes(unit), "")}) == 80 - 24 + 1


def test_bytes_too_short_for_a_unit_have_no_tag():
    with pytest.raises(FormatError, match="at least"):
        unit_tag(b"x" * 50, "")
