"""kv_encode: KV values -> one chunk object (docs/format.md).

Inputs   input_ids  INT32  [num_tokens]  the chunk's token ids
         kv_spec    STRING [1]  JSON: spec, first_position, identity_digest, chunk_key, parent_key
         kv_target  STRING [1]  JSON BlockTarget, sealed by kv_save, to read the values from, or
         kv_values  UINT8  [num_bytes]  the values, canonical [L, K, H, T, D]
Outputs  chunk      UINT8  [num_bytes]
         kv_status  STRING [1]  JSON: encoder (gpu where the values lie on one), num_bytes, ratio, encode_ms
Errors   NOT_FOUND target not issued here · INVALID_ARG values, spec or profile do not fit
"""

import triton_python_backend_utils as pb_utils

from kvfetcher.backend import setup
from kvfetcher.backend.coding import ChunkEncoder
from kvfetcher.backend.encode_requests import EncodeRequests
from kvfetcher.backend.vitals import watched
from kvfetcher.codec.gpu.nvdec import has_driver
from kvfetcher.config import load_config


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        config = load_config()
        setup.yield_gpu(percent=config.server.mps_restore_percent)
        setup.lower_priority(config.save.nice)
        self.encoder = ChunkEncoder(config.codec, on_gpu=config.save.on_gpu)
        if config.save.on_gpu and has_driver():
            self.encoder.warm_up(config)
        # On an H200 no save ended whose chunks came through response senders; before, they did.
        self.requests = EncodeRequests(
            self.encoder,
            pb_utils,
            after=lambda: setup.end_if_lost(self.encoder.is_lost()),
            at_once=has_driver() and not config.save.on_gpu,
        )

    @watched
    def execute(self, requests):
        return self.requests.execute(requests)

    def finalize(self):
        self.requests.close()
        self.encoder.close()
