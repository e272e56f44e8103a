"""The examples in docstrings give what they say. The client's own are in client/test_examples.py."""

import doctest
import importlib
import pkgutil

import pytest

import kvfetcher
import kvfetcher_client

NEEDS_A_SERVER = {"kvfetcher_client.client"}


def modules_with_examples():
    for package in (kvfetcher, kvfetcher_client):
        for path in package.__path__:
            for found in pkgutil.walk_packages([path], f"{package.__name__}.", onerror=raise_it):
                spec = found.module_finder.find_spec(found.name)
                if ">>> " in spec.loader.get_source(found.name):
                    yield found.name


def raise_it(name):
    raise AssertionError(f"{name} cannot be imported")


NAMES = sorted(set(modules_with_examples()) - NEEDS_A_SERVER)


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_are_right(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed


def test_the_format_the_codec_and_the_client_have_examples():
    for package in ("kvfetcher.format.", "kvfetcher.codec.", "kvfetcher_client."):
        assert len([name for name in NAMES if name.startswith(package)]) > 1, package
