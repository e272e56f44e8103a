"""preprocessing: text, or a chat -> token ids, as the served model was trained on them.

Inputs   text_input  STRING [1], or
         messages    STRING [1]  JSON list of {"role", "content"}, for the model's chat template
Outputs  input_ids   INT32  [num_tokens]
         prompt      STRING [1]  the text that input_ids stand for
         permit      STRING [1]  for kv_fetch, with these token ids, once
         prompt_tag  STRING [1]  of that text, for kv_fetch to compare
Errors   INVALID_ARG empty, undecodable or too long text, wrong messages, unknown parameters
         UNSUPPORTED the model has no chat template · UNAVAILABLE the server is stopping
"""

import triton_python_backend_utils as pb_utils

from kvfetcher.backend import setup
from kvfetcher.backend.prompting import Prompting
from kvfetcher.backend.respond import respond_each
from kvfetcher.backend.vitals import watched


class TritonPythonModel:
    def initialize(self, args):
        setup.check_stub(args, pb_utils)
        self.prompting = Prompting.open(pb_utils)

    @watched
    def execute(self, requests):
        return respond_each(requests, self.prompting.answer, pb_utils)
