"""kv_restore: integer planes -> KV values, checked, written into arena blocks or returned.

Inputs   unit       UINT8  [1, num_bytes]  one unit (FORMAT.md)
         planes     UINT8  [1, num_frames, num_planes, height, width * bytes_per_sample]
         decode_status  STRING [1, 1]  JSON of kv_decode, passed on; optional
         kv_target  STRING [1, 1]  JSON BlockTarget; absent or "" = return the values
Outputs  kv_values  UINT8  [1, num_bytes]  canonical [L, K, H, T, D]; empty where a target is given
         kv_status  STRING [1, 1]  JSON: layers, tokens, times, which decoder
Errors   INVALID_ARG bad unit or target · NOT_FOUND the arena is gone
"""

import triton_python_backend_utils as pb_utils

from kvfetcher import wire
from kvfetcher.serving import setup
from kvfetcher.serving.coding import UnitRestorer
from kvfetcher.serving.respond import respond_each
from kvfetcher.serving.tensors import bytes_tensor, read_array, read_bytes, read_text, text_tensor


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        self.restorer = UnitRestorer()

    def execute(self, requests):
        return respond_each(requests, self._restore, pb_utils)

    def _restore(self, request):
        values, status = self.restorer.restore(
            read_bytes(request, wire.UNIT, pb_utils),
            read_array(request, wire.PLANES, pb_utils)[0],
            target_json=read_text(request, wire.KV_TARGET, pb_utils, default=""),
            decode_status=read_text(request, wire.DECODE_STATUS, pb_utils, default=""),
        )
        return [
            bytes_tensor(wire.KV_VALUES, values, pb_utils, batched=True),
            text_tensor(wire.KV_STATUS, status, pb_utils, batched=True),
        ]

    def finalize(self):
        self.restorer.close()
