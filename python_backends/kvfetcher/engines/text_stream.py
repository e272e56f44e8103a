"""The text of one answer, token by token, and where it ends. No torch, no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvfetcher.engines.detokenize import Detokenizer, StopWords

if TYPE_CHECKING:
    from kvfetcher.engines.base import FinishReason
    from kvfetcher.engines.detokenize import Decodes


class AnswerStep(NamedTuple):
    """Text that became certain, and why the answer ends here ("" = it goes on)."""

    text: str
    reason: FinishReason


class AnswerText:
    """Ends at an end-of-sequence token, a stop word, or `max_tokens`; whichever comes first."""

    def __init__(
        self,
        tokenizer: Decodes,
        *,
        prompt: tuple[int, ...],
        eos_ids: tuple[int, ...],
        stop_words: tuple[str, ...],
        max_tokens: int,
    ) -> None:
        self._eos_ids = frozenset(eos_ids)
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop_words = StopWords(stop_words)
        self._left = max_tokens

    def add(self, token: int) -> AnswerStep:
        """Take the next token."""
        self._left -= 1
        if token in self._eos_ids:
            return AnswerStep(self.finish().text, "stop")
        stopped = self._stop_words.add(self._detokenizer.add((token,)))
        if stopped.stopped:
            return AnswerStep(stopped.text, "stop")
        if self._left <= 0:
            last = self.finish()
            return AnswerStep(stopped.text + last.text, last.reason or "length")
        return AnswerStep(stopped.text, "")

    def finish(self) -> AnswerStep:
        """What was held back, now that nothing follows; "stop" where a stop word was in it."""
        last = self._stop_words.add(self._detokenizer.finish())
        return AnswerStep(last.text + self._stop_words.finish(), "stop" if last.stopped else "")
