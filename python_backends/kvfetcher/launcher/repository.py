"""Finds the model repository, and makes the private copy that is served."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import kvfetcher
from kvfetcher import wire
from kvfetcher.codec.gpu.instances import decode_instances, restore_instances
from kvfetcher.errors import ServerError

if TYPE_CHECKING:
    from kvfetcher.config import Config

REPOSITORY_VARIABLE = "KVFETCHER_MODEL_REPOSITORY"

_COUNT = re.compile(r"(\bcount\s*:\s*)(\d+)")
_DECOUPLED = re.compile(r"\bdecoupled\s*:\s*true\b")


def find_repository(chosen: str | os.PathLike[str] | None = None) -> Path:
    """The folder of models to serve.

    Looked for in this order: `chosen`, $KVFETCHER_MODEL_REPOSITORY, ``./model_repository``, and
    beside the source tree that this package was installed from (an editable install).

    Raises:
        ServerError: there is none.
    """
    named = chosen or os.environ.get(REPOSITORY_VARIABLE)
    if named:
        if not Path(named).is_dir():
            raise ServerError(f"model repository {named} is not a folder")
        return Path(named).resolve()
    source = Path(kvfetcher.__file__).parents[2] / "model_repository"
    for folder in (Path("model_repository"), source):
        if folder.is_dir():
            return folder.resolve()
    raise ServerError(
        f"no model repository: ./model_repository does not exist; give --model-repository or set"
        f" ${REPOSITORY_VARIABLE} to the folder of that name in KVFetcher's source tree"
    )


def served_repository(repository: Path, config: Config, private: Path) -> Path:
    """Make the folder that tritonserver is given: `private`, returned.

    It holds the models of `repository` as symbolic links, in folders of its own, so that a model
    can be marked as changed (`mark_changed`), and instance counts of kv_decode and kv_restore
    as configured.

    Raises:
        ServerError: such a model's config.pbtxt has no single instance count to change.
    """
    for model in sorted(path for path in repository.iterdir() if path.is_dir()):
        for part in model.iterdir():
            if part.is_dir():
                version = private / model.name / part.name
                version.mkdir(parents=True)
                for file in part.iterdir():
                    (version / file.name).symlink_to(file)
            else:
                (private / model.name).mkdir(parents=True, exist_ok=True)
                (private / model.name / part.name).symlink_to(part)
    counts = {
        wire.KV_DECODE: ("server.decode_instances", decode_instances(config)),
        wire.KV_RESTORE: ("server.restore_instances", restore_instances(config)),
    }
    for name, (setting, count) in counts.items():
        changed = private / name / "config.pbtxt"
        if changed.is_file():
            text = _with_count(repository / name / "config.pbtxt", count, setting)
            changed.unlink()
            changed.write_text(text)
    return private


def mark_changed(private: Path, model: str) -> None:
    """Make tritonserver's next load of `model` a real one: it ignores models that did not change.

    A new time of config.pbtxt alone would not do (2.51): an equal configuration is no change.
    """
    for part in (private / model).iterdir():
        if part.is_dir():
            os.utime(part)


def is_decoupled(private: Path, model: str) -> bool:
    """Whether the model's config.pbtxt says so."""
    return _DECOUPLED.search((private / model / "config.pbtxt").read_text()) is not None


def _with_count(literal: Path, count: int, setting: str) -> str:
    text = literal.read_text()
    found = _COUNT.findall(text)
    if len(found) != 1:
        raise ServerError(
            f"{literal} must hold one 'count:' to set for {setting}, got {len(found)}"
        )
    return _COUNT.sub(rf"\g<1>{count}", text)
