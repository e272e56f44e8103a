"""The CUDA driver through ctypes: memory of one GPU, and sharing it between processes.

For processes that do not need torch, and for what torch does not offer: memory whose IPC handle is
ours to hand out. The context is the GPU's primary one, which torch and PyNvVideoCodec use too; copies
run on the legacy default stream, in the order in which they are called.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from typing import TYPE_CHECKING, Any

from kvfetcher.errors import DecoderUnavailableError, GpuError

if TYPE_CHECKING:
    from collections.abc import Sequence

IPC_HANDLE_BYTES = 64
REMEDY = (
    "install the NVIDIA driver with its video libraries; a container needs the capability `video`"
    " (NVIDIA_DRIVER_CAPABILITIES=compute,utility,video)"
)

# Allocations of less share a page with others, and an IPC handle shares the whole page.
_GRANULE_BYTES = 2 << 20
_LAZY_PEER_ACCESS = 1
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_COMPUTE_CAPABILITY = (75, 76)
_EVENT_FLAGS = 2 | 4  # no timing, shared between processes
_SETUP_CALLS = ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain")


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * IPC_HANDLE_BYTES),)


class CudaContext:
    """The primary context of one GPU, kept until the process ends. Thread-safe.

    Args:
        gpu: index, as CUDA counts.

    Raises:
        DecoderUnavailableError: no driver, or no such GPU; with the remedy.
    """

    def __init__(self, gpu: int) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as exc:
            raise DecoderUnavailableError(f"no libcuda.so.1 here; {REMEDY}") from exc
        self.gpu = gpu
        device, count = ctypes.c_int(), ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if gpu >= count.value:
            raise DecoderUnavailableError(
                f"there is no GPU {gpu} here: CUDA counts {count.value}, from 0; see engine.device,"
                " server.decode_gpus and $CUDA_VISIBLE_DEVICES"
            )
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(gpu))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def allocate(self, num_bytes: int) -> int:
        """Address of new memory that can be shared; give it back with `free`.

        Raises:
            GpuError: the GPU has too little memory left.
        """
        address = ctypes.c_uint64()
        rounded = -(-num_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        self._run("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(rounded))
        return address.value

    def free(self, address: int) -> None:
        """Give memory back. Other processes that opened it keep it until they close it."""
        self._run("cuMemFree_v2", ctypes.c_uint64(address))

    def share(self, address: int) -> bytes:
        """The IPC handle (IPC_HANDLE_BYTES) of memory made by `allocate`."""
        handle = _IpcHandle()
        self._run("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.reserved)

    def open_shared(self, handle: bytes) -> int:
        """Address of another process's memory; let go with `close_shared`.

        Raises:
            GpuError: its owner is gone, or lies in this very process (CUDA refuses that).
        """
        address = ctypes.c_uint64()
        wanted = _IpcHandle((ctypes.c_ubyte * IPC_HANDLE_BYTES)(*handle))
        flags = ctypes.c_uint(_LAZY_PEER_ACCESS)
        self._run("cuIpcOpenMemHandle_v2", ctypes.byref(address), wanted, flags)
        return address.value

    def close_shared(self, address: int) -> None:
        """Let go of what `open_shared` gave."""
        self._run("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def allocate_host(self, num_bytes: int) -> int:
        """Address of page-locked host memory; give it back with `free_host`."""
        address = ctypes.c_void_p()
        self._run("cuMemAllocHost_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return address.value or 0

    def free_host(self, address: int) -> None:
        """Give page-locked memory back."""
        self._run("cuMemFreeHost", ctypes.c_void_p(address))

    def copy_to_host(self, target: int, source: int, num_bytes: int) -> None:
        """Copy GPU memory into host memory; over when this returns."""
        self._run(
            "cuMemcpyDtoH_v2", ctypes.c_void_p(target), ctypes.c_uint64(source),
            ctypes.c_size_t(num_bytes),
        )  # fmt: skip

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copy within the GPU; over after `synchronize`."""
        self._run(
            "cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source),
            ctypes.c_size_t(num_bytes), ctypes.c_void_p(0),
        )  # fmt: skip

    def new_event(self) -> int:
        """An event that other processes can wait for; give it back with `free_event`."""
        event = ctypes.c_void_p()
        self._run("cuEventCreate", ctypes.byref(event), ctypes.c_uint(_EVENT_FLAGS))
        return event.value or 0

    def free_event(self, event: int) -> None:
        """Give an event back, own or opened."""
        self._run("cuEventDestroy_v2", ctypes.c_void_p(event))

    def record(self, event: int) -> None:
        """The event happens when all copies given so far are over."""
        self._run("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(0))

    def wait_on_gpu(self, event: int) -> None:
        """Work given to the default stream from now on starts after the event."""
        self._run("cuStreamWaitEvent", ctypes.c_void_p(0), ctypes.c_void_p(event), ctypes.c_uint(0))

    def share_event(self, event: int) -> bytes:
        """The IPC handle (IPC_HANDLE_BYTES) of an event made by `new_event`."""
        handle = _IpcHandle()
        self._run("cuIpcGetEventHandle", ctypes.byref(handle), ctypes.c_void_p(event))
        return bytes(handle.reserved)

    def open_event(self, handle: bytes) -> int:
        """Another process's event.

        Raises:
            GpuError: its owner is gone.
        """
        event = ctypes.c_void_p()
        wanted = _IpcHandle((ctypes.c_ubyte * IPC_HANDLE_BYTES)(*handle))
        self._run("cuIpcOpenEventHandle", ctypes.byref(event), wanted)
        return event.value or 0

    def compute_capability(self) -> tuple[int, int]:
        """Major and minor number of the GPU's architecture: (9, 0) for an H100."""
        device, numbers = ctypes.c_int(), []
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(self.gpu))
        for attribute in _COMPUTE_CAPABILITY:
            number = ctypes.c_int()
            self._call(
                "cuDeviceGetAttribute", ctypes.byref(number), ctypes.c_int(attribute), device
            )
            numbers.append(number.value)
        return numbers[0], numbers[1]

    def load_kernels(self, image: bytes, names: Sequence[str]) -> dict[str, int]:
        """Functions of a cubin, which stays loaded.

        Raises:
            GpuError: it is not one for this GPU, or lacks a function.
        """
        module = ctypes.c_void_p()
        self._run("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        found = {}
        for name in names:
            function = ctypes.c_void_p()
            text = ctypes.c_char_p(name.encode())
            self._run("cuModuleGetFunction", ctypes.byref(function), module, text)
            found[name] = function.value or 0
        return found

    def launch(
        self,
        function: int,
        blocks: tuple[int, int],
        threads: int,
        parameters: ctypes.Structure,
        stream: int,
    ) -> None:
        """Start a kernel that takes one structure; what it uses must stay until it is over.

        Args:
            function: from `load_kernels`.
            blocks: their number along x and y.
            threads: of a block.
            parameters: copied before this returns.
            stream: handle of a CUDA stream; 0 = the default one.
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        sizes = (*blocks, 1, threads, 1, 1, 0)  # and no dynamic shared memory
        self._run(
            "cuLaunchKernel", ctypes.c_void_p(function), *map(ctypes.c_uint, sizes),
            ctypes.c_void_p(stream), pointers, ctypes.c_void_p(0),
        )  # fmt: skip

    def synchronize(self) -> None:
        """Wait until all that this process gave to the GPU is over."""
        self._run("cuCtxSynchronize")

    def settle(self) -> None:
        """`synchronize`, also where the context is lost: then nothing runs any more."""
        with contextlib.suppress(GpuError):
            self.synchronize()

    def is_lost(self) -> bool:
        """Whether an error has made the context unusable: only a new process gets another one.

        Waits as `synchronize`: nothing of this process runs on the GPU afterwards.
        """
        try:
            self.synchronize()
        except GpuError:
            return True  # what this call reports, every later one does, too
        return False

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU, over all processes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._run("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def _run(self, name: str, *arguments: Any) -> None:
        self._call("cuCtxSetCurrent", self._context)  # of this thread
        self._call(name, *arguments)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(status, ctypes.byref(text))
            reason = (text.value or b"unknown").decode()
            message = f"CUDA call {name} on GPU {self.gpu} failed with {status} ({reason})"
            if name in _SETUP_CALLS:
                raise DecoderUnavailableError(f"{message}; {REMEDY}")
            raise GpuError(message)


_contexts: dict[int, CudaContext] = {}
_lock = threading.Lock()


def cuda_context(gpu: int) -> CudaContext:
    """This process's context on a GPU.

    Raises:
        DecoderUnavailableError: as `CudaContext`.
    """
    with _lock:
        if gpu not in _contexts:
            _contexts[gpu] = CudaContext(gpu)
        return _contexts[gpu]
