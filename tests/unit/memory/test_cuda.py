"""What is said of GPUs that cannot be used; the rest of `cuda` is tested on a GPU."""

import ctypes
from types import SimpleNamespace

import pytest

from kvfetcher.errors import DecoderUnavailableError
from kvfetcher.memory import cuda


def count_two(count):
    count._obj.value = 2
    return 0


def test_a_gpu_that_is_not_there_is_named_with_how_many_there_are(monkeypatch):
    driver = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGetCount=count_two)
    monkeypatch.setattr(ctypes, "CDLL", lambda library: driver)
    with pytest.raises(DecoderUnavailableError, match=r"no GPU 2 here: CUDA counts 2, from 0"):
        cuda.CudaContext(2)
