from dataclasses import fields, replace

import pytest

from kvfetcher.config import (
    SECTIONS,
    Config,
    StoreConfig,
    dump_config,
    explain_config,
    is_setting_variable,
    load_config,
)
from kvfetcher.errors import ConfigError


def _load(tmp_path, text, **environ):
    path = tmp_path / "kvfetcher.toml"
    path.write_text(text)
    return load_config(path, environ=environ)


def test_defaults_need_no_file():
    assert load_config(environ={}) == Config()


def test_file_overrides_defaults_and_environment_overrides_the_file(tmp_path):
    text = '[server]\nhttp_port = 9000\ngrpc_port = 9001\n[store]\npath = "/somewhere"\n'
    config = _load(tmp_path, text, KVFETCHER_SERVER_HTTP_PORT="9100")
    assert (config.server.http_port, config.server.grpc_port) == (9100, 9001)
    assert str(config.store.folder) == "/somewhere"


def test_file_may_be_named_by_the_environment(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[server]\nlog_verbose = 2\n")
    assert load_config(environ={"KVFETCHER_CONFIG": str(path)}).server.log_verbose == 2


def test_environment_values_are_parsed_by_type():
    config = load_config(
        environ={
            "KVFETCHER_FETCH_ENABLED": "false",
            "KVFETCHER_FETCH_DEADLINE_SECONDS": "2.5",
            "KVFETCHER_CODEC_FRAME_SIZES": "640x360, 1280x720",
        }
    )
    assert config.fetch.enabled is False
    assert config.fetch.deadline_seconds == 2.5
    assert config.codec.frame_sizes == ("640x360", "1280x720")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sever]\nport = 1\n", r"unknown section \[sever\]"),
        ("server = 3\n", r"unknown section \[server\]"),
        ("[server]\nport = 1\n", "unknown key server.port"),
        ("[server]\nhttp_port = 0\n", "server.http_port must be >= 1 and <= 65535, got 0"),
        ('[server]\nhttp_port = "80"\n', "server.http_port must be int, got '80'"),
        ("[server]\nhttp_port = true\n", "server.http_port must be int, got True"),
        ('[fetch]\nenabled = "yes"\n', "fetch.enabled must be bool"),
        ('[store]\nkind = "tape"\n', "store.kind must be one of"),
        ("[codec]\nframe_sizes = [1]\n", "codec.frame_sizes must be a list of strings"),
        ("[codec]\nchunk_tokens = 100\n", "not a multiple of engine.tokens_per_block"),
        ("[server\n", "is not TOML"),
    ],
)
def test_wrong_file_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, text)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("KVFETCHER_FETCH_ENABLED", "maybe", "KVFETCHER_FETCH_ENABLED must be true or false"),
        ("KVFETCHER_SERVER_HTTP_PORT", "x", "KVFETCHER_SERVER_HTTP_PORT must be int"),
        ("KVFETCHER_SERVER_HTTP_PORT", "70000", "server.http_port must be"),
    ],
)
def test_wrong_environment_is_refused_by_name(variable, value, message):
    with pytest.raises(ConfigError, match=message):
        load_config(environ={variable: value})


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "absent.toml", environ={})


def test_explanation_names_every_setting_its_source_and_meaning(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[server]\nlog_verbose = 2\n")
    settings = {s.name: s for s in explain_config(path, environ={"KVFETCHER_SAVE_NICE": "3"})}
    assert set(settings) == {f"{n}.{f.name}" for n, c in SECTIONS.items() for f in fields(c)}
    assert all(s.doc for s in settings.values())
    assert settings["server.log_verbose"].source == str(path)
    assert settings["save.nice"].source == "$KVFETCHER_SAVE_NICE"
    assert settings["save.nice"].value == 3
    assert settings["save.enabled"].source == "default"


@pytest.mark.parametrize(
    "path", ["", 'a "quoted" \\ path', "tab\tnewline\n", "é 漢 \U0001f600 \x7f"]
)
def test_dumped_configuration_loads_as_it_was(tmp_path, path):
    config = replace(load_config(environ={}), store=StoreConfig(path=path, timeout_seconds=0.25))
    assert _load(tmp_path, dump_config(config)) == config


def test_setting_variables_are_told_from_others():
    assert is_setting_variable("KVFETCHER_SERVER_HTTP_PORT")
    assert not is_setting_variable("KVFETCHER_CONFIG")
    assert not is_setting_variable("KVFETCHER_REQUIRE_GPU")
    assert not is_setting_variable("HOME")
