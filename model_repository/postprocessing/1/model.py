"""postprocessing: the LLM's responses -> the client's; ends answers that nobody waits for.

Inputs   text_output STRING [1], output_ids INT32 [n], finish_reason STRING [1],
         kv_report STRING [1], stream_id STRING [1], num_input_tokens UINT32 [1]
Outputs  text_output, output_ids, finish_reason, kv_report, num_input_tokens,
         num_output_tokens UINT32 [1] of this response; none for a heartbeat
Triton marks only the *next* step of an ensemble as cancelled when the client goes away. This is the
next step: it tells the engine process to stop.
"""

import triton_python_backend_utils as pb_utils

from kvfetcher.backend import setup
from kvfetcher.backend.answering import AnswerRelay
from kvfetcher.backend.respond import send, send_error
from kvfetcher.backend.vitals import watched


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        self.relay = AnswerRelay(pb_utils)

    @watched
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                send(sender, self.relay.pass_on(request), pb_utils, is_last=True)
            except Exception as exc:  # noqa: BLE001 - the boundary
                send_error(sender, exc, pb_utils)

    def finalize(self):
        self.relay.close()
