"""What an unfinished calibration has measured, so that the next run need not measure it again."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from kvfetcher.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Journal:
    """Measurements by name, written to a file one by one. One writer.

    JSON gives floats back as they were, so a resumed run ends in what one run would have.
    """

    def __init__(self, path: Path | None = None, *, context: str = "") -> None:
        """Open a journal.

        Args:
            path: its file; None = nothing is kept beyond this process.
            context: names the run; what another one wrote is not taken.

        Raises:
            FormatError: the file cannot be read.
        """
        self._path = path
        self._context = context
        self._values: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        try:
            data = json.loads(path.read_text())
            if data["context"] == context:
                self._values = dict(data["values"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as exc:
            raise FormatError(
                f"calibration journal {path} cannot be read ({exc}); delete it to start over"
            ) from exc

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """What is kept under a name; else what ``measure`` (to a JSON value) says, kept from now on."""
        if name not in self._values:
            self._values[name] = measure()
            self._save()
        return self._values[name]

    def _save(self) -> None:
        if self._path is None:
            return
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({"context": self._context, "values": self._values}))
        partial.replace(self._path)
