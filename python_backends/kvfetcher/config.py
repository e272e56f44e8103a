"""Configuration: one TOML file, frozen typed dataclasses, the only reader of os.environ.

Order of sources, later wins: defaults below < the TOML file ($KVFETCHER_CONFIG or --config) <
environment ``KVFETCHER_<SECTION>_<FIELD>``. Unknown sections, keys and variables are errors; nothing
is silently corrected. Every default of the project is in this file.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
import typing
import urllib.parse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from kvfetcher.errors import ConfigError
from kvfetcher.spec import LADDER

if typing.TYPE_CHECKING:
    import types
    from collections.abc import Mapping

CONFIG_VARIABLE = "KVFETCHER_CONFIG"
RUN_DIR_VARIABLE = "KVFETCHER_RUN_DIR"
MPS_PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
"""NVIDIA's: the folder of the Multi-Process Service's control daemon that CUDA is to use."""
OPENAI_PORT = 8003
"""Where `serve --openai` listens, unless told otherwise."""
_PREFIX = "KVFETCHER_"
_MAX_FILE_BYTES = 1 << 20

PROFILES = ("exact", *LADDER, "uncalibrated", "paper", "raw")
"""Profiles that chunks can be saved with."""
AUTO = "auto"
"""Profile left to the launcher (`launcher.profile`); where nothing decided, `exact`."""

# Read elsewhere: by the launcher, by the stores, and (KVFETCHER_REQUIRE_...) by test suites.
_OTHER_VARIABLES = re.compile(
    r"KVFETCHER_(CONFIG|RUN_DIR|MPS_OF|MODEL_REPOSITORY|STORE_USERNAME|STORE_PASSWORD|(REQUIRE|TEST)_\w+)"
)
# Kubernetes tells every container the address of each service, here of one named kvfetcher-...
_KUBERNETES_NAMES = re.compile(
    r"KVFETCHER(_\w+)?_(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)
_KUBERNETES_ADDRESS = re.compile(r"(tcp|udp|sctp)://")

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_FRAME_SIZE = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}")
# What Amazon allows; other S3 servers allow no more.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

# tritonserver's flags that `serve` sets itself, or that would take its work out of its hands.
_OWN_FLAGS = frozenset(
    [
        "model-repository",
        "model-store",
        "model-control-mode",
        "load-model",
        "backend-directory",
        "backend-config",
        "disable-auto-complete-config",
        "http-address",
        "http-port",
        "grpc-address",
        "grpc-port",
        "metrics-address",
        "metrics-port",
        "exit-timeout-secs",
        "log-verbose",
        "repository-poll-secs",
        "allow-http",
        "allow-grpc",
        "allow-metrics",
        "strict-readiness",
        "exit-on-error",
        "log-file",
        "http-header-forward-pattern",
        "grpc-header-forward-pattern",
        "help",
        "version",
    ]
)
_RESTRICTION = re.compile(r"(?P<apis>[a-z,-]+):(?P<header>[^=:\s]+)=(?P<value>.+)")


def cache_home() -> Path:
    """Where downloaded models and the default store live: $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ConfigError: neither is known, as for a container's user id without a name.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "kvfetcher"
    except RuntimeError as exc:
        raise ConfigError(
            f"user id {os.getuid()} has no home folder; set $XDG_CACHE_HOME (or $HOME) to a folder that"
            " it may write"
        ) from exc


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

    host: str = _option("127.0.0.1", "address that all three endpoints bind to")
    http_port: int = _option(8000, "port of the HTTP endpoint", low=1, high=65535)
    grpc_port: int = _option(8001, "port of the gRPC endpoint", low=1, high=65535)
    metrics_port: int = _option(8002, "port of the Prometheus endpoint", low=1, high=65535)
    openai_port: int = _option(
        0,
        "port of the HTTP endpoint that answers OpenAI's API (docs/openai.md); 0 = none",
        low=0,
        high=65535,
    )
    ready_timeout_seconds: float = _option(
        180.0, "longest wait until all models are ready, in seconds", low=1, high=3600
    )
    stop_timeout_seconds: float = _option(
        60.0,
        "longest wait for running requests and pending saves at stop, in seconds",
        low=1,
        high=3600,
    )
    decode_instances: int = _option(
        0,
        "number of kv_decode processes; 0 = one per CPU core (at most 4), or with NVDEC one per"
        " engine, two if engine.arena is not host",
        low=0,
        high=64,
    )
    decode_gpus: tuple[int, ...] = _option(
        (),
        "numbers of the GPUs whose NVDEC decodes, as CUDA counts; kv_decode's processes take turns on"
        " them; empty = the GPU of engine.device",
        low=0,
    )
    restore_instances: int = _option(
        0,
        "number of kv_restore processes; 0 = one, or two if pictures stay on a GPU (four under MPS). Each"
        " has its own CUDA context and copy of the calibration's inverse transforms on the GPU",
        low=0,
        high=16,
    )
    plane_bytes: int = _option(
        224 << 20,
        "bytes for decoded pictures on each GPU that decodes, shared by its kv_decode processes; units"
        " that do not fit go through host memory",
        low=0,
        high=1 << 34,
    )
    mps: Literal["off", "auto", "on"] = _option(
        "off",
        "NVIDIA's Multi-Process Service, which lets several processes use the GPU at the same time: on ="
        " `serve` starts a daemon, or uses the one that $CUDA_MPS_PIPE_DIRECTORY names; auto = on if that"
        " works; off = the environment is left alone",
    )
    mps_restore_percent: int = _option(
        40,
        "percentage of a GPU's multiprocessors that one kv_restore process may use under MPS",
        low=1,
        high=100,
    )
    log_verbose: int = _option(0, "value of tritonserver's flag --log-verbose", low=0, high=4)
    max_repairs: int = _option(
        8,
        "number of model reloads and server restarts within ten minutes after which `serve` gives up;"
        " 0 = end at the first failure",
        low=0,
        high=1000,
    )
    probe_seconds: float = _option(
        15.0,
        "seconds between two probes, in which `serve` sends a tiny unit through kv_pipeline; 0 = never",
        low=0,
        high=3600,
    )
    extra_args: tuple[str, ...] = _option(
        (),
        "further flags of tritonserver, as it takes them: --grpc-use-ssl=true, --trace-config=...,"
        " --http-thread-count=16, --http-restricted-api=...; not those that `serve` sets itself",
    )

    def __post_init__(self) -> None:
        _Section.__post_init__(self)  # no super(): slots=True makes the class anew
        for flag in self.extra_args:
            _check_flag(flag)
        if len(set(self.decode_gpus)) != len(self.decode_gpus):
            raise ConfigError(
                f"server.decode_gpus must name each GPU once, got {list(self.decode_gpus)}"
            )

    @property
    def restricted_headers(self) -> dict[str, str]:
        """HTTP headers that `extra_args` asks of requests; the launcher sends them with its own."""
        found = (_restriction(flag, "--http-restricted-api") for flag in self.extra_args)
        return {match["header"]: match["value"] for match in found if match}


@dataclass(frozen=True, slots=True)
class EngineConfig(_Section):
    """The LLM engine."""

    NAME: typing.ClassVar[str] = "engine"

    kind: Literal["torch", "paged", "tensorrt_llm"] = _option(
        "torch",
        "the LLM engine: torch = Hugging Face's models; paged = the same with paged KV, behind the KV"
        " connector; tensorrt_llm = TensorRT-LLM",
    )
    model: str = _option(
        "smollm2-135m-instruct", "a built-in model's name, or a local Hugging Face model folder"
    )
    device: str = _option(
        "auto", "device of the `torch` and `paged` engines: auto, cpu or cuda[:N]"
    )
    kv_dtype: Literal["bfloat16", "float16", "float8_e4m3fn"] = _option(
        "bfloat16", "type of the KV values that the engine keeps and shares"
    )
    tokens_per_block: int = _option(32, "number of tokens of one paged KV block", low=1, high=1024)
    arena_bytes: int = _option(
        1 << 30,
        "size in bytes, over all ranks, of the arena: shared memory for KV that was fetched or is to be"
        " saved",
        low=1 << 20,
    )
    # Not `auto` yet: the torch engine has read its KV from an arena on a GPU, TensorRT-LLM has not.
    arena: Literal["auto", "host", "gpu"] = _option(
        "host",
        "where the arena lies; auto = on the GPU that the model runs on (each tensor-parallel rank has a"
        " part on its own), or in host memory if there is none",
    )
    prefill_slice_tokens: int = _option(
        256,
        "number of tokens in one slice of prefill; running streams go on between slices",
        low=1,
        high=65536,
    )
    max_running_requests: int = _option(
        8, "largest number of requests that hold KV at one time", low=1, high=1024
    )
    max_waiting_requests: int = _option(
        256, "largest number of requests that wait; one more is refused", low=0
    )
    max_prompt_tokens: int = _option(
        0, "longest prompt, in tokens; 0 = what the model's position range allows", low=0
    )
    repeat_bos: bool = _option(
        False,
        "keep a second beginning-of-text token where a prompt's text already begins with one (as a chat"
        " template writes it)",
    )
    max_output_tokens: int = _option(1024, "largest max_tokens of a request", low=1)
    num_threads: int = _option(
        0, "number of CPU threads of the engine; 0 = all cores", low=0, high=1024
    )
    llm_args: str = _option(
        "", "YAML file of arguments to TensorRT-LLM's LLM() (as Triton's model.yaml)"
    )

    def __post_init__(self) -> None:
        _Section.__post_init__(self)  # no super(): slots=True makes the class anew
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"engine.device must be auto, cpu, cuda or cuda:N, got {self.device!r}"
            )
        if self.arena == "gpu" and self.device == "cpu":
            raise ConfigError(
                'engine.arena = "gpu" and engine.device = "cpu" contradict each other: the arena lies on'
                " the GPU that the model runs on"
            )

    @property
    def gpu(self) -> int:
        """The GPU that `device` names; 0 where it names none."""
        _, _, index = self.device.partition(":")
        return int(index) if index.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class ConnectorConfig(_Section):
    """The KV connector, for the engines `paged` and `tensorrt_llm`."""

    NAME: typing.ClassVar[str] = "connector"

    kv_layout: Literal["auto", "HND", "NHD"] = _option(
        "auto", "order inside the engine's KV blocks; auto = found by a probe at start"
    )
    async_load_tokens: int = _option(
        0,
        "loads of at least this number of tokens run beside the batch; 0 = all run before it",
        low=0,
    )
    save_timeout_seconds: float = _option(
        5.0,
        "seconds that a finished request's KV blocks wait to be saved; then they are freed",
        low=0.01,
        high=600,
    )
    pool_bytes: int = _option(
        1 << 30, "size of the `paged` engine's KV pool, in bytes", low=1 << 16
    )
    device_reuse: bool = _option(
        True, "`paged`: requests share blocks of equal prefixes in the engine's own pool"
    )


@dataclass(frozen=True, slots=True)
class CodecConfig(_Section):
    """How chunks are cut and coded."""

    NAME: typing.ClassVar[str] = "codec"

    profile: str = _option(
        "auto",
        "profile that new chunks are saved with; auto = `serve` takes balanced if a certified calibration"
        " of the model is kept on this machine, else exact; a tritonserver started by hand takes exact",
    )
    chunk_tokens: int = _option(
        256,
        "number of tokens of one chunk, a multiple of engine.tokens_per_block",
        low=16,
        high=8192,
    )
    unit_layers: int = _option(
        0,
        "number of layers of one unit of `exact` and `paper`; 0 = chosen by the profile",
        low=0,
        high=1024,
    )
    frame_sizes: tuple[str, ...] = _option(
        (),
        "picture sizes (WIDTHxHEIGHT) in which each chunk is stored; every further size costs the video's"
        " bytes again; empty = one size, chosen by the profile",
    )
    raw_copy: bool = _option(
        False,
        "store the values uncompressed as well, for links that are faster than decoding",
    )
    packed_copy: bool = _option(
        False,
        "near, balanced, compact and tiny: store the integers without video as well, for links that are"
        " faster than the decoders; about 1.3 times the size of the video, in addition to it",
    )
    paper_bits: int = _option(8, "number of bits of the quantiser of `paper`", low=2, high=12)
    decoder: Literal["auto", "cpu", "nvdec"] = _option(
        "auto",
        "what decodes units: auto = nvdec if it is usable, else cpu; nvdec = it is an error if NVDEC is"
        " not usable",
    )
    encoder: Literal["auto", "own", "x265", "nvenc"] = _option(
        "auto",
        "what encodes chunks: auto = own if numba is installed, else x265; own = this project's HEVC"
        " encoder, on a GPU where the values lie on one, else on all CPU cores; x265 = libx265 on all CPU"
        " cores, several times slower; nvenc = the GPU's NVENC (H100 and H200 have none); it is an error"
        " if the encoder that is named is not usable",
    )
    calibration: str = _option(
        "",
        "file with the model's calibration, for near, balanced, compact and tiny; empty = the one that"
        " `kvfetcher calibrate` keeps on this machine",
    )
    allow_uncertified: bool = _option(
        False, "whether a calibration without a certificate of its quality may be used"
    )

    def __post_init__(self) -> None:
        _Section.__post_init__(self)  # no super(): slots=True makes the class anew
        if self.profile not in (AUTO, *PROFILES):
            near = difflib.get_close_matches(self.profile, (AUTO, *PROFILES), n=1)
            raise ConfigError(
                f"codec.profile must be one of {', '.join((AUTO, *PROFILES))}, got"
                f" {self.profile!r}{f'; did you mean {near[0]}?' if near else ''}"
            )
        if wrong := [size for size in self.frame_sizes if not _FRAME_SIZE.fullmatch(size)]:
            raise ConfigError(
                f"codec.frame_sizes must be WIDTHxHEIGHT, such as 1024x512, got {wrong[0]!r}"
            )


class RedisAddress(NamedTuple):
    """Where a Redis server listens."""

    host: str
    port: int
    database: int
    tls: bool


class BucketAddress(NamedTuple):
    """Where objects lie in an S3 store; `prefix` without slashes at its ends, "" for none."""

    name: str
    prefix: str


@dataclass(frozen=True, slots=True)
class StoreCredentials:
    """Who we are to a Redis server. From the environment only, and in no output."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class StoreConfig(_Section):
    """Where chunks live."""

    NAME: typing.ClassVar[str] = "store"

    kind: Literal["file", "redis", "s3"] = _option(
        "file", "where chunks live: a folder, Redis or Valkey, or an S3-compatible store"
    )
    path: str = _option("", "folder of the file store; empty = ~/.cache/kvfetcher/store")
    url: str = _option(
        "", "redis://HOST:PORT/DB (rediss:// for TLS), or s3://BUCKET/PREFIX; never with a password"
    )
    endpoint: str = _option("", "URL of the S3-compatible server; empty = AWS")
    region: str = _option("us-east-1", "region of the S3 bucket")
    ca_file: str = _option("", "PEM file of certificates that TLS trusts besides the system's")
    timeout_seconds: float = _option(
        10.0,
        "longest wait for one store call, in seconds, and 1 s more for each MB that it carries",
        low=0.01,
        high=3600,
    )
    connect_timeout_seconds: float = _option(
        2.0, "longest wait for a connection to redis or s3, in seconds", low=0.01, high=3600
    )
    max_connections: int = _option(
        32,
        "largest number of connections of one process to redis or s3; further calls wait",
        low=1,
        high=1024,
    )
    ttl_seconds: float = _option(
        0.0,
        "age in seconds at which chunks go; 0 = never. redis drops chunks that were not read for this"
        " time; with file and s3, `kvfetcher store gc` removes chunks that were written before it",
        low=0,
    )
    max_retries: int = _option(
        2,
        "largest number of times that a call is made again after a failure that may pass",
        low=0,
        high=10,
    )
    hedge_fraction: float = _option(
        0.03,
        "largest share of reads that are sent a second time because the first is late; 0 = none",
        low=0,
        high=0.5,
    )
    breaker_failures: int = _option(
        5,
        "number of failures among the last 20 calls after which the store is not asked for a while",
        low=1,
        high=20,
    )
    breaker_backoff_seconds: float = _option(
        1.0,
        "first pause before it is asked again, in seconds; each further one is twice as long",
        low=0.01,
        high=3600,
    )
    breaker_max_backoff_seconds: float = _option(
        30.0, "longest such pause, in seconds", low=0.01, high=3600
    )
    gc_grace_seconds: float = _option(
        3600.0,
        "`kvfetcher store gc` keeps unreachable chunks that are younger than this, in seconds",
        low=0,
    )
    tier_memory_bytes: int = _option(
        0, "bytes of memory, in each process, for copies of what it fetched; 0 = none", low=0
    )
    tier_disk_bytes: int = _option(
        0, "bytes of local disk for copies of what this host fetched or saved; 0 = none", low=0
    )
    tier_path: str = _option("", "folder of these copies; empty = ~/.cache/kvfetcher/tier")
    tier_max_age_seconds: float = _option(
        86400.0,
        "local copies older than this, in seconds, are read from the store again; a purge takes at most"
        " this long to reach other hosts and running servers",
        low=1,
    )
    keys: str = _option(
        "",
        "where the keyring is: env:NAME, file:PATH or command:PROGRAM ARGUMENTS; with one, names in the"
        " store tell nothing of a salt that could be guessed; empty = no keyring",
    )
    seal: Literal["off", "hmac", "ed25519", "aes-gcm"] = _option(
        "off",
        "how objects are sealed with the keyring: hmac or ed25519 = signed; aes-gcm = encrypted and"
        " authenticated; off = whoever can write to the store decides what is fetched",
    )

    def __post_init__(self) -> None:
        _Section.__post_init__(self)  # no super(): slots=True makes the class anew
        if self.seal != "off" and not self.keys:
            raise ConfigError(f"store.seal = {self.seal} needs store.keys, which is empty")
        if self.seal == "aes-gcm" and self.tier_disk_bytes:
            raise ConfigError(
                "store.seal = aes-gcm encrypts the store alone: copies on this host's disk would lie in"
                " clear; set store.tier_disk_bytes = 0"
            )
        if self.kind == "redis":
            _ = self.redis_address
        elif self.kind == "s3":
            _ = self.bucket
            if self.endpoint:
                _plain_url("store.endpoint", self.endpoint, ("http", "https"))

    @property
    def folder(self) -> Path:
        return Path(self.path).expanduser() if self.path else cache_home() / "store"

    @property
    def tier_folder(self) -> Path:
        return Path(self.tier_path).expanduser() if self.tier_path else cache_home() / "tier"

    @property
    def redis_address(self) -> RedisAddress:
        """What `url` says, for kind `redis`.

        Raises:
            ConfigError: it is no such URL.
        """
        parts = _plain_url("store.url", self.url, ("redis", "rediss"))
        database = parts.path.strip("/") or "0"
        if not database.isdecimal():
            raise ConfigError(
                f"store.url: {database!r} is not a database number; write redis://HOST:PORT/0"
            )
        return RedisAddress(
            parts.hostname or "", parts.port or 6379, int(database), parts.scheme == "rediss"
        )

    @property
    def bucket(self) -> BucketAddress:
        """What `url` says, for kind `s3`.

        Raises:
            ConfigError: it is no such URL.
        """
        parts = _plain_url("store.url", self.url, ("s3",))
        prefix = parts.path.strip("/")
        if not re.fullmatch(r"[A-Za-z0-9._/-]*", prefix) or "//" in prefix:
            raise ConfigError(
                f"store.url: prefix {prefix!r} must be made of A-Z a-z 0-9 . _ - joined by '/'"
            )
        if not _BUCKET.fullmatch(parts.netloc):
            raise ConfigError(
                f"store.url: {parts.netloc!r} is not the name of an S3 bucket, which has 3 to 63 characters"
                " a-z 0-9 . - and begins and ends with a letter or digit"
            )
        return BucketAddress(parts.netloc, prefix)


def _plain_url(name: str, url: str, schemes: tuple[str, ...]) -> urllib.parse.SplitResult:
    """Parse a URL that holds an address and nothing secret.

    Raises:
        ConfigError: another scheme, no host, a port that is none, credentials, query or fragment.
            The message never shows what stands before an ``@``.
    """
    parts = urllib.parse.urlsplit(url)
    if "@" in url:
        raise ConfigError(
            f"{name} must not hold credentials; set $KVFETCHER_STORE_USERNAME and"
            " $KVFETCHER_STORE_PASSWORD for redis, $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY"
            " for s3"
        )
    try:
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        port_is_valid = False
    if parts.scheme not in schemes or not parts.hostname or not port_is_valid:
        raise ConfigError(
            f"{name} must be {' or '.join(f'{s}://' for s in schemes)} with a host, got {url!r}"
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"{name} takes no options after '?' or '#', got {url!r}")
    return parts


@dataclass(frozen=True, slots=True)
class FetchConfig(_Section):
    """Fetching of prefixes."""

    NAME: typing.ClassVar[str] = "fetch"

    enabled: bool = _option(True, "false = nothing is fetched, every request computes its prefix")
    min_hit_tokens: int = _option(256, "hits of fewer tokens are computed instead", low=1)
    max_inflight_reads: int = _option(
        8,
        "largest number of reads from the store at one time, over all requests; with `file` and `redis`"
        " two, and more only while the link has capacity left",
        low=1,
        high=1024,
    )
    max_inflight_bytes: int = _option(
        128 << 20,
        "largest number of bytes that were asked for and are not restored yet, over all requests",
        low=1 << 16,
    )
    max_inflight_units: int = _option(
        0,
        "largest number of units in kv_decode or kv_restore at one time, over all requests; 0 = two for"
        " each kv_decode process, at least 8",
        low=0,
        high=1024,
    )
    max_inflight_requests: int = _option(
        4, "largest number of prefixes that are fetched at one time; others wait", low=1, high=1024
    )
    max_waiting_requests: int = _option(
        256, "largest number of prefixes that wait; one more is computed", low=0
    )
    max_read_bytes: int = _option(
        4 << 20, "neighbouring units of a chunk are read together up to this number of bytes", low=1
    )
    gate_margin: float = _option(
        0.05,
        "fetching must be predicted faster than computing by this share of the time",
        low=0,
        high=0.9,
    )
    ageing: float = _option(
        1.0,
        "how fast waiting raises priority within a tenant: one second of waiting offsets this many seconds"
        " of predicted fetch time",
        low=0.001,
        high=1000,
    )
    variant_hysteresis: float = _option(
        0.1,
        "the fetcher changes to another picture size only if it saves more than this share of a unit's"
        " time",
        low=0,
        high=0.9,
    )
    expected_gbit_per_second: float = _option(
        1.0,
        "assumed rate of the link to the store until transfers were measured",
        low=0.0001,
        high=10_000,
    )
    expected_rtt_seconds: float = _option(
        0.002,
        "assumed round trip to the store until reads were measured, in seconds",
        low=0,
        high=60,
    )
    link_half_life_seconds: float = _option(
        5.0,
        "a transfer counts half as much as one that is younger by this number of seconds",
        low=0.01,
        high=3600,
    )
    deadline_seconds: float = _option(
        30.0,
        "a fetch ends after this number of seconds, and the rest is computed",
        low=0.1,
        high=3600,
    )
    lease_ttl_seconds: float = _option(
        120.0,
        "seconds after which arena blocks of a fetch that vanished are free again; at least"
        " fetch.deadline_seconds",
        low=1,
        high=86400,
    )
    nice: int = _option(
        19,
        "niceness of kv_decode and kv_restore if they work on the CPU, so that prefill and generation go"
        " first",
        low=0,
        high=19,
    )

    def units_in_flight(self, num_decoders: int) -> int:
        """`max_inflight_units`; 0 = one at work and one on its way for each decoder, or 8."""
        return self.max_inflight_units or max(8, 2 * num_decoders)


@dataclass(frozen=True, slots=True)
class SaveConfig(_Section):
    """Saving of prefixes."""

    NAME: typing.ClassVar[str] = "save"

    enabled: bool = _option(True, "whether computed prefixes are saved")
    generated: bool = _option(
        True, "whether generated tokens are saved too, for the next turn of a chat"
    )
    max_pending: int = _option(
        16, "largest number of saves that wait; one more is dropped and counted", low=1
    )
    chunks_in_flight: int = _option(
        8,
        "chunks of one save that are encoded and stored side by side; more keep a GPU busier, each takes"
        " its bytes of host memory",
        low=1,
        high=256,
    )
    on_gpu: bool = _option(
        False,
        "whether kv_encode codes chunks on the GPU on which they lie (profile uncalibrated); through"
        " tritonserver on a GPU host this has not worked yet",
    )
    nice: int = _option(10, "niceness of the encoding process", low=0, high=19)


@dataclass(frozen=True, slots=True)
class TrustConfig(_Section):
    """Who may ask what."""

    NAME: typing.ClassVar[str] = "trust"

    internal_models: Literal["closed", "open"] = _option(
        "closed",
        "whether clients may send requests to kv_fetch and tensorrt_llm themselves: closed = no, but for"
        " policy `warm`; open = yes, for tests of one model; a lease, a block of the arena or a save of"
        " their own making is refused either way",
    )
    cache_salt: Literal["client", "signed", "fixed"] = _option(
        "client",
        "who says whose request it is: client = the request's cache_salt; signed = its cache_salt, which a"
        " trusted proxy signed with the keyring's key `proxy`; fixed = trust.fixed_salt, within which a"
        " cache_salt may separate further",
    )
    fixed_salt: str = _option("", "salt of all requests, for trust.cache_salt = fixed")
    tenant_requests_per_second: float = _option(
        0.0,
        "number of requests per second that one tenant may send, ten seconds' worth at once; one more is"
        " refused; 0 = no limit",
        low=0,
        high=1e6,
    )
    tenant_bytes_per_second: float = _option(
        0.0,
        "bytes per second that one tenant's requests may fetch from the store, ten seconds' worth at once;"
        " after that they are refused for a while; 0 = no limit",
        low=0,
        high=1e12,
    )

    def __post_init__(self) -> None:
        _Section.__post_init__(self)  # no super(): slots=True makes the class anew
        if (self.cache_salt == "fixed") != bool(self.fixed_salt):
            raise ConfigError("trust.cache_salt = fixed and trust.fixed_salt go together")


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration; one attribute per TOML section."""

    server: ServerConfig = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    trust: TrustConfig = field(default_factory=TrustConfig)

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
        if self.fetch.deadline_seconds > self.fetch.lease_ttl_seconds:
            raise ConfigError(
                f"fetch.deadline_seconds = {self.fetch.deadline_seconds} is more than"
                f" fetch.lease_ttl_seconds = {self.fetch.lease_ttl_seconds}; a fetch ends with the"
                " lease on its arena blocks, raise the latter or lower the former"
            )

    @property
    def nvdec_gpus(self) -> tuple[int, ...]:
        """The GPUs that decode where NVDEC does: `server.decode_gpus`; none = the engine's."""
        return self.server.decode_gpus or (self.engine.gpu,)


SECTIONS: dict[str, type[_Section]] = {
    c.NAME: c
    for c in (
        ServerConfig,
        EngineConfig,
        ConnectorConfig,
        CodecConfig,
        StoreConfig,
        FetchConfig,
        SaveConfig,
        TrustConfig,
    )
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


def store_credentials(*, environ: Mapping[str, str] | None = None) -> StoreCredentials:
    """$KVFETCHER_STORE_USERNAME and $KVFETCHER_STORE_PASSWORD; empty where unset.

    (The S3 library reads the usual AWS variables and roles by itself.)
    """
    environ = os.environ if environ is None else environ
    return StoreCredentials(
        environ.get(f"{_PREFIX}STORE_USERNAME", ""), environ.get(f"{_PREFIX}STORE_PASSWORD", "")
    )


def is_setting_variable(name: str) -> bool:
    """Whether an environment variable of this name is a setting (``KVFETCHER_SERVER_HOST``)."""
    return any(
        name == f"{_PREFIX}{section}_{f.name}".upper()
        for section, cls in SECTIONS.items()
        for f in fields(cls)  # type: ignore[arg-type]
    )


def _check_variables(environ: Mapping[str, str]) -> None:
    """Refuse variables that look like settings and are none: a typing error would change nothing.

    Raises:
        ConfigError: names the variable and the nearest setting.
    """
    for name, value in environ.items():
        if not name.startswith(_PREFIX) or is_setting_variable(name):
            continue
        if _OTHER_VARIABLES.fullmatch(name) or _KUBERNETES_NAMES.fullmatch(name):
            continue
        if name.endswith("_PORT") and _KUBERNETES_ADDRESS.match(value):
            continue
        known = [
            f"{_PREFIX}{section}_{f.name}".upper()
            for section, cls in SECTIONS.items()
            for f in fields(cls)  # type: ignore[arg-type]
        ]
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"environment variable {name} is not a setting;"
            f" {f'did you mean {near[0]}? ' if near else ''}`kvfetcher config` lists all settings,"
            " $KVFETCHER_<SECTION>_<FIELD> sets one"
        )


def _restriction(flag: str, option: str) -> re.Match[str] | None:
    """What a flag ``--http-restricted-api=APIS:HEADER=VALUE`` says; None for another flag.

    Raises:
        ConfigError: it is that flag, and not of this form.
    """
    name, _, value = flag.partition("=")
    if name != option:
        return None
    if not (found := _RESTRICTION.fullmatch(value)):
        raise ConfigError(
            f"server.extra_args: {option} must be {option}=API[,API]:HEADER=VALUE, got {flag!r}"
        )
    return found


def _check_flag(flag: str) -> None:
    """Raises ConfigError where tritonserver must not get this flag from a user."""
    name = flag.partition("=")[0]
    if not re.fullmatch(r"--[a-z][a-z-]+", name):
        raise ConfigError(
            f"server.extra_args: write each flag as --NAME=VALUE in one text, got {flag!r}"
        )
    if name[2:] in _OWN_FLAGS:
        raise ConfigError(
            f"server.extra_args: {name} is set by `serve` itself; `kvfetcher config` shows the settings"
            " of section server, or start a tritonserver of your own with `kvfetcher env`"
        )
    for option in ("--http-restricted-api", "--grpc-restricted-protocol"):
        if (found := _restriction(flag, option)) and "model-repository" in found["apis"].split(","):
            raise ConfigError(
                f"server.extra_args: {option} must leave out model-repository, which `serve` restricts"
                " to itself: loading and unloading models is its work"
            )


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    # JSON's numbers, booleans and strings are TOML's too, but for DEL and surrogate pairs.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _load(
    path: str | Path | None, environ: Mapping[str, str]
) -> tuple[Config, dict[tuple[str, str], str]]:
    _check_variables(environ)
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
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise ConfigError(f"configuration file {path} has more than {_MAX_FILE_BYTES} bytes")
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"configuration file {path} is not UTF-8 (byte {exc.start}); save it as UTF-8"
        ) from exc
    except RecursionError as exc:
        raise ConfigError(f"configuration file {path} is nested too deeply") from exc
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
        item, *_ = get_args(hint)
        if text.lstrip().startswith("["):  # JSON, for values with commas in them
            return _parse_list(name, text)
        return tuple(_parse(name, part.strip(), item) for part in text.split(",") if part.strip())
    return text


def _parse_list(name: str, text: str) -> tuple[Any, ...]:
    try:
        return tuple(json.loads(text))
    except (ValueError, TypeError, RecursionError) as exc:
        raise ConfigError(
            f"{name} must be a JSON list or values with commas, got {text!r}"
        ) from exc


def _check(name: str, value: Any, hint: Any, metadata: types.MappingProxyType[Any, Any]) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{name} must be one of {get_args(hint)}, got {value!r}")
        return
    if get_origin(hint) is tuple:
        item, *_ = get_args(hint)
        if not isinstance(value, tuple) or not all(type(v) is item for v in value):
            kinds = "integers" if item is int else "strings"
            raise ConfigError(f"{name} must be a list of {kinds}, got {value!r}")
        for v in value:
            _check(name, v, item, metadata)
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
