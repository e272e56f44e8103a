"""Text from tokens, piece by piece: whole characters only, and never a part of a stop word."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_PROMPT_TOKENS = 8  # enough for a character of several tokens, and for what a space depends on


class Decodes(Protocol):
    """What of a Hugging Face tokenizer is needed here."""

    @property
    def all_special_tokens(self) -> list[str]: ...

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> str: ...

    def get_added_vocab(self) -> dict[str, int]: ...


class Detokenizer:
    """_ByteQueue token ids into text increments whose sum is the text of all ids.

    A token's text depends on its neighbours (byte-level characters over several tokens, spaces at
    word starts), so each step decodes a short window and takes what is new. Text that ends inside
    a character waits for the tokens that complete it.

    Args:
        tokenizer: decodes.
        prompt: ids before the first; the text is what they and the answer say together, without
            what they say alone (a first word keeps its space).
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = list(prompt[-_PROMPT_TOKENS:])
        self._start = 0  # of the window
        self._read = len(self._ids)  # ids before this are in the text given out
        self._is_prompt = bool(self._ids)  # the window holds nothing else yet

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens."""
        self._ids += token_ids
        return self._take(final=False)

    def finish(self) -> str:
        """What is left, an incomplete character as U+FFFD."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        known = self._decode(self._ids[self._start : self._read])
        if self._is_prompt:  # it may end inside a character, which the answer completes
            known = known.rstrip(_INCOMPLETE)
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(known) or (text.endswith(_INCOMPLETE) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        self._is_prompt = False
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


class Stopped(NamedTuple):
    """Text to give out, and whether a stop word ended it."""

    text: str
    stopped: bool


class StopWords:
    """Cuts a stream of text at the first stop word, holding back what might become one."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words
        self._held = ""

    def add(self, text: str) -> Stopped:
        """Text that is safe to give out now."""
        self._held += text
        found = [i for i in (self._held.find(word) for word in self._words) if i >= 0]
        if found:
            safe, self._held = self._held[: min(found)], ""
            return Stopped(safe, True)
        keep = self._possible_beginning()
        safe = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return Stopped(safe, False)

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        text, self._held = self._held, ""
        return text

    def _possible_beginning(self) -> int:
        """Length of the longest end of the text that begins a stop word."""
        longest = max((len(word) for word in self._words), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(word.startswith(end) for word in self._words):
                return length
        return 0
