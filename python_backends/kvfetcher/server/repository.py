"""Finds the model repository, and adapts a private copy where an instance count differs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import kvfetcher
from kvfetcher import wire
from kvfetcher.errors import ServerError

if TYPE_CHECKING:
    from kvfetcher.config import Config

REPOSITORY_VARIABLE = "KVFETCHER_MODEL_REPOSITORY"

_MAX_CPU_DECODERS = 4
_COUNT = re.compile(r"(\bcount\s*:\s*)(\d+)")


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


def decode_instances(config: Config) -> int:
    """How many kv_decode processes to run.

    ``server.decode_instances``; 0 = one per NVDEC engine where the configuration allows NVDEC and
    the driver has it, else one per CPU core, at most 4.
    """
    if config.server.decode_instances:
        return config.server.decode_instances
    engines = 0
    if config.codec.decoder != "cpu":
        from kvfetcher.codec.nvdec import count_engines  # numpy comes with it

        engines = count_engines()
    return engines or min(_MAX_CPU_DECODERS, len(os.sched_getaffinity(0)))


def served_repository(repository: Path, config: Config, private: Path) -> Path:
    """The folder that tritonserver is given.

    That is `repository` itself, unless kv_decode's instance count differs from the configured one:
    then a folder at `private`, the same models by symbolic links, with that number changed.

    Raises:
        ServerError: kv_decode's config.pbtxt has no single instance count to change.
    """
    literal = repository / wire.KV_DECODE / "config.pbtxt"
    if not literal.is_file():
        return repository
    text, count = literal.read_text(), decode_instances(config)
    found = _COUNT.findall(text)
    if len(found) != 1:
        raise ServerError(
            f"{literal} must hold one 'count:' to set for server.decode_instances, got {len(found)}"
        )
    if int(found[0][1]) == count:
        return repository
    changed = private / wire.KV_DECODE
    changed.mkdir(parents=True)
    for model in repository.iterdir():
        if model.name != wire.KV_DECODE:
            (private / model.name).symlink_to(model)
    for part in literal.parent.iterdir():
        if part != literal:
            (changed / part.name).symlink_to(part)
    (changed / literal.name).write_text(_COUNT.sub(rf"\g<1>{count}", text))
    return private
