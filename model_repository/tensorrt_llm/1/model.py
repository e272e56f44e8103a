"""tensorrt_llm: token ids (and a lease on ready KV) -> text, streamed.

Inputs   input_ids  INT32  [num_tokens]
         sampling   STRING [1]  JSON (backend/params.py), sealed by kv_fetch
         kv_lease   STRING [1]  JSON or ""
         kv_report  STRING [1]  JSON of the fetch, completed here
Outputs  text_output STRING [1], output_ids INT32 [n], finish_reason STRING [1] ("" until the last),
         kv_report STRING [1] (JSON on the first and the last response, "" between),
         num_input_tokens UINT32 [1] tokens of the prompt,
         stream_id STRING [1] names the running answer (control operation "cancel")
Errors   NOT_FOUND not issued by kv_fetch · INVALID_ARG bad request · UNAVAILABLE queue full · CANCELLED · INTERNAL engine failed
This process owns the engine and its KV arena.
"""

import asyncio

import triton_python_backend_utils as pb_utils

from kvfetcher.backend import setup
from kvfetcher.backend.generating import Generation, SaveQueue
from kvfetcher.backend.metrics import Metrics
from kvfetcher.backend.respond import is_internal, log_failure, send, send_error, settle_ensemble
from kvfetcher.backend.vitals import watched
from kvfetcher.config import load_config
from kvfetcher.engines.host import EngineHost
from kvfetcher.memory.permits import Permits


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        config = load_config()
        self.host = EngineHost(config)
        self.saves = SaveQueue(config, pb_utils)
        self.metrics = Metrics(pb_utils)
        self.permits = Permits.of_run()
        self.is_open = config.trust.internal_models == "open"

    @watched
    async def execute(self, requests):
        await asyncio.gather(*(self._serve(request) for request in requests))

    async def _serve(self, request):
        sender = request.get_response_sender()
        is_begun = is_answered = False
        try:
            generation = Generation.read(request, pb_utils, self.permits, is_open=self.is_open)
            async for response, is_last in generation.responses(self.host, sender.is_cancelled):
                send(sender, response, pb_utils, is_last=is_last)
                is_begun, is_answered = True, is_last
            generation.count(self.metrics)
            await self.saves.save(generation.ticket)
        except Exception as exc:  # noqa: BLE001 - the boundary
            if is_answered:
                log_failure("saving after the answer", exc)
                return
            if is_begun:
                await settle_ensemble()
            send_error(sender, exc, pb_utils)
            if is_internal(exc):
                setup.end_if_lost(await asyncio.to_thread(self.host.is_lost))

    def finalize(self):
        self.saves.close()
        self.metrics.close()
        self.host.close()
