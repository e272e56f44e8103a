"""Markers of what a machine may lack: skipped at home, failed where promised.

``KVFETCHER_REQUIRE_TRITON=1`` (set by ``make test``), ``KVFETCHER_REQUIRE_REDIS=1`` (set by
``.ci/run``) and ``KVFETCHER_REQUIRE_GPU=1`` run the marked tests even where the thing seems to be
missing, so that they fail instead of passing unseen.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random

import pytest
from hypothesis import HealthCheck, settings

from support.servers import RedisServer, S3Server, has_redis
from support.triton_server import has_tritonserver

# Of torch, here and in the processes that tests start; read once, when it is imported. The tests'
# models are small: a second thread of each computation hardly helps, and while it waits for a core
# that another process has, the first one spins.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shared machines stall: how long an example takes says nothing about it. Hypothesis's own profile for
# CI would try the same examples for ever.
settings.register_profile(
    "shared machine",
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("shared machine")


def pytest_configure(config: pytest.Config) -> None:
    # Chosen here, and handed to every worker process, so that one number repeats the whole run.
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(random.randrange(1 << 32))


def pytest_report_header(config: pytest.Config) -> str:
    return f"random examples: repeat them with --hypothesis-seed={config.option.hypothesis_seed}"


@functools.cache
def has_nvdec() -> bool:
    """Whether the driver's video decoder library can be loaded."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return False
    return True


REQUIRES = {
    "gpu": has_nvdec,
    "redis": has_redis,
    "triton": functools.cache(has_tritonserver),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
        for name, present in REQUIRES.items():
            if (
                item.get_closest_marker(name)
                and not os.environ.get(f"KVFETCHER_REQUIRE_{name.upper()}")
                and not present()
            ):
                item.add_marker(pytest.mark.skip(reason=f"{name} not available: not tested"))

    items.sort(key=lambda item: not _is_server_test(item))  # the longest groups start first


def _is_server_test(item: pytest.Item) -> bool:
    return item.path.parent.name == "server"


def _group(item: pytest.Item) -> str:
    """Which tests run in one process where several run: those of a file, and of the shared server."""
    if _is_server_test(item) and "running" in getattr(item, "fixturenames", ()):
        return "shared server"
    return str(item.path)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see the defaults, whatever the developer's shell sets."""
    for name in list(os.environ):
        if name.startswith("KVFETCHER_") and not name.startswith("KVFETCHER_REQUIRE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """One server for the whole run; tests empty it before they use it."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """One server for the whole run; each test has a prefix or bucket of its own."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server
