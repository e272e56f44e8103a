"""kv_fetch: token ids -> a lease on restored KV of the longest stored prefix, and the report.

Inputs   input_ids INT32 [num_tokens], permit STRING [1] (of preprocessing; kv_policy `warm` needs
         none), prompt_tag STRING [1] (of the text that preprocessing read; with text_input only) and
         the sampling inputs of the client
Outputs  input_ids, sampling (JSON), kv_lease (JSON or ""), kv_report (JSON); inside an ensemble
         signs of life before them (backend/watching.py)
Errors   NOT_FOUND no permit · INVALID_ARG bad request. A store, chunk or decoder that fails is a miss with a reason.
One process owns the fetcher; requests run concurrently on the stub's event loop.
"""

import asyncio

import triton_python_backend_utils as pb_utils

from kvfetcher import wire
from kvfetcher.backend import setup
from kvfetcher.backend.fetching import build_fetcher
from kvfetcher.backend.params import read_client_request
from kvfetcher.backend.respond import send
from kvfetcher.backend.tensors import ids_tensor, text_tensor
from kvfetcher.backend.vitals import pulse, watched
from kvfetcher.backend.watching import end_fetch
from kvfetcher.config import load_config
from kvfetcher.memory.control import run_dir


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        self.config = load_config()
        self.fetcher = build_fetcher(self.config, pb_utils)

    @watched
    async def execute(self, requests):
        await asyncio.gather(*(self._serve(request) for request in requests))

    async def _serve(self, request):
        sender = request.get_response_sender()
        watch = self.fetcher.watch(request, sender)
        try:
            asked = read_client_request(
                request,
                self.config,
                pb_utils,
                self.fetcher.permits,
                run_folder=run_dir(),
                ring=self.fetcher.ring,
            )
            if not watch.in_ensemble:  # there, preprocessing has let it in
                pulse().refuse_when_stopping()
            async with watch:
                fetched = await self.fetcher.fetch(
                    asked.input_ids,
                    cache_salt=asked.options.cache_salt,
                    policy=asked.kv_policy,
                    is_cancelled=watch.is_gone,
                    request_id=request.request_id(),
                )
        except Exception as exc:  # noqa: BLE001 - the boundary
            await end_fetch(watch, sender, exc, pb_utils)
            return
        sampling = self.fetcher.seal(asked, fetched.lease_json)
        tensors = [
            ids_tensor(wire.INPUT_IDS, asked.input_ids, pb_utils),
            text_tensor(wire.SAMPLING, sampling, pb_utils),
            text_tensor(wire.KV_LEASE, fetched.lease_json, pb_utils),
            text_tensor(wire.KV_REPORT, fetched.report.to_json(), pb_utils),
        ]
        send(sender, pb_utils.InferenceResponse(output_tensors=tensors), pb_utils, is_last=True)

    def finalize(self):
        self.fetcher.close()
