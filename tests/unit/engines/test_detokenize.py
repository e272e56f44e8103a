"""Text arrives in whole characters, and no part of a stop word ever gets out."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from kvfetcher.engines.detokenize import Detokenizer, StopWords
from support.engine_rig import byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text(max_size=40), st.integers(1, 5))
def test_pieces_add_up_to_the_text_and_hold_whole_characters(text, step):
    ids = list(text.encode())
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(ids[i : i + step]) for i in range(0, len(ids), step)]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == text


def test_character_of_four_tokens_comes_with_its_last():
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add([i]) for i in TOKENIZER.encode("a😀b")]
    assert pieces == ["a", "", "", "", "😀", "b"]


def test_character_cut_off_at_the_end_is_shown_as_replaced():
    detokenizer = Detokenizer(TOKENIZER)
    for token in TOKENIZER.encode("é")[:1]:
        assert detokenizer.add([token]) == ""
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"
    assert detokenizer.finish() == ""


def test_invalid_bytes_do_not_hold_back_what_follows():
    detokenizer = Detokenizer(TOKENIZER)
    lone = TOKENIZER.encode("é")[1:]
    text = detokenizer.add(lone) + detokenizer.add(TOKENIZER.encode("ok")) + detokenizer.finish()
    assert text == "\N{REPLACEMENT CHARACTER}ok"


def test_special_tokens_are_no_text():
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.add([256, *TOKENIZER.encode("x")]) == "x"


def feed(words, pieces):
    """Text given out, and the index of the piece that stopped it (None = none did)."""
    stop, text = StopWords(words), ""
    for index, piece in enumerate(pieces):
        part, stopped = stop.add(piece)
        text += part
        if stopped:
            return text, index
    return text + stop.finish(), None


@pytest.mark.parametrize(
    ("words", "pieces", "expected"),
    [
        (("END",), ["a E", "N", "D b"], ("a ", 2)),
        (("END",), ["a E", "N", "x"], ("a ENx", None)),
        (("END",), ["a EN"], ("a EN", None)),
        (("aab",), ["aa", "ab"], ("a", 1)),
        (("xyz", "b"), ["abxyz"], ("a", 0)),
        (("\n\n", "Q:"), ["A\n", "B\n", "\nC"], ("A\nB", 2)),
        ((), ["a", "b"], ("ab", None)),
        (("é",), ["caf", "é"], ("caf", 1)),
    ],
    ids=range(8),
)
def test_stop_words(words, pieces, expected):
    assert feed(words, pieces) == expected


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(1, 4),
)
def test_any_split_gives_the_text_before_the_first_stop_word(text, words, step):
    pieces = [text[i : i + step] for i in range(0, len(text), step)]
    got, stopped = feed(tuple(words), pieces)
    ends = [text.find(word) + len(word) for word in words if word in text]
    if not ends:
        assert (got, stopped) == (text, None)
    else:
        # The word that is complete first stops; several may be complete within one piece.
        assert stopped == (min(ends) - 1) // step
        assert not any(word in got for word in words)
        assert text.startswith(got)


def sentence_tokenizer():
    """Words with a mark for the space before them, which decoding drops at the beginning."""
    words = ["<unk>", "▁The", "▁cat", "▁sat", "s"]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    raw.decoder = tokenizers.decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


@pytest.mark.parametrize("prompt", [[1], [1, 2], [1, 2, 3] * 9])
def test_an_answers_text_is_what_its_tokens_say_behind_the_prompt(prompt):
    tokenizer = sentence_tokenizer()
    answer = [2, 4, 3]
    detokenizer = Detokenizer(tokenizer, prompt)
    text = "".join(detokenizer.add([token]) for token in answer) + detokenizer.finish()
    assert text == " cats sat"
    assert tokenizer.decode(prompt) + text == tokenizer.decode([*prompt, *answer])


def test_an_answer_completes_the_prompts_last_character():
    whole = TOKENIZER.encode("a😀b")
    detokenizer = Detokenizer(TOKENIZER, whole[:3])  # two of the four bytes
    pieces = [detokenizer.add([token]) for token in whole[3:]]
    assert "".join(pieces) == "😀b"
