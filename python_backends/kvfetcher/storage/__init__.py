"""Chunk stores: the protocols, and the one that the configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvfetcher.config import store_credentials
from kvfetcher.errors import ConfigError
from kvfetcher.storage.base import ByteRange, ObjectInfo, Store
from kvfetcher.storage.disk_tier import DiskTier
from kvfetcher.storage.guard import GuardedStore, GuardEvent, GuardOptions
from kvfetcher.storage.keyring import load_keyring
from kvfetcher.storage.local import LocalStore
from kvfetcher.storage.memory_tier import MemoryTier
from kvfetcher.storage.sealed import SealedStore, Sealer
from kvfetcher.storage.tier import TieredStore, TierEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.config import StoreConfig

StoreEvent = GuardEvent | TierEvent
"""What `open_store` tells its observer."""

__all__ = [
    "ByteRange",
    "LocalStore",
    "ObjectInfo",
    "Store",
    "StoreEvent",
    "TieredStore",
    "open_store",
]


def open_store(
    config: StoreConfig, *, observe: Callable[[StoreEvent], None] = lambda _: None
) -> Store:
    """The store of the configuration. Does no I/O: a store that is down fails per call.

    Args:
        config: section `store`.
        observe: called for retries, second reads, the breaker (`storage.guard`) and the tiers
            (`storage.tier`).

    Raises:
        ConfigError: the store's package is not installed, or its TLS certificates or its keyring are
            not there.
    """
    options = GuardOptions(
        max_retries=config.max_retries,
        hedge_fraction=config.hedge_fraction,
        min_failures=config.breaker_failures,
        min_backoff_seconds=config.breaker_backoff_seconds,
        max_backoff_seconds=config.breaker_max_backoff_seconds,
    )
    store: Store = GuardedStore(open_backend(config), options, observe=observe)
    if config.seal != "off":
        store = SealedStore(store, Sealer(config.seal, load_keyring(config.keys)))
    return open_tiers(config, store, observe=observe)


def open_tiers(
    config: StoreConfig, store: Store, *, observe: Callable[[TierEvent], None] = lambda _: None
) -> Store:
    """`store` behind the tiers that the configuration asks for; as it is for none."""
    memory = disk = None
    if config.tier_memory_bytes:
        memory = MemoryTier(
            max_bytes=config.tier_memory_bytes, max_age_seconds=config.tier_max_age_seconds
        )
    if config.tier_disk_bytes:
        disk = DiskTier(
            config.tier_folder,
            max_bytes=config.tier_disk_bytes,
            max_age_seconds=config.tier_max_age_seconds,
        )
    if memory is None and disk is None:
        return store
    return TieredStore(
        store,
        memory=memory,
        disk=disk,
        disk_timeout_seconds=config.timeout_seconds,
        observe=observe,
    )


def open_backend(config: StoreConfig) -> Store:
    """The store itself, without what `open_store` puts around it.

    Raises:
        ConfigError: as `open_store`.
    """
    if config.kind == "file":
        return LocalStore(config.folder, timeout_seconds=config.timeout_seconds)
    try:
        return _open_redis(config) if config.kind == "redis" else _open_s3(config)
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"store.kind = {config.kind} needs the Python package {exc.name}:"
            f" pip install 'kvfetcher[{config.kind}]'"
        ) from exc


def _open_redis(config: StoreConfig) -> Store:
    from kvfetcher.storage.redis import RedisStore

    return RedisStore(
        config.redis_address,
        credentials=store_credentials(),
        timeout_seconds=config.timeout_seconds,
        connect_timeout_seconds=config.connect_timeout_seconds,
        max_connections=config.max_connections,
        ttl_seconds=config.ttl_seconds,
        trusted=_trusted_certificates(config),
    )


def _open_s3(config: StoreConfig) -> Store:
    from kvfetcher.storage.s3 import S3Store

    return S3Store(
        config.bucket,
        endpoint=config.endpoint,
        region=config.region,
        timeout_seconds=config.timeout_seconds,
        connect_timeout_seconds=config.connect_timeout_seconds,
        max_connections=config.max_connections,
        trusted=_trusted_certificates(config),
    )


def _trusted_certificates(config: StoreConfig) -> bytes:
    """What `store.ca_file` holds; empty where it is not set."""
    if not config.ca_file:
        return b""
    try:
        return Path(config.ca_file).expanduser().read_bytes()
    except OSError as exc:
        raise ConfigError(f"store.ca_file {config.ca_file} cannot be read: {exc.strerror}") from exc
