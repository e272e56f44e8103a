"""preprocessing: text -> token ids, with the tokenizer of the served model.

Inputs   text_input  STRING [1]
Outputs  input_ids   INT32  [num_tokens]
Errors   INVALID_ARG empty or undecodable text
"""

import triton_python_backend_utils as pb_utils

from kvfetcher import wire
from kvfetcher.backend import setup
from kvfetcher.backend.respond import respond_each
from kvfetcher.backend.tensors import ids_tensor, read_text
from kvfetcher.config import load_config
from kvfetcher.models.tokenizer import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        self.tokenizer = Tokenizer.for_model(load_config().engine.model)

    def execute(self, requests):
        return respond_each(requests, self._encode, pb_utils)

    def _encode(self, request):
        text = read_text(request, wire.TEXT_INPUT, pb_utils)
        return [ids_tensor(wire.INPUT_IDS, self.tokenizer.encode(text), pb_utils)]
