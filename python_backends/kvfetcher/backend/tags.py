"""Tags that travel with data from model to model, so that a reply to another request is noticed.

tritonserver may hand a model's late reply to the next request (`backend.vitals`). Each step therefore
says what its output was made from, and the step behind it, which has that from elsewhere, compares.
A model that replied wrongly is one reply behind from then on: `suspect` has it replaced.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

from kvfetcher.errors import MixedUpError
from kvfetcher.format.unit import unit_facts
from kvfetcher.memory.vitals import mark_suspect

if TYPE_CHECKING:
    from pathlib import Path

_TAG_BYTES = 16

_log = logging.getLogger(__name__)


def prompt_tag(text: str) -> str:
    """The tag of a prompt's text."""
    return _tag(text.encode())


def unit_tag(unit: bytes | memoryview, target_json: str) -> str:
    """The tag of a unit (or its `unit_rest`) that is to be restored into a target.

    Raises:
        FormatError: too short for a unit.
    """
    return _tag(unit_facts(unit), target_json.encode())


def compare(got: str, expected: str, *, model: str, run_folder: Path | None) -> None:
    """Refuse what a model replied to another request, and have its processes replaced.

    Args:
        got: the tag that came with the model's output.
        expected: the tag of what this request sent to it.
        model: which replied.
        run_folder: run folder of the server, to name the model to the launcher; None = tell nobody.

    Raises:
        MixedUpError: they differ.
    """
    if got == expected:
        return
    _log.error("%s replied to another request: tag %s, expected %s", model, got, expected)
    if run_folder is not None:
        mark_suspect(run_folder, model)
    raise MixedUpError(
        f"{model} replied to another request, its processes are replaced; send the request again"
    )


def _tag(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=_TAG_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
