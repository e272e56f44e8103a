"""One line of talk on stderr while something long runs: data goes to stdout, talk does not."""

from __future__ import annotations

import sys
import time

_NOT_A_TERMINAL_SECONDS = 10.0


class StatusLine:
    """Rewritten on a terminal, seldom repeated elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next = 0.0
        self._open = False

    def show(self, text: str) -> None:
        """Replace the line by `text`."""
        if self._terminal:
            sys.stderr.write(f"\r\x1b[Kkvfetcher: {text}")
            sys.stderr.flush()
            self._open = True
        elif time.monotonic() >= self._next:
            sys.stderr.write(f"kvfetcher: {text}\n")
            sys.stderr.flush()
            self._next = time.monotonic() + _NOT_A_TERMINAL_SECONDS

    def end(self) -> None:
        """Leave the line as it is; what follows begins on the next."""
        if self._open:
            sys.stderr.write("\n")
            self._open = False
