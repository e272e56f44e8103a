"""kv_encode: KV values -> one chunk object (docs/format.md).

Inputs   input_ids  INT32  [num_tokens]  the chunk's token ids
         kv_spec    STRING [1]  JSON: spec, profile, first_position, identity, chunk_key, parent_key
         kv_target  STRING [1]  JSON BlockTarget to read the values from, or
         kv_values  UINT8  [num_bytes]  the values, canonical [L, K, H, T, D]
Outputs  chunk      UINT8  [num_bytes]
         kv_status  STRING [1]  JSON: encoder, num_bytes, ratio, encode_ms
Errors   INVALID_ARG values, spec or profile do not fit
"""

import triton_python_backend_utils as pb_utils

from kvfetcher import wire
from kvfetcher.backend import setup
from kvfetcher.backend.coding import ChunkEncoder
from kvfetcher.backend.respond import respond_each
from kvfetcher.backend.tensors import bytes_tensor, read_bytes, read_ids, read_text, text_tensor
from kvfetcher.backend.vitals import watched
from kvfetcher.config import load_config


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        config = load_config()
        setup.lower_priority(config.save.nice)
        self.encoder = ChunkEncoder(config.codec)

    @watched
    def execute(self, requests):
        return respond_each(requests, self._encode, pb_utils)

    def _encode(self, request):
        chunk, status = self.encoder.encode(
            read_ids(request, wire.INPUT_IDS, pb_utils),
            spec_json=read_text(request, wire.KV_SPEC, pb_utils),
            target_json=read_text(request, wire.KV_TARGET, pb_utils, default=""),
            values=read_bytes(request, wire.KV_VALUES, pb_utils),
        )
        return [
            bytes_tensor(wire.CHUNK, chunk, pb_utils),
            text_tensor(wire.KV_STATUS, status, pb_utils),
        ]

    def finalize(self):
        self.encoder.close()
