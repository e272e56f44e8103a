"""`kvfetcher warm`: what it says where it cannot do its work."""

import json

import pytest

from kvfetcher_client import cli
from support.triton_server import free_ports


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ('{"a": 1}', "list of integers"), ("[1, 2.5]", "list of integers")],
)
def test_token_ids_that_are_none_are_refused(tmp_path, capsys, content, message):
    path = tmp_path / "ids.json"
    path.write_text(content)
    assert cli.main_warm(["--token-ids", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there_is_told(tmp_path, capsys):
    assert cli.main_warm(["--token-ids", str(tmp_path / "absent")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_nobody_there_is_one_line(tmp_path, capsys):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps([1, 2, 3]))
    url = f"127.0.0.1:{free_ports(1)[0]}"
    for prompt in (["some text"], ["--token-ids", str(path)]):
        assert cli.main_warm([*prompt, "--url", url]) == 1
        error = capsys.readouterr().err
        assert "is `kvfetcher serve` running" in error
        assert error.count("\n") == 1
