"""Chunk stores: the protocols, and the one that the configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfetcher.storage.base import ObjectInfo, Store
from kvfetcher.storage.local import LocalStore

if TYPE_CHECKING:
    from kvfetcher.config import StoreConfig

__all__ = ["LocalStore", "ObjectInfo", "Store", "open_store"]


def open_store(config: StoreConfig) -> Store:
    """The store of the configuration. Does no I/O: a store that is down fails per call."""
    return LocalStore(config.folder, timeout_seconds=config.timeout_seconds)
