"""Finds a tritonserver and makes it ready for Python models of the running interpreter.

Two kinds are known: the system's (``tritonserver`` on PATH or in /opt/tritonserver, as in NVIDIA's
images), which brings its own Python backend and stub; and the one in the ``nvidia-pytriton``
wheel, whose backend folder has to be put together first (the stub of this Python version beside
the backend's library).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvfetcher.config import cache_home
from kvfetcher.errors import ServerError
from kvfetcher.launcher.libpython import PYTHON_VERSION, library_name, provide_libpython

if TYPE_CHECKING:
    from collections.abc import Mapping

OPT_TRITONSERVER = Path("/opt/tritonserver")

_STUB = "triton_python_backend_stub"
_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")

_log = logging.getLogger(__name__)


_NUMPY_THREADS = "OPENBLAS_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class Installation:
    """A tritonserver that can run Python models with this interpreter's packages.

    Attributes:
        executable: the binary.
        backend_folder: for ``--backend-directory``.
        library_folders: for LD_LIBRARY_PATH.
        origin: "system" or "nvidia-pytriton".
    """

    executable: Path
    backend_folder: Path
    library_folders: tuple[Path, ...]
    origin: str

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` with the PATH and LD_LIBRARY_PATH that the server and its stubs need.

        The stub takes the first ``python3`` on PATH as its home, and thereby its site-packages; it
        ignores PYTHONPATH. numpy's own library of linear algebra gets one thread unless `base` says
        otherwise: with one per core in each of the stubs, two kv_restore processes took a minute to
        read an 8B model's calibration beside 14 decoders (16 cores, all of them spinning).
        """
        python_folder = str(Path(sys.executable).parent)
        return {
            _NUMPY_THREADS: "1",
            **base,
            "PATH": _prepend(base.get("PATH", os.defpath), python_folder),
            "LD_LIBRARY_PATH": _prepend(
                base.get("LD_LIBRARY_PATH", ""), *map(str, self.library_folders)
            ),
        }


def find_installation() -> Installation:
    """The system's tritonserver where it fits this Python, else the wheel's.

    Raises:
        ServerError: there is none, none fits, or this interpreter cannot host the stub.
    """
    check_numpy()
    refusal = ""
    if (system := _system_executable()) is not None:
        try:
            return _system_installation(system)
        except ServerError as exc:
            refusal = f" ({exc})"
            _log.warning("%s", exc)
    if (root := _wheel_root()) is not None:
        return _wheel_installation(root)
    raise ServerError(
        f"no tritonserver found{refusal}: none on PATH or in {OPT_TRITONSERVER}, and the package"
        " nvidia-pytriton is not installed; pip install 'kvfetcher[server]' (Linux x86-64)"
    )


def check_numpy() -> None:
    """Refuse an interpreter in which Triton's stub would garble tensors.

    Raises:
        ServerError: numpy is missing, or 2 or newer.
    """
    try:
        version = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if not version or int(version.split(".")[0]) >= 2:
        raise ServerError(
            f"numpy of {sys.executable} must be < 2, got {version or 'none'}: Triton's Python stub"
            " reads newer arrays garbled, without an error; pip install 'numpy<2'"
        )


def prepare_shim(installation: Installation) -> Path:
    """A folder with a ``tritonserver`` command that knows its backend folder.

    With it first on PATH, ``tritonserver --model-repository model_repository`` works as it does
    where Triton is installed in its default place.
    """
    folder = cache_home() / "tritonserver" / _digest(installation.executable) / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{uuid.uuid4().hex}"
    partial.write_text(
        "#!/bin/sh\n"
        f'exec "{installation.executable}" "--backend-directory={installation.backend_folder}" "$@"\n'
    )
    partial.chmod(0o755)
    partial.replace(folder / "tritonserver")
    return folder


def _system_executable() -> Path | None:
    for folder in [*os.environ.get("PATH", os.defpath).split(":"), str(OPT_TRITONSERVER / "bin")]:
        found = shutil.which("tritonserver", path=folder) if folder else None
        # `kvfetcher env` puts a shim on PATH: that is the wheel's, not the system's.
        if found and cache_home() not in Path(found).parents:
            return Path(found).resolve()
    return None


def _system_installation(executable: Path) -> Installation:
    backends = executable.parent.parent / "backends"
    stub = backends / "python" / _STUB
    if not stub.is_file():
        raise ServerError(f"{executable} has no Python backend in {backends}")
    # The version is read from the binary: the name of the library that it is linked against.
    linked = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    version = linked.group(1).decode() if linked else "unknown"
    if version != PYTHON_VERSION:
        raise ServerError(
            f"{stub} is built for Python {version}, this is {PYTHON_VERSION}; install kvfetcher"
            f" with Python {version}"
        )
    return Installation(executable, backends, (provide_libpython(),), "system")


def _wheel_root() -> Path | None:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent / "tritonserver"
    return root if (root / "bin" / "tritonserver").is_file() else None


def _wheel_installation(root: Path) -> Installation:
    stub = root / "python_backend_stubs" / PYTHON_VERSION / _STUB
    if not stub.is_file():
        versions = sorted(p.name for p in (root / "python_backend_stubs").iterdir())
        raise ServerError(
            f"nvidia-pytriton has no stub for Python {PYTHON_VERSION}, only {versions}; use one of"
            " these"
        )
    # In the cache, not in site-packages, which may be read-only or shared by several Pythons.
    backends = cache_home() / "tritonserver" / _digest(root) / "backends"
    python = backends / "python"
    try:
        python.mkdir(parents=True, exist_ok=True)
        for source in (*(root / "backends" / "python" / name for name in _BACKEND_FILES), stub):
            partial = python / f".{uuid.uuid4().hex}"
            partial.symlink_to(source)
            partial.replace(python / source.name)
    except OSError as exc:
        raise ServerError(
            f"the backend folder {python} cannot be made: {exc.strerror}; set $XDG_CACHE_HOME to a"
            " folder you may write to"
        ) from exc
    libraries = root.parent.parent / "nvidia_pytriton.libs"
    folders = (libraries, provide_libpython())
    return Installation(root / "bin" / "tritonserver", backends, folders, "nvidia-pytriton")


def _digest(path: Path) -> str:
    """One folder per installation and Python version."""
    return hashlib.sha256(f"{path}\0{library_name()}".encode()).hexdigest()[:16]


def _prepend(value: str, *folders: str) -> str:
    rest = [part for part in value.split(":") if part and part not in folders]
    return ":".join([*folders, *rest])
