"""Fixtures of the backend's tests."""

import pytest

from kvfetcher.config import RUN_DIR_VARIABLE


@pytest.fixture(autouse=True)
def run_folder(tmp_path, monkeypatch):
    """A run folder of the test's own."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(folder))
    return folder
