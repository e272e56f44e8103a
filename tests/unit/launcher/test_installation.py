import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvfetcher.errors import ServerError
from kvfetcher.launcher import installation, libpython
from kvfetcher.launcher.installation import (
    Installation,
    check_numpy,
    find_installation,
    prepare_shim,
)
from kvfetcher.launcher.libpython import PYTHON_VERSION, library_name

FITTING_STUB = f"ELF libpython{PYTHON_VERSION}.so.1.0".encode()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """An empty cache; libpython, which may have been downloaded, is where it really is."""
    here = libpython.find_libpython() or tmp_path
    monkeypatch.setattr(installation, "provide_libpython", lambda: here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _system(folder, stub=FITTING_STUB):
    """Something that looks like NVIDIA's image."""
    (folder / "bin").mkdir(parents=True)
    executable = folder / "bin" / "tritonserver"
    executable.write_text("#!/bin/sh\n")
    executable.chmod(0o755)
    if stub is not None:
        (folder / "backends" / "python").mkdir(parents=True)
        (folder / "backends" / "python" / "triton_python_backend_stub").write_bytes(stub)
    return executable


def _bare_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installation, "OPT_TRITONSERVER", tmp_path / "opt")


@pytest.mark.triton
def test_wheels_server_is_put_together(tmp_path, monkeypatch):
    _bare_path(monkeypatch, tmp_path)
    found = find_installation()
    assert found.origin == "nvidia-pytriton"
    backend = found.backend_folder / "python"
    names = {"libtriton_python.so", "triton_python_backend_stub", "triton_python_backend_utils.py"}
    assert {p.name for p in backend.iterdir()} == names
    assert any((folder / library_name()).is_file() for folder in found.library_folders)
    assert find_installation() == found  # again, over what is there


@pytest.mark.parametrize("where", ["path", "opt"])
def test_systems_server_comes_first(tmp_path, monkeypatch, where):
    _bare_path(monkeypatch, tmp_path)
    executable = _system(tmp_path / "opt")
    if where == "path":
        monkeypatch.setenv("PATH", str(executable.parent))
        monkeypatch.setattr(installation, "OPT_TRITONSERVER", tmp_path / "absent")
    found = find_installation()
    assert (found.origin, found.executable) == ("system", executable)
    assert found.backend_folder == tmp_path / "opt" / "backends"


@pytest.mark.parametrize(
    ("stub", "message"),
    [(b"libpython3.4.so", "built for Python 3.4"), (None, "has no Python backend")],
)
def test_system_server_that_does_not_fit_is_explained(tmp_path, monkeypatch, stub, message):
    _bare_path(monkeypatch, tmp_path)
    _system(tmp_path / "opt", stub)
    monkeypatch.setattr(installation, "_wheel_root", lambda: None)
    with pytest.raises(ServerError, match=message):
        find_installation()


def test_no_server_at_all_is_explained(tmp_path, monkeypatch):
    _bare_path(monkeypatch, tmp_path)
    monkeypatch.setattr(installation, "_wheel_root", lambda: None)
    with pytest.raises(ServerError, match=r"pip install 'kvfetcher\[server\]'"):
        find_installation()


def test_shim_is_not_taken_for_the_systems_server(tmp_path, monkeypatch):
    _bare_path(monkeypatch, tmp_path)
    real = _system(tmp_path / "elsewhere")
    shim = prepare_shim(Installation(real, tmp_path / "back ends", (), "nvidia-pytriton"))
    real.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    output = subprocess.run(
        [shim / "tritonserver", "--model-repository", "a b"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == f"--backend-directory={tmp_path / 'back ends'}\n--model-repository\na b\n"
    monkeypatch.setenv("PATH", str(shim))
    monkeypatch.setattr(installation, "_wheel_root", lambda: None)
    with pytest.raises(ServerError, match="no tritonserver found"):
        find_installation()


def test_environment_puts_this_python_and_the_libraries_first():
    found = Installation(Path("/t"), Path("/b"), (Path("/one"), Path("/two")), "system")
    environ = found.environment({"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/old:/two", "A": "b"})
    assert environ == {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin",
        "LD_LIBRARY_PATH": "/one:/two:/old",
        "A": "b",
        "OPENBLAS_NUM_THREADS": "1",
    }
    assert found.environment({"OPENBLAS_NUM_THREADS": "3"})["OPENBLAS_NUM_THREADS"] == "3"


@pytest.mark.parametrize("version", ["2.0.0", "2.4.1", None])
def test_numpy_that_garbles_tensors_is_refused(monkeypatch, version):
    def report(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", report)
    with pytest.raises(ServerError, match=r"must be < 2.*pip install 'numpy<2'"):
        check_numpy()


def _without_libpython(monkeypatch):
    monkeypatch.setattr(libpython.sysconfig, "get_config_var", lambda name: "/absent")
    monkeypatch.setattr(libpython.sys, "base_prefix", "/absent")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    present = Path.is_file
    system = ("/usr/", "/lib")
    monkeypatch.setattr(
        Path, "is_file", lambda path: not str(path).startswith(system) and present(path)
    )


def _package(folder):
    """A .deb that holds one file named as the library."""
    root = folder / "package"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: libpython\nVersion: 1\nArchitecture: amd64\nMaintainer: x <x@y>\nDescription: x\n"
    )
    (root / "usr" / "lib").mkdir(parents=True)
    (root / "usr" / "lib" / library_name()).write_bytes(b"the library")
    subprocess.run(
        ["dpkg-deb", "--build", root, folder / "libpython.deb"], check=True, capture_output=True
    )
    return folder / "libpython.deb"


needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="not a Debian")


@needs_dpkg
def test_missing_libpython_is_unpacked_from_its_package_once(tmp_path, monkeypatch):
    package = _package(tmp_path)
    calls = []

    def run(command, work):
        calls.append(command[0])
        if command[0] == "apt-get":
            if "update" in command or command[-1].endswith(f"{PYTHON_VERSION}"):
                shutil.copy(package, work)
        else:
            subprocess.run(command, check=True, cwd=work)

    _without_libpython(monkeypatch)
    monkeypatch.setattr(libpython, "_run", run)
    monkeypatch.setattr(libpython, "_installed_version", lambda: "")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert libpython.find_libpython() is None
    folder = libpython.provide_libpython()
    assert (folder / library_name()).read_bytes() == b"the library"
    assert calls == ["apt-get", "dpkg-deb"]
    assert libpython.provide_libpython() == folder
    assert len(calls) == 2


def test_missing_libpython_without_apt_names_the_package(monkeypatch):
    _without_libpython(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ServerError, match=rf"install the system package libpython{PYTHON_VERSION}"):
        libpython.provide_libpython()


def test_failed_download_names_package_and_reason(monkeypatch):
    def fail(command, work):
        raise subprocess.CalledProcessError(100, command, stderr="E: Unable to locate package\n")

    _without_libpython(monkeypatch)
    monkeypatch.setattr(libpython, "_run", fail)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(ServerError, match=r"apt-get install libpython.*Unable to locate package"):
        libpython.provide_libpython()
    assert not [p for p in libpython.cache_home().rglob("*") if p.is_file()]


def test_cache_that_cannot_be_written_is_explained(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file\n")
    root = tmp_path / "pytriton" / "tritonserver"
    (root / "python_backend_stubs" / PYTHON_VERSION).mkdir(parents=True)
    (root / "python_backend_stubs" / PYTHON_VERSION / "triton_python_backend_stub").touch()
    with pytest.raises(ServerError, match="XDG_CACHE_HOME"):
        installation._wheel_installation(root)


def test_wheel_without_a_stub_for_this_python_is_explained(tmp_path):
    (tmp_path / "python_backend_stubs" / "3.4").mkdir(parents=True)
    with pytest.raises(ServerError, match=rf"no stub for Python {PYTHON_VERSION}, only \['3.4'\]"):
        installation._wheel_installation(tmp_path)
