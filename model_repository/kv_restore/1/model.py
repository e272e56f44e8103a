"""kv_restore: integer planes -> KV values, checked, written into arena blocks or returned.

Inputs   unit       UINT8  [1, num_bytes]  one unit (docs/format.md), or kv_decode's unit_rest
         planes     UINT8  [1, num_frames, num_planes, height, width * bytes_per_sample]; not looked
                    at where the unit has no video
         planes_at  STRING [1, 1]  JSON PlaneTicket of planes on a GPU, sealed by kv_decode; optional
         decode_status  STRING [1, 1]  JSON of kv_decode, passed on; optional
         kv_target  STRING [1, 1]  JSON BlockTarget, sealed by kv_fetch; absent or "" = return the values
Outputs  kv_values  UINT8  [1, num_bytes]  canonical [L, K, H, T, D]; empty where a target is given
         kv_status  STRING [1, 1]  JSON: layers, tokens, times, stamps, batch, which decoder
Errors   NOT_FOUND planes or target not issued here · INVALID_ARG bad unit · UNAVAILABLE the arena is
         gone, or kv_decode's reply belongs to another unit
"""

import triton_python_backend_utils as pb_utils

from kvfetcher import wire
from kvfetcher.backend import setup
from kvfetcher.backend.coding import UnitRestorer
from kvfetcher.backend.overlapped import OverlappedResponses
from kvfetcher.backend.tensors import bytes_tensor, read_array, read_text, read_view, text_tensor
from kvfetcher.backend.vitals import watched
from kvfetcher.codec.gpu.nvdec import has_driver
from kvfetcher.config import load_config
from kvfetcher.memory.control import run_dir


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        config = load_config()
        setup.yield_gpu(percent=config.server.mps_restore_percent)
        self.restorer = UnitRestorer(run_folder=run_dir())
        if has_driver():
            self.restorer.warm_up(config)
        else:
            setup.lower_priority(config.fetch.nice)

        self.responses = OverlappedResponses(
            self._start,
            self.restorer.close_batch,
            self._finish,
            pb_utils,
            after=lambda: setup.end_if_lost(self.restorer.is_lost()),
        )

    @watched
    def execute(self, requests):
        self.responses.execute(requests)

    def _start(self, request):
        return self.restorer.start(
            read_view(request, wire.UNIT, pb_utils),
            read_array(request, wire.PLANES, pb_utils)[0],
            planes_at=read_text(request, wire.PLANES_AT, pb_utils, default=""),
            target_json=read_text(request, wire.KV_TARGET, pb_utils, default=""),
            decode_status=read_text(request, wire.DECODE_STATUS, pb_utils, default=""),
        )

    def _finish(self, batch):
        return [
            found if isinstance(found, Exception) else self._tensors(*found)
            for found in self.restorer.finish(batch)
        ]

    def _tensors(self, values, status):
        return [
            bytes_tensor(wire.KV_VALUES, values, pb_utils, batched=True),
            text_tensor(wire.KV_STATUS, status, pb_utils, batched=True),
        ]

    def finalize(self):
        self.responses.close()
        self.restorer.close()
