"""Host memory in the place of GPUs, for what of the GPU path is not CUDA itself."""

import ctypes
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from kvfetcher.backend import gpu_coding
from kvfetcher.codec.gpu import nvdec
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import GpuError
from kvfetcher.memory import gpu_arena
from kvfetcher.memory.cuda import CudaContext


class HostAsGpu:
    """`CudaContext` over host memory; `log` has what was called that leaves no other trace."""

    def __init__(self, gpu=0):
        self.gpu = gpu
        self.memory = {}
        self.is_full = False
        self.is_broken = False
        self.opened = 0
        self.log = []

    def allocate(self, num_bytes):
        if self.is_full:
            raise GpuError("out of memory")
        buffer = (ctypes.c_uint8 * num_bytes)()
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        return address

    def free(self, address):
        del self.memory[address]

    def share(self, address):
        return address.to_bytes(64, "little")

    def open_shared(self, handle):
        address = int.from_bytes(handle, "little")
        if address not in self.memory:
            raise GpuError("its owner is gone")
        self.opened += 1
        return address

    def close_shared(self, address):
        self.opened -= 1

    def allocate_host(self, num_bytes):
        return self.allocate(num_bytes)

    def free_host(self, address):
        self.free(address)

    def copy(self, target, source, num_bytes):
        ctypes.memmove(target, source, num_bytes)

    copy_to_host = copy

    def new_event(self):
        return 7

    def free_event(self, event):
        pass

    def record(self, event):
        self.log.append("record")

    def wait_on_gpu(self, event):
        self.log.append("wait")

    def share_event(self, event):
        return event.to_bytes(64, "little")

    def open_event(self, handle):
        return int.from_bytes(handle, "little")

    def synchronize(self):
        self.log.append("synchronize")
        if self.is_broken:
            raise GpuError("CUDA call cuCtxSynchronize failed with 700 (illegal address)")

    settle = CudaContext.settle
    is_lost = CudaContext.is_lost

    def memory_info(self):
        return 5, 10

    def holds(self, address):
        return any(0 <= address - start < len(b) for start, b in self.memory.items())


def gpus_in_host_memory(monkeypatch):
    """As many `HostAsGpu` as are asked for, by index; the GPU path works on them from now on."""
    gpus = defaultdict(HostAsGpu)

    def as_tensor(address, shape, *, item_bytes, gpu):
        assert gpus[gpu].holds(address)
        size = int(np.prod(shape)) * item_bytes
        buffer = (ctypes.c_uint8 * size).from_address(address)
        kind = np.int16 if item_bytes == 2 else np.uint8
        return torch.from_numpy(np.frombuffer(buffer, kind).reshape(shape))

    for module in (gpu_arena, gpu_coding):
        monkeypatch.setattr(module, "cuda_context", lambda index: gpus[index])
    monkeypatch.setattr(gpu_arena, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return gpus


class HostAsNvdec:
    """PyNvVideoCodec as far as `NvdecDecoder` calls it: pictures come from the CPU decoder.

    Args:
        geometry: of the streams that it is given; each packet is an intra picture.
    """

    cudaVideoCodec = SimpleNamespace(HEVC=0)
    cudaVideoChromaFormat = SimpleNamespace(__members__={"420": 1, "444": 3})
    DisplayDecodeLatencyType = SimpleNamespace(LOW=1)
    VideoPacketFlag = SimpleNamespace(ENDOFPICTURE=1)
    PacketData = SimpleNamespace

    def __init__(self, geometry):
        self.geometry = geometry
        self.opened = []
        self.gpus = set()
        self.pictures = 0

    def GetDecoderCaps(self, **asked):
        self.gpus.add(asked["gpuid"])
        return {
            "num_decoder_engines": 7, "width_min": 144, "height_min": 144,
            "width_max": 8192, "height_max": 8192,
        }  # fmt: skip

    def CreateDecoder(self, **settings):
        self.gpus.add(settings["gpuid"])
        self.opened.append((settings["maxwidth"], settings["maxheight"]))
        return SimpleNamespace(Decode=self._decode)

    def _decode(self, packet):
        data = ctypes.string_at(packet.bsl_data, packet.bsl)
        geometry = replace(self.geometry, num_frames=1)
        picture = VideoDecoder().decode([data], geometry) << nvdec.sample_shift(geometry)
        self.pictures += 1
        return [
            SimpleNamespace(
                shape=(geometry.num_planes * geometry.rows, geometry.width),
                strides=(geometry.width, 1),
                framesize=lambda: picture.nbytes,
                GetPtrToPlane=lambda _: picture.ctypes.data,
            )
        ]


def nvdec_on_host(monkeypatch, geometry):
    """(library, GPU): `NvdecDecoder` works on both from now on."""
    library, gpu = HostAsNvdec(geometry), HostAsGpu()
    monkeypatch.setattr(nvdec, "import_library", lambda: library)
    monkeypatch.setattr(nvdec, "cuda_context", lambda index: gpu)
    return library, gpu
