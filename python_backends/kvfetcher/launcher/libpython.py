"""Finds ``libpython3.X.so.1.0``, which Triton's Python stub is linked against.

The interpreters of Debian and Ubuntu are linked statically; the library is in a package of its own
(``libpython3.X``) that is often not installed. It is then downloaded and unpacked into the cache
folder: that needs apt, but not root.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from kvfetcher.config import cache_home
from kvfetcher.errors import ServerError

PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

# apt-get update over a slow line takes a minute.
_APT_TIMEOUT_SECONDS = 300.0

_log = logging.getLogger(__name__)


def library_name(python_version: str = PYTHON_VERSION) -> str:
    """File name that the dynamic linker looks for."""
    return f"libpython{python_version}.so.1.0"


def find_libpython() -> Path | None:
    """The folder that holds the library of the running interpreter, or None. Downloads nothing."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    candidates = [
        sysconfig.get_config_var("LIBDIR") or "",
        f"{sys.base_prefix}/lib",
        *os.environ.get("LD_LIBRARY_PATH", "").split(":"),
        f"/usr/lib/{multiarch}",
        f"/lib/{multiarch}",
        "/usr/lib64",
        "/usr/local/lib",
    ]
    folders = [Path(c) for c in candidates if c]
    return next((f for f in [*folders, *_cached()] if (f / library_name()).is_file()), None)


def provide_libpython() -> Path:
    """The folder that holds the library, downloaded first where it has to be.

    Raises:
        ServerError: it is not on this machine and cannot be downloaded; says what to install.
    """
    if (folder := find_libpython()) is not None:
        return folder
    remedy = (
        f"Triton's Python stub needs {library_name()}, which {sys.executable} does not bring;"
        f" install the system package libpython{PYTHON_VERSION}"
        f" (apt-get install libpython{PYTHON_VERSION}), or use a Python built with --enable-shared"
    )
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise ServerError(remedy)
    _log.info("downloading %s (a Debian package, unpacked into the cache)", library_name())
    target = _cache_folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as work:
        try:
            package = _download(Path(work))
            unpacked = Path(work) / "root"
            _run(["dpkg-deb", "-x", str(package), str(unpacked)], Path(work))
        except (OSError, subprocess.SubprocessError) as exc:
            detail = str(getattr(exc, "stderr", "") or exc).strip().splitlines()
            raise ServerError(f"{remedy}. Downloading it failed: {' '.join(detail[-2:])}") from exc
        library = next((p for p in unpacked.rglob(library_name()) if p.is_file()), None)
        if library is None:
            raise ServerError(f"{remedy}. Package {package.name} does not hold it")
        # The real file under its linked name: the symbolic links of the package may leave it.
        target.mkdir(exist_ok=True)
        partial = Path(work) / library_name()
        shutil.copyfile(library, partial)
        partial.replace(target / library_name())
    return target


def _cache_folder() -> Path:
    return cache_home() / "libpython" / PYTHON_VERSION


def _cached() -> list[Path]:
    return [_cache_folder()]


def _download(work: Path) -> Path:
    """Fetch the package into `work`.

    Tried in turn: the very version of the installed interpreter, then the newest; with the package
    lists of the system, then with private ones (a container image has no lists, and filling the
    system's takes root).
    """
    # Ubuntu 24.04 renamed the package for its change to 64-bit time.
    packages = [f"libpython{PYTHON_VERSION}{suffix}" for suffix in ("", "t64")]
    installed = _installed_version()
    wanted = [f"{p}={installed}" for p in packages if installed] + packages
    lists = work / "apt"
    (lists / "lists" / "partial").mkdir(parents=True)
    (lists / "cache" / "archives" / "partial").mkdir(parents=True)
    private = ["-o", f"Dir::State::lists={lists / 'lists'}", "-o", f"Dir::Cache={lists / 'cache'}"]
    failure: subprocess.CalledProcessError | None = None
    for options in ([], private):
        if options:
            _run(["apt-get", *options, "-q", "update"], work)
        for package in wanted:
            try:
                _run(["apt-get", *options, "-q", "download", package], work)
            except subprocess.CalledProcessError as exc:
                failure = exc
                continue
            return next(work.glob("*.deb"))
    assert failure is not None
    raise failure


def _installed_version() -> str:
    """Version of the distribution's interpreter package, "" where it has none."""
    package = f"libpython{PYTHON_VERSION}-minimal"
    found = subprocess.run(
        ["dpkg-query", "-W", "-f=${Version}", package], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() if found.returncode == 0 else ""


def _run(command: list[str], work: Path) -> None:
    subprocess.run(
        command, cwd=work, check=True, capture_output=True, text=True, timeout=_APT_TIMEOUT_SECONDS
    )
