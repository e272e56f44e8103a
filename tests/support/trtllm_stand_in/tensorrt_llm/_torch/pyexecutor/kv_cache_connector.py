"""The interface at its path in 1.1 and 1.2."""

from kvfetcher.engines.paged.contract import (  # noqa: F401
    KvCacheConnectorScheduler,
    KvCacheConnectorWorker,
    RequestData,
    SchedulerOutput,
)
