"""Who fetches next: an order among waiting requests, fair between tenants. Pure.

Between tenants, which all count the same, the one that has been served least (predicted seconds of
fetching) goes first. Among a tenant's requests, the one that would finish first, with what it has
waited counted in its favour: short fetches pass long ones, but none waits for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits to fetch."""

    request_id: int
    tenant: str
    """The tenant that it belongs to (`cache_salt`)."""
    arrived_seconds: float
    fetch_seconds: float
    """Predicted, alone."""


def next_requests(
    waiting: Sequence[Waiting],
    *,
    now: float,
    num_slots: int,
    served_seconds: Mapping[str, float],
    ageing: float,
) -> list[Waiting]:
    """The requests that should start now, best first.

    Args:
        waiting: in any order.
        now: on the clock of `arrived_seconds`.
        num_slots: largest number of slots.
        served_seconds: by tenant, see `charge`; a tenant that is missing has had nothing.
        ageing: seconds of a fetch's length that one second of waiting makes up for; above 0.
    """
    served = {w.tenant: served_seconds.get(w.tenant, 0.0) for w in waiting}
    queues: dict[str, list[Waiting]] = {}
    for entry in sorted(
        waiting,
        key=lambda w: (
            w.fetch_seconds - ageing * (now - w.arrived_seconds),
            w.arrived_seconds,
            w.request_id,
        ),
    ):
        queues.setdefault(entry.tenant, []).append(entry)
    chosen: list[Waiting] = []
    while queues and len(chosen) < num_slots:
        tenant = min(queues, key=lambda name: (served[name], queues[name][0].arrived_seconds))
        entry = queues[tenant].pop(0)
        chosen.append(entry)
        served[tenant] += entry.fetch_seconds
        if not queues[tenant]:
            del queues[tenant]
    return chosen


def charge(
    served_seconds: Mapping[str, float], entry: Waiting, active: Sequence[str]
) -> dict[str, float]:
    """`served_seconds` after `entry` has started.

    Only the differences between active tenants (those that wait or fetch) matter: others are
    forgotten, so that the mapping stays small, and one that comes back starts level with the least
    served active one, not with a credit for its absence.
    """
    keep = {entry.tenant, *active}
    known = {name: served_seconds[name] for name in keep if name in served_seconds}
    level = min(known.values(), default=0.0)
    result = {name: known.get(name, level) - level for name in keep}
    result[entry.tenant] += entry.fetch_seconds
    return result
