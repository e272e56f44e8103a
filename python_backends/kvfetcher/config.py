"""Configuration: one TOML file, frozen typed dataclasses, the only reader of os.environ.

Order of sources, later wins: defaults below < the TOML file ($KVFETCHER_CONFIG or --config) <
environment ``KVFETCHER_<SECTION>_<FIELD>``. Unknown sections and keys are errors; nothing is
silently corrected. Every default of the project is in this file.
"""

from __future__ import annotations

import json
import os
import tomllib
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kvfetcher.errors import ConfigError

if typing.TYPE_CHECKING:
    import types
    from collections.abc import Mapping

CONFIG_VARIABLE = "KVFETCHER_CONFIG"
RUN_DIR_VARIABLE = "KVFETCHER_RUN_DIR"
_PREFIX = "KVFETCHER_"


def cache_home() -> Path:
    """Where downloaded models and the default store live: $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "kvfetcher"


def _option(default: Any, doc: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A field with its explanation and its allowed range (inclusive)."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high})


class _Section:
    """Checks types and ranges of every field once, at construction."""

    __slots__ = ()
    NAME: typing.ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):  # type: ignore[arg-type]
            _check(f"{self.NAME}.{f.name}", getattr(self, f.name), hints[f.name], f.metadata)


@dataclass(frozen=True, slots=True)
class ServerConfig(_Section):
    """Endpoints and life of tritonserver."""

    NAME: typing.ClassVar[str] = "server"

    host: str = _option("127.0.0.1", "address all three endpoints bind to")
    http_port: int = _option(8000, "HTTP endpoint", low=1, high=65535)
    grpc_port: int = _option(8001, "gRPC endpoint", low=1, high=65535)
    metrics_port: int = _option(8002, "Prometheus endpoint", low=1, high=65535)
    ready_timeout_seconds: float = _option(180.0, "longest wait for readiness", low=1, high=3600)
    stop_timeout_seconds: float = _option(
        60.0, "longest wait for running requests and pending saves at stop", low=1, high=3600
    )
    decode_instances: int = _option(
        0,
        "kv_decode processes; 0 = one per CPU core (at most 4), or one per NVDEC engine",
        low=0,
        high=64,
    )
    log_verbose: int = _option(0, "tritonserver --log-verbose", low=0, high=4)


@dataclass(frozen=True, slots=True)
class EngineConfig(_Section):
    """The LLM engine."""

    NAME: typing.ClassVar[str] = "engine"

    kind: Literal["torch"] = _option("torch", "which engine serves `tensorrt_llm`")
    model: str = _option(
        "smollm2-135m-instruct", "a built-in model's name, or a local Hugging Face model folder"
    )
    device: str = _option("auto", "auto, cpu or cuda[:N]")
    kv_dtype: Literal["bfloat16", "float16", "float8_e4m3fn"] = _option(
        "bfloat16", "type of the KV values that the engine keeps and shares"
    )
    tokens_per_block: int = _option(32, "tokens of one paged KV block", low=1, high=1024)
    arena_bytes: int = _option(
        1 << 30, "size of the shared KV arena (fetched and to-be-saved KV)", low=1 << 20
    )
    prefill_slice_tokens: int = _option(
        256,
        "prefill runs in slices of so many tokens, so that running streams go on",
        low=1,
        high=65536,
    )
    max_running_requests: int = _option(8, "requests that hold KV at one time", low=1, high=1024)
    max_waiting_requests: int = _option(256, "requests that queue; one more is refused", low=0)
    max_prompt_tokens: int = _option(
        0, "longest prompt; 0 = what the model's position range allows", low=0
    )
    max_output_tokens: int = _option(1024, "largest max_tokens of a request", low=1)
    num_threads: int = _option(0, "CPU threads of the engine; 0 = all cores", low=0, high=1024)


@dataclass(frozen=True, slots=True)
class CodecConfig(_Section):
    """How chunks are cut and coded."""

    NAME: typing.ClassVar[str] = "codec"

    profile: str = _option("exact", "profile that new chunks are saved with")
    chunk_tokens: int = _option(256, "tokens of one chunk (whole engine blocks)", low=16, high=8192)
    unit_layers: int = _option(
        0, "layers of one unit for `exact` and `paper`; 0 = chosen by the profile", low=0, high=1024
    )
    frame_sizes: tuple[str, ...] = _option(
        ("640x360",), "frame sizes a `paper` chunk is stored in, for adaptive resolution"
    )
    paper_bits: int = _option(8, "bits of the lossy quantiser of `paper`", low=2, high=12)
    decoder: Literal["auto", "cpu", "nvdec"] = _option(
        "auto",
        "what decodes units: auto = nvdec where it is usable, else cpu; nvdec must be usable",
    )
    calibration: str = _option(
        "", "calibration artifact (file) of the model, for near, balanced, compact and tiny"
    )
    allow_uncertified: bool = _option(
        False, "serve with a calibration that carries no certificate of its quality"
    )


@dataclass(frozen=True, slots=True)
class StoreConfig(_Section):
    """Where chunks live."""

    NAME: typing.ClassVar[str] = "store"

    kind: Literal["file"] = _option("file", "where chunks live")
    path: str = _option("", "folder of the file store; empty = <cache>/kvfetcher/store")
    timeout_seconds: float = _option(10.0, "longest wait for one store call", low=0.01, high=3600)

    @property
    def folder(self) -> Path:
        return Path(self.path).expanduser() if self.path else cache_home() / "store"


@dataclass(frozen=True, slots=True)
class FetchConfig(_Section):
    """Fetching of prefixes."""

    NAME: typing.ClassVar[str] = "fetch"

    enabled: bool = _option(True, "fetch at all; off = every request computes its prefix")
    min_hit_tokens: int = _option(256, "shorter hits are computed instead", low=1)
    max_inflight_units: int = _option(
        8, "units in transfer, decode or restore at one time, over all requests", low=1, high=1024
    )
    max_inflight_requests: int = _option(
        4, "requests that fetch at one time; others wait in order of arrival", low=1, high=1024
    )
    deadline_seconds: float = _option(
        30.0, "a fetch is given up after this and the rest computed", low=0.1, high=3600
    )
    lease_ttl_seconds: float = _option(
        120.0, "arena blocks of a vanished fetch come back after this", low=1, high=86400
    )


@dataclass(frozen=True, slots=True)
class SaveConfig(_Section):
    """Saving of prefixes."""

    NAME: typing.ClassVar[str] = "save"

    enabled: bool = _option(True, "save computed prefixes")
    generated: bool = _option(True, "save generated tokens too (the next turn of a chat)")
    max_pending: int = _option(16, "saves that wait; one more is dropped and counted", low=1)
    nice: int = _option(10, "niceness of the encoding process", low=0, high=19)


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration; one attribute per TOML section."""

    server: ServerConfig = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    save: SaveConfig = field(default_factory=SaveConfig)

    def __post_init__(self) -> None:
        tokens, block = self.codec.chunk_tokens, self.engine.tokens_per_block
        if tokens % block:
            raise ConfigError(
                f"codec.chunk_tokens = {tokens} is not a multiple of engine.tokens_per_block ="
                f" {block}; a chunk is a whole number of blocks"
            )
        if tokens % self.engine.prefill_slice_tokens:
            raise ConfigError(
                f"codec.chunk_tokens = {tokens} is not a multiple of engine.prefill_slice_tokens ="
                f" {self.engine.prefill_slice_tokens}; slices must end where chunks end, so that a"
                " hit and a recompute run the same slices"
            )


SECTIONS: dict[str, type[_Section]] = {
    c.NAME: c
    for c in (ServerConfig, EngineConfig, CodecConfig, StoreConfig, FetchConfig, SaveConfig)
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One value with where it came from (``kvfetcher config``)."""

    name: str
    value: Any
    source: str
    doc: str


def load_config(
    path: str | Path | None = None, *, environ: Mapping[str, str] | None = None
) -> Config:
    """Read the configuration.

    Args:
        path: TOML file; None = $KVFETCHER_CONFIG, or defaults where that is unset.
        environ: stands in for os.environ.

    Raises:
        ConfigError: the file cannot be read, or a section, key, type or range is wrong.
    """
    return _load(path, os.environ if environ is None else environ)[0]


def explain_config(
    path: str | Path | None = None, *, environ: Mapping[str, str] | None = None
) -> list[Setting]:
    """Every setting with its value, source and explanation, in file order."""
    config, sources = _load(path, os.environ if environ is None else environ)
    return [
        Setting(
            f"{name}.{f.name}",
            getattr(getattr(config, name), f.name),
            sources.get((name, f.name), "default"),
            f.metadata["doc"],
        )
        for name, cls in SECTIONS.items()
        for f in fields(cls)  # type: ignore[arg-type]
    ]


def dump_config(config: Config) -> str:
    """`config` as TOML text with every value, which `load_config` reads back as it was."""
    return "\n".join(
        f"[{name}]\n"
        + "".join(
            f"{f.name} = {_toml_value(getattr(getattr(config, name), f.name))}\n"
            for f in fields(cls)  # type: ignore[arg-type]
        )
        for name, cls in SECTIONS.items()
    )


def is_setting_variable(name: str) -> bool:
    """Whether an environment variable of this name is a setting (``KVFETCHER_SERVER_HOST``)."""
    return any(
        name == f"{_PREFIX}{section}_{f.name}".upper()
        for section, cls in SECTIONS.items()
        for f in fields(cls)  # type: ignore[arg-type]
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    # JSON's numbers, booleans and strings are TOML's too, but for DEL and surrogate pairs.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _load(
    path: str | Path | None, environ: Mapping[str, str]
) -> tuple[Config, dict[tuple[str, str], str]]:
    path = path or environ.get(CONFIG_VARIABLE) or None
    data = _read_toml(Path(path)) if path else {}
    sources: dict[tuple[str, str], str] = {}
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, table in data.items():
        if name not in SECTIONS or not isinstance(table, dict):
            raise ConfigError(f"{path}: unknown section [{name}]; there are {sorted(SECTIONS)}")
        known = {f.name for f in fields(SECTIONS[name])}  # type: ignore[arg-type]
        for key, value in table.items():
            if key not in known:
                raise ConfigError(f"{path}: unknown key {name}.{key}; there are {sorted(known)}")
            values[name][key] = tuple(value) if isinstance(value, list) else value
            sources[name, key] = str(path)
    for name, cls in SECTIONS.items():
        hints = get_type_hints(cls)
        for f in fields(cls):  # type: ignore[arg-type]
            variable = f"{_PREFIX}{name}_{f.name}".upper()
            if variable in environ:
                values[name][f.name] = _parse(variable, environ[variable], hints[f.name])
                sources[name, f.name] = f"${variable}"
    sections: dict[str, Any] = {name: cls(**values[name]) for name, cls in SECTIONS.items()}
    return Config(**sections), sources


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(f"configuration file {path} cannot be read: {exc.strerror}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"configuration file {path} is not TOML: {exc}") from exc


def _parse(name: str, text: str, hint: Any) -> Any:
    """Turn an environment variable's text into the field's type."""
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"{name} must be true or false, got {text!r}")
        return text.lower() in ("true", "1")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError as exc:
            raise ConfigError(f"{name} must be {hint.__name__}, got {text!r}") from exc
    if get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _check(name: str, value: Any, hint: Any, metadata: types.MappingProxyType[Any, Any]) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{name} must be one of {get_args(hint)}, got {value!r}")
        return
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{name} must be a list of strings, got {value!r}")
        return
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name} must be {hint.__name__}, got {value!r}")
    low, high = metadata["low"], metadata["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        raise ConfigError(
            f"{name} must be {'' if low is None else f'>= {low}'}"
            f"{'' if high is None else f' and <= {high}'}, got {value!r}"
        )
