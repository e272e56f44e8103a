"""What the processes of one server give each other, for tests that stand in for one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfetcher.memory.control import run_dir
from kvfetcher.memory.permits import Permits
from kvfetcher.memory.split_arena import publish_arena

if TYPE_CHECKING:
    from pathlib import Path

    from kvfetcher.memory.arena import Arena, BlockTarget
    from kvfetcher.memory.permits import Right


def give_out(right: Right, arena: Arena, target: BlockTarget, *, folder: Path | None = None) -> str:
    """The sealed target, as a process of the server with this run folder sends it to another."""
    folder = run_dir() if folder is None else folder
    publish_arena(folder, arena)
    return Permits.of_run(folder).seal(right, target.to_json())
