"""A KV arena in parts: one for each range of KV heads that a tensor-parallel rank holds.

All parts have the same blocks, tokens and generation and differ in their heads, which follow each
other from 0 to the model's number. A block id and a lease so mean the same in each of them, and one
lease table serves all. A part is an arena of its own to the rank that reads it; to everybody
else the parts together are one `Arena`, which takes and gives values of all heads.

Each part lies where its rank runs: on that rank's GPU, or in host memory, where every rank then
copies and page-locks the bytes of its own heads only.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.errors import ArenaError
from kvfetcher.memory.arena import HEADER_BYTES, Arena, BlockTarget, plan_arena, read_arena_header
from kvfetcher.spec import HeadRange

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kvfetcher.spec import KVSpec

_GENERATION = re.compile(r"[0-9a-f]{32}\Z")


class SplitArena(Arena):
    """Parts that are one arena; see the module's text. It owns them: `close` closes all.

    Make one with `create_arena` (the owner) or `attach_arena`.

    Raises:
        ArenaError: a part is missing, or they do not fit each other.
    """

    def __init__(self, parts: Sequence[Arena]) -> None:
        first = parts[0].header
        for part in parts:
            differs = [
                f"{name} is {getattr(part, name)}, not {getattr(parts[0], name)}"
                for name in ("generation", "spec", "tokens_per_block", "num_blocks")
                if getattr(part, name) != getattr(parts[0], name)
            ]
            if differs:
                raise ArenaError(
                    f"arena {part.path} is not part of the same arena as {parts[0].path}:"
                    f" {'; '.join(differs)}"
                )
        whole = HeadRange(0, first.spec.num_kv_heads)
        starts, stops = [p.heads.start for p in parts], [p.heads.stop for p in parts]
        if [*starts, whole.stop] != [whole.start, *stops]:
            held = ", ".join(f"{p.path}: {p.heads.start} to {p.heads.stop - 1}" for p in parts)
            raise ArenaError(
                f"the parts of an arena hold KV heads 0 to {whole.stop - 1} one after the other;"
                f" these hold {held}: a part is missing, or named twice"
            )
        self.path = parts[0].path
        self.header = replace(first, heads=whole)
        self._parts = tuple(parts)

    @property
    def parts(self) -> tuple[Arena, ...]:
        return self._parts

    @property
    def blocks(self) -> Any:
        """Only a part has its blocks in one piece.

        Raises:
            ArenaError: always.
        """
        raise ArenaError(
            f"arena {self.path} lies in {len(self._parts)} parts; use those of `parts`"
        )

    def write(self, target: BlockTarget, layer_start: int, values: Any) -> None:
        """Store values of some layers of a target's tokens, each head in its part.

        Args:
            target: where; of this arena's generation.
            layer_start: first layer of `values`.
            values: [Lg, K, H, T, D] bit patterns, as each part takes them (`Arena.write`,
                `GpuArena.write`).

        Raises:
            ArenaError: the target is of another generation.
            LayoutError: shape, dtype, layers or block ids do not fit.
        """
        self.check_values(target, layer_start, tuple(values.shape))
        for part in self._parts:
            part.write(target, layer_start, values[:, :, part.heads.slice])

    def read(
        self, target: BlockTarget, layer_start: int = 0, num_layers: int | None = None
    ) -> NDArray[Any]:
        """Copy values of some layers of a target's tokens out of all parts, as `Arena.read`."""
        found = [part.read(target, layer_start, num_layers) for part in self._parts]
        return np.concatenate(found, axis=2)

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def unlink(self) -> None:
        for part in self._parts:
            part.unlink()


def create_arena(
    path: Path,
    *,
    spec: KVSpec,
    tokens_per_block: int,
    num_bytes: int,
    places: Mapping[HeadRange, int | None],
) -> Arena:
    """Make an arena with a part in each place.

    Args:
        path: path of its file; of several parts, the files get a number appended.
        spec: geometry of the whole model.
        tokens_per_block: tokens per block of the engine.
        num_bytes: that all parts together take at most.
        places: for each part's heads, in order, the GPU that it lies on; None = in host memory.

    Raises:
        ConfigError: `num_bytes` holds no block, or too many.
        ArenaError: there is not enough memory, or a file cannot be made. Nothing is left then.
    """
    # Of host memory, each file's header is part of it; `plan_arena` knows of one.
    headers = HEADER_BYTES * sum(gpu is None for gpu in places.values())
    header = plan_arena(
        spec, tokens_per_block=tokens_per_block, num_bytes=num_bytes + HEADER_BYTES - headers
    )
    with contextlib.ExitStack() as undo:
        parts: list[Arena] = []
        for index, (heads, gpu) in enumerate(places.items()):
            file = path if len(places) == 1 else path.with_name(f"{path.name}.{index}")
            plan = replace(header, heads=heads)
            if gpu is None:
                parts.append(Arena.create_from(plan, file))
            else:
                from kvfetcher.memory.gpu_arena import GpuArena  # torch comes with it

                parts.append(GpuArena.create_on_from(plan, gpu, file))
            undo.callback(parts[-1].close)
            undo.callback(parts[-1].unlink)
        arena = _joined(parts)
        undo.pop_all()
    return arena


def attach_arena(paths: Sequence[str], *, generation: str) -> Arena:
    """Map an arena that another process created, all parts of it.

    Args:
        paths: paths of its files, one for each part in the order of their heads (`find_arena`).
        generation: that it must be of.

    Raises:
        ArenaError: a file is missing, not an arena, or of another generation or geometry, or the
            files are not all that the arena has.
    """
    with contextlib.ExitStack() as undo:
        parts = []
        for path in paths:
            parts.append(attach_part(path, generation=generation))
            undo.callback(parts[-1].close)
        arena = _joined(parts)
        undo.pop_all()
    return arena


def attach_part(path: str, *, generation: str) -> Arena:
    """Map one file of an arena that another process created, as the rank that reads it does.

    Raises:
        ArenaError: the file is missing, not an arena, or of another generation.
    """
    header = read_arena_header(path)
    if header.gpu is None:
        return Arena.attach(path, generation=generation)
    header.check_generation(Path(path), generation)
    from kvfetcher.memory.gpu_arena import GpuArena  # torch comes with it

    return GpuArena.open(Path(path), header)


def publish_arena(folder: Path, arena: Arena) -> Path:
    """Let the processes of this run folder find the arena by its generation.

    Returns:
        The file that says where it is; the owner removes it with the arena.

    Raises:
        ArenaError: the file cannot be made.
    """
    path = folder / _published(arena.generation)
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(arena.paths))
        partial.replace(path)
    except OSError as exc:
        raise ArenaError(f"{path} cannot be written: {exc.strerror}") from exc
    return path


def find_arena(folder: Path, generation: str) -> tuple[str, ...]:
    """Paths of the parts of a published arena.

    Raises:
        ArenaError: no arena of that generation is published; the engine was restarted, or ended.
    """
    try:
        if not _GENERATION.match(generation):
            raise ValueError("no generation")
        paths = json.loads((folder / _published(generation)).read_text())
        return tuple(str(path) for path in paths)
    except (OSError, ValueError) as exc:
        raise ArenaError(
            "the arena of this block target is gone; the engine was restarted, ask it for a new"
            " lease"
        ) from exc


def withdraw_arenas(folder: Path) -> None:
    """Forget the arenas of engines that died, before a new one publishes its own."""
    for path in folder.glob(_published("*")):
        path.unlink(missing_ok=True)


def _published(generation: str) -> str:
    return f"arena-{generation}.json"


def _joined(parts: list[Arena]) -> Arena:
    is_whole = len(parts) == 1 and parts[0].heads.count == parts[0].spec.num_kv_heads
    return parts[0] if is_whole else SplitArena(parts)
