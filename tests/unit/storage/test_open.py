"""Which store the configuration opens."""

import re
import sys
from pathlib import Path

import pytest

from kvfetcher.cli import main
from kvfetcher.config import StoreConfig, load_config
from kvfetcher.errors import ConfigError
from kvfetcher.storage import LocalStore, open_backend


def test_a_folder_is_the_default(tmp_path):
    assert isinstance(open_backend(StoreConfig(path=str(tmp_path))), LocalStore)


@pytest.mark.parametrize(
    ("kind", "package", "url"), [("redis", "redis", "redis://h"), ("s3", "obstore", "s3://bkt")]
)
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, kind, package, url):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"kvfetcher.storage.{kind}", raising=False)
    with pytest.raises(ConfigError, match=rf"package {package}: pip install 'kvfetcher\[{kind}\]'"):
        open_backend(StoreConfig(kind=kind, url=url))


PAGE = (Path(__file__).parents[3] / "docs" / "stores.md").read_text()
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_documented_settings_load(tmp_path, text):
    path = tmp_path / "kvfetcher.toml"
    path.write_text(text)
    assert load_config(path, environ={}).store != StoreConfig()


def test_the_documented_commands_are_all_there_are(capsys):
    assert len(EXAMPLES) == 5
    with pytest.raises(SystemExit):
        main(["store", "--help"])
    (verbs,) = re.findall(
        r"^commands:\n +COMMAND\n((?: +.*\n)+)", capsys.readouterr().out, re.MULTILINE
    )
    listed = set(re.findall(r"^ {4}([a-z]+)", verbs, re.MULTILINE))
    assert listed == set(re.findall(r"^\| `kvfetcher store ([a-z]+)", PAGE, re.MULTILINE))
