"""kv_decode: one unit's H.265 bitstream -> integer planes.

Inputs   unit    UINT8 [1, num_bytes]  one unit (docs/format.md)
         kv_target  STRING [1, 1]  JSON BlockTarget; on a GPU, the planes stay there; optional
Outputs  planes  UINT8 [1, num_frames, num_planes, height, width * bytes_per_sample]
         planes_at  STRING [1, 1]  JSON PlaneTicket of planes on a GPU (planes is then one zero), or ""
         unit_rest  UINT8 [1, num_bytes]  the unit without its bitstream, for kv_restore
         decode_status  STRING [1, 1]  JSON: decoder, decode_ms, stamps, fallback
Errors   INVALID_ARG bad unit or target · UNAVAILABLE no decoder for it
"""

import triton_python_backend_utils as pb_utils

from kvfetcher import wire
from kvfetcher.backend import setup
from kvfetcher.backend.coding import UnitDecoder
from kvfetcher.backend.respond import respond_each
from kvfetcher.backend.tensors import bytes_tensor, read_text, read_view, text_tensor
from kvfetcher.backend.vitals import watched
from kvfetcher.config import load_config


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        setup.yield_gpu()
        config = load_config()
        share = setup.decoder_share(args, config)
        self.decoder = UnitDecoder(config.codec.decoder, gpu=share.gpu, ring_bytes=share.ring_bytes)
        if self.decoder.name == "cpu":
            setup.lower_priority(config.fetch.nice)

    @watched
    def execute(self, requests):
        on_cpu = self.decoder.name == "cpu"
        responses = respond_each(requests, self._decode, pb_utils, asks_cancelled=on_cpu)
        setup.end_if_lost(self.decoder.is_lost())
        return responses

    def _decode(self, request):
        decoded = self.decoder.decode_for(
            read_view(request, wire.UNIT, pb_utils),
            read_text(request, wire.KV_TARGET, pb_utils, default=""),
        )
        return [
            pb_utils.Tensor(wire.PLANES, decoded.planes[None]),
            text_tensor(wire.PLANES_AT, decoded.planes_at, pb_utils, batched=True),
            bytes_tensor(wire.UNIT_REST, decoded.rest, pb_utils, batched=True),
            text_tensor(wire.DECODE_STATUS, decoded.status, pb_utils, batched=True),
        ]

    def finalize(self):
        self.decoder.close()
