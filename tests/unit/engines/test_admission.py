"""Stop words that name a token stop by its id; others are looked for in the text."""

import pytest

from kvfetcher.engines.admission import stop_rules
from kvfetcher.errors import RequestError
from support.engine_rig import EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()
TOKENIZER.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
TOKENIZER.add_tokens(["<tool>"])
IM_END, TOOL = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<tool>"])


@pytest.mark.parametrize(
    ("words", "ids", "texts"),
    [
        ((), (EOS,), ()),
        (("END", "\n\n"), (EOS,), ("END", "\n\n")),
        (("<|im_end|>",), (EOS, IM_END), ()),
        (("<|im_end|>", "END", "<eos>"), (EOS, IM_END), ("END",)),
        (("<tool>",), (EOS, TOOL), ()),
        (("a<tool>",), (EOS,), ("a<tool>",)),  # not special: the text has it
    ],
)
def test_words_become_ids_or_texts(words, ids, texts):
    rules = stop_rules(TOKENIZER, eos_ids=(EOS,), stop_words=words)
    assert (rules.ids, rules.words) == (ids, texts)


def test_a_special_token_beside_other_text_is_refused():
    with pytest.raises(RequestError, match=r"special token '<\|im_end\|>' beside other text"):
        stop_rules(TOKENIZER, eos_ids=(), stop_words=("<|im_end|>\n",))
