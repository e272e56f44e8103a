"""The kernels of a CUDA C file on one GPU: compiled by NVRTC, kept as cubins, started by the driver.

NVRTC comes with torch. A cubin is for one GPU architecture; it is kept in ``<cache>/kernels`` under a
name made of the source, the architecture and NVRTC's version, so that a process that starts later
loads it in milliseconds (compiling takes one to two seconds).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfetcher.config import cache_home
from kvfetcher.errors import GpuError
from kvfetcher.memory.cuda import cuda_context

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SOURCE = Path(__file__).with_name("hevc_encode.cu")
KERNELS = ("plan", "stats", "tokens", "chain", "arith", "measure", "compact")

_OPTIONS = ("--std=c++17",)
# The newest first; a process that has imported torch for CUDA has one of them loaded.
_SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")

_log = logging.getLogger(__name__)


class KernelLauncher:
    """Starts the kernels of one source on one GPU. See `hevc_encode.Launcher`.

    Args:
        gpu: index, as CUDA counts.
        source: the CUDA C file.
        kernels: its ``extern "C"`` kernels, each of which takes one structure.

    Raises:
        GpuError: NVRTC is missing, does not know this GPU, or the driver refuses the result.
        DecoderUnavailableError: no driver, or no such GPU.
    """

    def __init__(self, gpu: int, source: Path = SOURCE, kernels: Sequence[str] = KERNELS) -> None:
        self._context = cuda_context(gpu)
        image = _cubin(source, self._context.compute_capability())
        self._functions = self._context.load_kernels(image, kernels)

    def launch(
        self,
        kernel: str,
        blocks: tuple[int, int],
        threads: int,
        parameters: ctypes.Structure,
        stream: int,
    ) -> None:
        """Start one; see `CudaContext.launch`."""
        self._context.launch(self._functions[kernel], blocks, threads, parameters, stream)


def _cubin(source: Path, capability: tuple[int, int]) -> bytes:
    """From the cache, or compiled and put there."""
    nvrtc = _Nvrtc()
    architecture = f"sm_{capability[0]}{capability[1]}"
    text = source.read_bytes()
    options = (f"--gpu-architecture={architecture}", *_OPTIONS)
    made_of = b"\0".join((text, *(o.encode() for o in options), nvrtc.version.encode()))
    name = f"{source.stem}-{architecture}-{hashlib.sha256(made_of).hexdigest()[:24]}.cubin"
    path = cache_home() / "kernels" / name
    with contextlib.suppress(OSError):
        return path.read_bytes()
    image = nvrtc.compile(text, source.name, options)
    partial = path.with_name(f"{name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(image)
        partial.replace(path)
    except OSError as exc:
        _log.warning("compiled kernels are not kept: %s", exc)
    return image


class _Nvrtc:
    """NVRTC through ctypes."""

    def __init__(self) -> None:
        self._library = _load()
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(self, source: bytes, name: str, options: Sequence[str]) -> bytes:
        """CUDA C -> cubin.

        Raises:
            GpuError: it does not compile for that architecture; with the compiler's words.
        """
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), ctypes.c_char_p(source),
            ctypes.c_char_p(name.encode()), 0, None, None,
        )  # fmt: skip
        try:
            array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            if self._library.nvrtcCompileProgram(program, len(options), array):
                log = self._get(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
                raise GpuError(f"{name} does not compile with {options}: {log.decode()[:2000]}")
            return self._get(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, size_call: str, call: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_call, program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(call, program, data)
        return data.raw

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise GpuError(f"{name} failed with {status}")


def _load() -> ctypes.CDLL:
    for name in _candidates():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise GpuError("NVRTC (libnvrtc.so) is not here; install torch for CUDA, which brings it")


def _candidates() -> Iterator[str]:
    """By name, and in the folders where wheels put it."""
    yield from _SONAMES
    for folder in map(Path, sys.path):
        for soname in _SONAMES:
            yield from map(str, sorted(folder.glob(f"nvidia/*/lib/{soname}")))
            yield from map(str, sorted(folder.glob(f"torch/lib/{soname}*")))
