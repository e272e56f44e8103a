"""Chunks written once (tests/data/golden/PROVENANCE.md) are read the same for ever."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from kvfetcher.codec.profiles import decode_unit, describe_chunk, restore_unit
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.container import check_unit, parse_header
from support import reference_reader

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def test_every_golden_file_is_expected_and_small():
    files = sorted(GOLDEN.glob("*.kvf"))
    assert [f.stem for f in files] == sorted(EXPECTED)
    assert sum(f.stat().st_size for f in files) < 200_000


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_golden_chunk_restores_to_the_recorded_values(name):
    data = (GOLDEN / f"{name}.kvf").read_bytes()
    assert hashlib.sha256(data).hexdigest() == EXPECTED[name]["file_sha256"]
    header = parse_header(data)
    decoder = VideoDecoder()
    for variant in header.variants:
        parts = []
        for entry in header.units_of(variant):
            unit = data[entry.offset : entry.stop]
            check_unit(header, entry, unit)
            parts.append(restore_unit(unit, decode_unit(unit, decoder)).values)
        values = np.concatenate(parts)
        assert list(values.shape) == EXPECTED[name]["values_shape"]
        assert hashlib.sha256(values.tobytes()).hexdigest() == EXPECTED[name]["values_sha256"]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_independent_reader_agrees_with_every_variant(name):
    data = (GOLDEN / f"{name}.kvf").read_bytes()
    header = parse_header(data)
    for variant in header.variants:
        fields, values = reference_reader.read_chunk(data, variant)
        assert hashlib.sha256(values.tobytes()).hexdigest() == EXPECTED[name]["values_sha256"]
        assert fields["token_ids"] == list(header.token_ids)
        assert fields["profile"] == header.profile
        assert fields["chunk_key"] == header.chunk_key
    assert describe_chunk(data)["num_tokens"] == values.shape[3]
