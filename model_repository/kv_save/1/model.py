"""kv_save: leased KV of computed chunks -> kv_encode -> store, off every request's path.

Inputs   input_ids  INT32  [num_tokens]  all tokens from position 0
         kv_lease   STRING [1]  JSON SaveTicket, sealed by tensorrt_llm; its lease is released here, whatever happens
Outputs  kv_report  STRING [1]  JSON: chunks saved, skipped, bytes, times
Errors   NOT_FOUND not issued by tensorrt_llm. What the store refuses is in the report.
"""

import triton_python_backend_utils as pb_utils

from kvfetcher import wire
from kvfetcher.backend import setup
from kvfetcher.backend.respond import respond_each_async
from kvfetcher.backend.saving import build_saver
from kvfetcher.backend.tensors import read_ids, read_text, text_tensor
from kvfetcher.backend.vitals import watched
from kvfetcher.config import load_config


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        config = load_config()
        setup.lower_priority(config.save.nice)
        self.saver = build_saver(config, pb_utils)

    @watched
    async def execute(self, requests):
        return await respond_each_async(requests, self._save, pb_utils)

    async def _save(self, request):
        report = await self.saver.save(
            read_ids(request, wire.INPUT_IDS, pb_utils),
            read_text(request, wire.KV_LEASE, pb_utils),
        )
        return [text_tensor(wire.KV_REPORT, report.to_json(), pb_utils)]

    def finalize(self):
        self.saver.close()
