import importlib.util
from dataclasses import fields, replace
from pathlib import Path

import pytest

from kvfetcher.config import (
    SECTIONS,
    Config,
    StoreConfig,
    cache_home,
    dump_config,
    explain_config,
    is_setting_variable,
    load_config,
    store_credentials,
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
            "KVFETCHER_SERVER_DECODE_GPUS": "2, 0",
        }
    )
    assert config.fetch.enabled is False
    assert config.fetch.deadline_seconds == 2.5
    assert config.codec.frame_sizes == ("640x360", "1280x720")
    assert config.server.decode_gpus == (2, 0)


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
        (
            "[fetch]\ndeadline_seconds = 200\n",
            "fetch.deadline_seconds = 200 is more than fetch.lease_ttl_seconds = 120.0",
        ),
        ("[codec]\nframe_sizes = [1]\n", "codec.frame_sizes must be a list of strings"),
        ('[server]\ndecode_gpus = ["0"]\n', "server.decode_gpus must be a list of integers"),
        ("[server]\ndecode_gpus = [true]\n", "server.decode_gpus must be a list of integers"),
        ("[server]\ndecode_gpus = 1\n", "server.decode_gpus must be a list of integers, got 1"),
        ("[server]\ndecode_gpus = [0, -1]\n", "server.decode_gpus must be >= 0, got -1"),
        (
            "[server]\ndecode_gpus = [1, 0, 1]\n",
            r"server.decode_gpus must name each GPU once, got \[1, 0, 1\]",
        ),
        (
            '[store]\nkind = "redis"\n',
            "store.url must be redis:// or rediss:// with a host, got ''",
        ),
        ('[store]\nkind = "redis"\nurl = "s3://bkt"\n', "store.url must be redis://"),
        ('[store]\nkind = "redis"\nurl = "redis://h:0"\n', "store.url must be redis://"),
        ('[store]\nkind = "redis"\nurl = "redis://h:x"\n', "store.url must be redis://"),
        ('[store]\nkind = "redis"\nurl = "redis://h/db"\n', "'db' is not a database number"),
        ('[store]\nkind = "redis"\nurl = "redis://h/0?timeout=1"\n', "takes no options after"),
        ('[store]\nkind = "s3"\nurl = "s3://"\n', "store.url must be s3:// with a host"),
        ('[store]\nkind = "s3"\nurl = "s3://b/a b"\n', "prefix 'a b' must be made of"),
        (
            '[store]\nkind = "s3"\nurl = "s3://bkt"\nendpoint = "host:1"\n',
            "store.endpoint must be http:// or https://",
        ),
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
        ("KVFETCHER_SERVER_DECODE_GPUS", "0,x", "SERVER_DECODE_GPUS must be int, got 'x'"),
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
    ("device", "gpus", "decode"),
    [
        ("auto", (), (0,)),
        ("cpu", (), (0,)),
        ("cuda", (), (0,)),
        ("cuda:3", (), (3,)),
        ("cuda:3", (1, 0), (1, 0)),
    ],
)
def test_gpus_that_decode_are_the_named_ones_or_the_engines(device, gpus, decode):
    config = load_config(environ={})
    config = replace(
        config,
        engine=replace(config.engine, device=device),
        server=replace(config.server, decode_gpus=gpus),
    )
    assert config.nvdec_gpus == decode


@pytest.mark.parametrize(
    "path", ["", 'a "quoted" \\ path', "tab\tnewline\n", "é 漢 \U0001f600 \x7f"]
)
def test_dumped_configuration_loads_as_it_was(tmp_path, path):
    config = load_config(environ={})
    config = replace(
        config,
        store=StoreConfig(path=path, timeout_seconds=0.25),
        server=replace(config.server, decode_gpus=(3, 0)),
    )
    assert _load(tmp_path, dump_config(config)) == config


@pytest.mark.parametrize(
    "url", ["redis://u:s3cret@host/0", "redis://:s3cret@host", "rediss://u:s3cr@et@host:1/2"]
)
def test_credentials_in_a_url_are_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match=r"\$KVFETCHER_STORE_PASSWORD") as caught:
        StoreConfig(kind="redis", url=url)
    assert "s3cr" not in str(caught.value)


def test_store_addresses():
    redis = StoreConfig(kind="redis", url="rediss://cache.example:7000/3")
    assert redis.redis_address == ("cache.example", 7000, 3, True)
    assert StoreConfig(kind="redis", url="redis://[::1]").redis_address == ("::1", 6379, 0, False)
    assert StoreConfig(kind="s3", url="s3://kvs/team-a/chunks/").bucket == ("kvs", "team-a/chunks")
    assert StoreConfig(kind="s3", url="s3://kvs").bucket == ("kvs", "")


def test_store_credentials_are_in_no_output():
    environ = {"KVFETCHER_STORE_USERNAME": "kv-user", "KVFETCHER_STORE_PASSWORD": "s3cret"}
    credentials = store_credentials(environ=environ)
    assert (credentials.username, credentials.password) == ("kv-user", "s3cret")
    told = f"{credentials} {explain_config(environ=environ)} {dump_config(load_config(environ=environ))}"
    assert "kv-user" not in told
    assert "s3cret" not in told
    # Servers hand settings down in a file, but these by the environment.
    assert not any(map(is_setting_variable, environ))


def test_setting_variables_are_told_from_others():
    assert is_setting_variable("KVFETCHER_SERVER_HTTP_PORT")
    assert not is_setting_variable("KVFETCHER_CONFIG")
    assert not is_setting_variable("KVFETCHER_REQUIRE_GPU")
    assert not is_setting_variable("HOME")


def test_the_page_on_the_configuration_is_up_to_date():
    path = Path(__file__).parents[2] / "docs" / "build.py"
    spec = importlib.util.spec_from_file_location("build", path)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    page = path.with_name("configuration.md").read_text()
    assert page == build.configuration_page(), "run `python docs/build.py`"


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b'[store]\npath = "\xff"\n', "not UTF-8 \\(byte 16\\)"),
        (b"[store]\nx = " + b"[" * 100_000, "nested too deeply|not TOML"),
        (b"#" * (2 << 20), "more than 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, data, rule):
    path = tmp_path / "config.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rule):
        load_config(path, environ={})


def test_a_list_nested_too_deeply_is_named():
    with pytest.raises(ConfigError, match="must be a JSON list"):
        load_config(environ={"KVFETCHER_CODEC_FRAME_SIZES": "[" * 100_000})


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    """As in a container that runs under an id without a name."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        cache_home()
