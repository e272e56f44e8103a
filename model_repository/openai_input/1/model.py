"""openai_input: what Triton's OpenAI frontend sends -> text and options of our own models.

Inputs   text_input STRING, stream BOOL, max_tokens INT32, temperature FP32, top_p FP32,
         seed UINT64, frequency_penalty FP32, presence_penalty FP32, guided_decoding_guide_type
         STRING, guided_decoding_guide STRING, return_num_input_tokens BOOL,
         return_num_output_tokens BOOL: each [1, 1]; stop_words STRING [1, n]
Outputs  text_input STRING [1]; client_options STRING [1], JSON
Errors   INVALID_ARG a value out of its range · UNSUPPORTED penalties, guided decoding
"""

import triton_python_backend_utils as pb_utils

from kvfetcher import wire
from kvfetcher.backend import setup
from kvfetcher.backend.openai_input import read_openai_options
from kvfetcher.backend.respond import respond_each
from kvfetcher.backend.tensors import read_text, text_tensor
from kvfetcher.backend.vitals import watched


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)

    @watched
    def execute(self, requests):
        return respond_each(requests, self._read, pb_utils)

    def _read(self, request):
        return [
            text_tensor(wire.TEXT_INPUT, read_text(request, wire.TEXT_INPUT, pb_utils), pb_utils),
            text_tensor(wire.CLIENT_OPTIONS, read_openai_options(request, pb_utils), pb_utils),
        ]
