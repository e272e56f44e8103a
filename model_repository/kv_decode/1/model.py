"""kv_decode: one unit's H.265 bitstream -> integer planes.

Inputs   unit    UINT8 [1, num_bytes]  one unit (FORMAT.md)
Outputs  planes  UINT8 [1, num_frames, num_planes, height, width * bytes_per_sample]
         decode_status  STRING [1, 1]  JSON: decoder, decode_ms, fallback
Errors   INVALID_ARG bad unit · UNAVAILABLE no decoder for it
"""

import triton_python_backend_utils as pb_utils

from kvfetcher import wire
from kvfetcher.config import load_config
from kvfetcher.serving import setup
from kvfetcher.serving.coding import UnitDecoder
from kvfetcher.serving.respond import respond_each
from kvfetcher.serving.tensors import read_bytes, text_tensor


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        self.decoder = UnitDecoder(load_config().codec.decoder)

    def execute(self, requests):
        return respond_each(requests, self._decode, pb_utils)

    def _decode(self, request):
        planes, status = self.decoder.decode(read_bytes(request, wire.UNIT, pb_utils))
        return [
            pb_utils.Tensor(wire.PLANES, planes[None]),
            text_tensor(wire.DECODE_STATUS, status, pb_utils, batched=True),
        ]

    def finalize(self):
        self.decoder.close()
