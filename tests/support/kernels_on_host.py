"""hevc_encode.cu compiled for the CPU (cuda_on_host.h), as a `hevc_encode.Launcher`."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import kvfetcher.codec.gpu as package

if TYPE_CHECKING:
    from kvfetcher.codec.gpu.hevc_encode import Parameters

SOURCE = Path(package.__file__).parent / "hevc_encode.cu"
HEADER = Path(__file__).with_name("cuda_on_host.h")
KERNELS = ("plan", "stats", "tokens", "chain", "arith", "measure", "compact")


class HostLauncher:
    """Runs kernels on the CPU, one thread at a time; its tensors are torch's on the CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def launch(
        self,
        kernel: str,
        blocks: tuple[int, int],
        threads: int,
        parameters: Parameters,
        stream: int,
    ) -> None:
        function = getattr(self._library, f"launch_{kernel}")
        function(ctypes.byref(parameters), *blocks, threads)


def build(folder: Path, *flags: str) -> HostLauncher:
    """Compile the kernels with the host's g++.

    Raises:
        subprocess.CalledProcessError: it does not compile; the message is on standard error.
    """
    entries = "\n".join(
        f'extern "C" void launch_{name}(Batch* b, int x, int y, int threads)'
        f" {{ on_host::launch({name}, *b, x, y, threads); }}"
        for name in KERNELS
    )
    main, library = folder / "kernels.cpp", folder / "kernels.so"
    main.write_text(f'#include "{HEADER}"\n#include "{SOURCE}"\n{entries}\n')
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-w", *flags]
    subprocess.run([*command, "-o", str(library), str(main)], check=True)
    return HostLauncher(library)
