import importlib.util

import numpy as np
import pytest

from kvfetcher.codec import encoders, video
from kvfetcher.codec.encoders import choose_encoder
from kvfetcher.codec.hevc import encoder as own
from kvfetcher.errors import EncoderUnavailableError


@pytest.mark.parametrize("choice", ["auto", "own"])
def test_where_numba_is_the_own_encoder_is_chosen(choice):
    chosen = choose_encoder(choice)
    assert (chosen.name, chosen.encode, chosen.reason) == ("own", own.encode_planes, "")


def test_the_chosen_encoder_is_compiled():
    """No request may wait for the compiler: what is compiled for a type of samples is counted."""
    choose_encoder("own")
    compiled = own.slice_data.compiled()
    before = len(compiled.signatures)
    for dtype in (np.uint8, np.uint16):
        own.encode_planes(
            np.zeros((1, 3, 150, 150), dtype), bit_depth=8 if dtype == np.uint8 else 12
        )
    assert len(compiled.signatures) == before == 2


def test_without_numba_auto_is_libx265_and_own_an_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen = choose_encoder("auto")
    assert (chosen.name, chosen.encode) == ("x265", video.encode_planes)
    assert "needs numba" in chosen.reason
    with pytest.raises(EncoderUnavailableError, match="needs numba"):
        choose_encoder("own")


def test_libx265_can_be_asked_for():
    assert choose_encoder("x265") == encoders.ChosenEncoder(video.encode_planes, "x265", "")
