"""preprocessing: text -> token ids, with the tokenizer of the served model.

Inputs   text_input  STRING [1]
Outputs  input_ids   INT32  [num_tokens]
         permit      STRING [1]  for kv_fetch, with these token ids, once
         prompt_tag  STRING [1]  of the text, for kv_fetch to compare
Errors   INVALID_ARG empty, undecodable or too long text · UNAVAILABLE the server is stopping
"""

import triton_python_backend_utils as pb_utils

from kvfetcher import wire
from kvfetcher.backend import setup
from kvfetcher.backend.respond import respond_each
from kvfetcher.backend.tags import prompt_tag
from kvfetcher.backend.tensors import ids_tensor, read_text, text_tensor
from kvfetcher.backend.vitals import pulse, watched
from kvfetcher.config import load_config
from kvfetcher.memory.permits import Permits
from kvfetcher.models.tokenizer import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        engine = load_config().engine
        self.permits = Permits.of_run()
        self.tokenizer = Tokenizer.for_model(
            engine.model,
            max_prompt_tokens=engine.max_prompt_tokens,
            repeat_bos=engine.repeat_bos,
        )

    @watched
    def execute(self, requests):
        return respond_each(requests, self._encode, pb_utils)

    def _encode(self, request):
        pulse().refuse_when_stopping()
        text = read_text(request, wire.TEXT_INPUT, pb_utils)
        ids = ids_tensor(wire.INPUT_IDS, self.tokenizer.encode(text), pb_utils)
        permit = self.permits.seal("fetch", "", ids.as_numpy().tobytes())
        return [
            ids,
            text_tensor(wire.PERMIT, permit, pb_utils),
            text_tensor(wire.PROMPT_TAG, prompt_tag(text), pb_utils),
        ]
