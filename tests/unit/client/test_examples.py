"""The examples in the client's docstrings, against a real server."""

import doctest
import functools

import pytest

from kvfetcher_client import client

pytestmark = pytest.mark.triton


def test_the_examples_are_right(server):
    names = {
        name: functools.partial(getattr(client, name), timeout_seconds=30)
        for name in ("Client", "AsyncClient")
    }
    at_server = {name: lambda url, make=make: make(server.grpc_url) for name, make in names.items()}
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    tests = [test for test in finder.find(client) if test.examples]
    for test in tests:
        test.globs.update(at_server)
        runner.run(test)
    assert len(tests) >= 3
    assert not runner.summarize(verbose=False).failed
