"""How fast a store's link is: a robust estimate from its transfers. Pure: times are arguments.

The estimate is of the *whole* link: transfers that run side by side share it, so each one's bytes
are divided by its share of the time, not by all of it. Stalls of single transfers, outliers and
small objects (whose time is round trips, not bytes) move it little; a link that falls silent moves it
at once, before anything has finished.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from itertools import count
from statistics import median
from typing import NamedTuple

_MAX_BUCKETS = 256
# Transfers are summed up to so much time of the link: one of 1 MiB takes 0.2 ms at 40 Gbit/s, and
# single ones say more about their own luck than about the link.
_BUCKET_SECONDS = 0.01
_MIN_SECONDS = 1e-6
# One bucket weighs at most so many times the median one: a stalled transfer is one voice of many.
_MAX_WEIGHT = 3.0
# Objects up to this size (headers) tell the round-trip time: 0.13 ms of bytes at 1 Gbit/s.
_SMALL_BYTES = 16 << 10
_MAX_SMALL = 64
_RTT_QUANTILE = 0.25
_LOW_QUANTILE, _HIGH_QUANTILE = 0.2, 0.8
# Rates beyond these quantiles count as much as the quantile.
_CLIP_QUANTILE = 0.05
# The recent rate is that of so much time of the link, and says something of so much time to come.
_RECENT_SECONDS = 0.1
_MEMORY_SECONDS = 0.2
# A link that was idle may have become another one: after a pause what was seen counts half for each
# such time, and nothing below this part. (Busy time alone would keep a slow link slow for ever: a
# fast one is busy for a hundredth of the time with the same bytes.)
_PAUSE_SECONDS = 0.5
_IDLE_HALF_LIFE_SECONDS = 2.0
_FORGOTTEN = 0.1
# The first transfer after a pause must be so large to count: the time of a look-up's headers is
# mostly a busy host's, and it would stand for all of the link.
_TELLING_BYTES = 128 << 10
# A transfer that waited for so much of its time tells that the link is at least so fast, not how
# fast: round trips differ among themselves. Simulated: after a pause the headers of a look-up
# (256 KiB, 0.3 ms at 8 Gbit/s) stood for all of the link, and prompts were computed that took
# three times as long (bench sim, gated).
_MOSTLY_WAITING = 0.2
# Before the first transfer the rate may be this much lower or higher than the prior says.
_PRIOR_SPREAD = 4.0
# A fall counts that lasts for so much of the link's time; it is forgotten by half in so long, however
# often the link rests meanwhile: a link that breaks down now and then will again.
_FALL_SECONDS = 0.03
_FALL_HALF_LIFE_SECONDS = 300.0
_DEEPEST_FALL = math.log(1e-3)
# The spread around an estimate doubles in this time without transfers, up to `_PRIOR_SPREAD`.
_STALE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """What is known of a link; rates are of all its transfers together."""

    bytes_per_second: float
    """Rate in the long run."""
    recent_bytes_per_second: float
    """Rate of late; 0 if nothing comes any more."""
    low_bytes_per_second: float
    """It was slower a fifth of the time."""
    high_bytes_per_second: float
    """It was faster a fifth of the time."""
    rtt_seconds: float
    """Time from a request to its first byte."""
    num_transfers: int = 0
    """That the estimate rests on; 0 = it is the prior."""
    age_seconds: float = math.inf
    """Since the last of them."""
    fallen_to: float = 1.0
    """The part of its long-run rate that it fell to within the last minutes."""

    def __post_init__(self) -> None:
        low, high = self.low_bytes_per_second, self.high_bytes_per_second
        if not 0 < low <= self.bytes_per_second <= high < math.inf or self.rtt_seconds < 0:
            raise ValueError(f"a link has 0 < low <= rate <= high and rtt >= 0, got {self}")

    def at_best(self) -> LinkEstimate:
        """The same link, if it were as fast as it may be."""
        high = self.high_bytes_per_second
        return replace(self, bytes_per_second=high, recent_bytes_per_second=high)

    def rate_for(self, num_bytes: float) -> float:
        """Bytes per second to expect for the next `num_bytes`.

        A link that is slow at the moment comes back to its long-run rate: the recent rate counts
        much for short transfers and little for long ones (mean of an AR(1) process).
        """
        horizon = num_bytes / self.bytes_per_second / _MEMORY_SECONDS
        weight = -math.expm1(-horizon) / horizon if horizon > 1e-6 else 1.0
        rate = self.bytes_per_second
        return max(rate + weight * (self.recent_bytes_per_second - rate), 1e-3 * rate)


@dataclass(slots=True)
class _InFlight:
    started: float
    share_at_start: float
    num_bytes: int


@dataclass(slots=True)
class _Bucket:
    num_bytes: float
    passed: float
    """Time of the link until its transfers had ended."""
    shares: float
    """Their own shares of it."""
    rate_before: float
    """What the link was taken for when it began; 0 = nothing was known."""
    num_expected: int
    """Transfers still to come of as many as were in flight at the first one's end."""
    trust: float = 1.0
    """Less after each pause of the link."""

    @property
    def seconds(self) -> float:
        """Seconds of the link's time that this stands for.

        While some are still to come, it is not known whether the link served them meanwhile: it was
        something from the shares of those that ended (after the first of two that share evenly, and
        the other may be given up, all of it would halve the rate) to all of the time (of a link that
        serves them in turn). Within that, the link is taken to be as it was.
        """
        if self.num_expected <= 0 or not self.rate_before:
            return self.passed
        return min(max(self.num_bytes / self.rate_before, self.shares), self.passed)

    @property
    def rate(self) -> float:
        return self.num_bytes / self.seconds

    @property
    def is_open(self) -> bool:
        return self.passed < _BUCKET_SECONDS or self.num_expected > 0


class _Summary(NamedTuple):
    """What the buckets say, until one changes; bytes per second."""

    rate: float
    low: float
    high: float
    recent: float
    certainty: float


class LinkEstimator:
    """Watches transfers begin and end, and says what the link is worth.

    Not thread-safe. `now` never goes back between calls; its origin does not matter.
    """

    def __init__(
        self, *, prior_bytes_per_second: float, prior_rtt_seconds: float, half_life_seconds: float
    ) -> None:
        """An estimator that has seen nothing.

        Args:
            prior_bytes_per_second: rate to assume before the first transfer.
            prior_rtt_seconds: round trip to assume before the first small transfer.
            half_life_seconds: busy time of the link after which an observation counts half.
        """
        self._prior_rate = prior_bytes_per_second
        self._prior_rtt = prior_rtt_seconds
        self._half_life = half_life_seconds
        self._buckets: deque[_Bucket] = deque(maxlen=_MAX_BUCKETS)
        self._summary: _Summary | None = None
        self._has_large = False  # else the buckets are of small objects, better than nothing
        self._num_transfers = 0
        self._last_sample = -math.inf
        self._small: deque[float] = deque(maxlen=_MAX_SMALL)
        self._in_flight: dict[int, _InFlight] = {}
        self._tokens = count()
        self._share = 0.0  # the time that one transfer among those in flight would have had alone
        self._passed = 0.0  # time of the busy link since a transfer last ended
        self._at = -math.inf
        self._last_event = -math.inf
        self._log_fall = 0.0
        self._fell_at = 0.0

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def begin(self, now: float, num_bytes: int) -> int:
        """A transfer of `num_bytes` was asked for; the number to `end` it with."""
        self._advance(now)
        token = next(self._tokens)
        if not self._in_flight:
            self._last_event, self._passed = now, 0.0
        self._in_flight[token] = _InFlight(now, self._share, num_bytes)
        return token

    def end(self, token: int, now: float, *, ok: bool = True) -> None:
        """The transfer is over; one that failed or was cancelled (not `ok`) teaches nothing."""
        self._advance(now)
        num_in_flight = len(self._in_flight)
        transfer = self._in_flight.pop(token)
        share = self._share - transfer.share_at_start
        if not ok:
            self._passed -= share  # of the link's time: what moved in it is not known
            return
        passed, self._passed = self._passed, 0.0
        self._last_event = now
        seconds = now - transfer.started
        if seconds <= 0 or share <= 0:
            return  # the clock did not move: nothing to divide by
        if transfer.num_bytes <= _SMALL_BYTES:
            self._small.append(seconds)
        # Where transfers overlap, one's round trip is filled by the others' bytes: only the part
        # 1 / n^2 of it counts against the share (exact for n = 1, nothing for many).
        rtt = min(self._rtt(), seconds)
        waiting = rtt * (share / seconds) ** 2
        own, moving = share - waiting, passed - waiting
        if own <= 0.1 * share:  # all of it may have been the round trip
            if transfer.num_bytes <= _SMALL_BYTES:
                return
            own, moving = share, passed
        if waiting > _MOSTLY_WAITING * share and transfer.num_bytes < own * self._rate():
            return
        moving, own = max(moving, _MIN_SECONDS), max(own, _MIN_SECONDS)
        self._add(transfer, moving, own, now, num_in_flight)

    def estimate(self, now: float) -> LinkEstimate:
        """The link as of `now`; the prior, widely spread, where nothing was seen."""
        rtt = self._rtt()
        if not self._buckets:
            rate = self._prior_rate
            recent = self._bounded(rate, now, rtt)
            return LinkEstimate(rate, recent, rate / _PRIOR_SPREAD, rate * _PRIOR_SPREAD, rtt)
        rate, low, high, recent, certainty = self._summarised()
        age = max(0.0, now - self._last_sample)
        spread = min(_PRIOR_SPREAD, 2 ** (age / _STALE_SECONDS))
        return LinkEstimate(
            bytes_per_second=rate,
            recent_bytes_per_second=self._bounded(
                rate + certainty * math.exp(-age / _MEMORY_SECONDS) * (recent - rate), now, rtt
            ),
            low_bytes_per_second=low / spread,
            high_bytes_per_second=high * spread,
            rtt_seconds=rtt,
            num_transfers=self._num_transfers,
            age_seconds=age,
            fallen_to=math.exp(self._remembered_fall(now)),
        )

    def _forget(self, idle_seconds: float) -> None:
        """Before something new is added: trust what was seen before a pause less."""
        if idle_seconds < _PAUSE_SECONDS or not self._buckets:
            return
        for bucket in self._buckets:
            bucket.trust *= 2 ** (-idle_seconds / _IDLE_HALF_LIFE_SECONDS)
        while self._buckets and self._buckets[0].trust < _FORGOTTEN:
            self._buckets.popleft()
        self._summary = None

    def _add(
        self, transfer: _InFlight, passed: float, share: float, now: float, num_in_flight: int
    ) -> None:
        num_bytes = transfer.num_bytes
        if num_bytes > _SMALL_BYTES and not self._has_large:
            self._has_large = True
            self._buckets.clear()
        elif num_bytes <= _SMALL_BYTES and self._has_large:
            return  # its time was waiting, more or less of it
        idle = transfer.started - self._last_sample
        before = self._rate() if self._buckets else 0.0
        if idle > _PAUSE_SECONDS and self._buckets and num_bytes < _TELLING_BYTES:
            return
        self._forget(idle)
        self._last_sample = now
        self._num_transfers += 1
        self._summary = None
        last = self._buckets[-1] if self._buckets else None
        if last is not None and last.is_open and last.trust == 1.0:
            last.num_bytes += num_bytes
            last.passed += passed
            last.shares += share
            last.num_expected -= 1
        else:
            self._buckets.append(_Bucket(num_bytes, passed, share, before, num_in_flight - 1))
        self._note_fall(now)

    def _note_fall(self, now: float) -> None:
        """Remember how slow the link may be, if it was not slower lately.

        Transfers still to come are taken for ones that get nothing: a fall is to be seen before they
        end. Simulated, with raw copies, 24 and 2 Gbit/s in turn: 2 % less than the best fixed size,
        without this 2 % more.
        """
        num_bytes = seconds = 0.0
        for bucket in reversed(self._buckets):
            if bucket.trust < 1.0:
                return  # before a pause: the link may be another one now
            num_bytes += bucket.num_bytes
            seconds += bucket.passed
            if seconds >= _FALL_SECONDS:
                break
        else:
            return
        fall = max(_DEEPEST_FALL, math.log(num_bytes / seconds / self._rate()))
        if fall < self._remembered_fall(now):
            self._log_fall, self._fell_at = fall, now

    def _remembered_fall(self, now: float) -> float:
        age = max(0.0, now - self._fell_at)
        return self._log_fall * 2 ** (-age / _FALL_HALF_LIFE_SECONDS)

    def _rate(self) -> float:
        return self._summarised().rate if self._buckets else self._prior_rate

    def _summarised(self) -> _Summary:
        if self._summary is None:
            self._summary = self._summarise()
        return self._summary

    def _summarise(self) -> _Summary:
        weights = self._weights()
        weighted = sorted((b.rate, w) for b, w in zip(self._buckets, weights, strict=True))
        # As if what is still to come got nothing of the link: raw units, which only a fast one makes
        # good, wait until that has ended. Simulated: 2 % lost by a step from 40 to 4 Gbit/s, not 7.
        slowest = sorted(
            (b.num_bytes / b.passed, w) for b, w in zip(self._buckets, weights, strict=True)
        )
        low_clip = _quantile(weighted, _CLIP_QUANTILE)
        high_clip = _quantile(weighted, 1 - _CLIP_QUANTILE)
        total = sum(weight for _, weight in weighted)
        rate = sum(w * min(max(r, low_clip), high_clip) for r, w in weighted) / total
        num_bytes = seconds = 0.0
        for bucket in reversed(self._buckets):
            if seconds and bucket.trust < 1.0:
                break  # before a pause
            num_bytes += bucket.num_bytes
            seconds += bucket.seconds
            if seconds >= _RECENT_SECONDS:
                break
        return _Summary(
            rate=rate,
            low=min(_quantile(slowest, _LOW_QUANTILE), rate),
            high=max(_quantile(weighted, _HIGH_QUANTILE), rate),
            recent=num_bytes / seconds,
            # Little that was seen counts little.
            certainty=min(1.0, seconds / _RECENT_SECONDS),
        )

    def _weights(self) -> list[float]:
        """How much each bucket counts."""
        heaviest = _MAX_WEIGHT * median(bucket.seconds for bucket in self._buckets)
        weights = []
        busy = 0.0
        for bucket in reversed(self._buckets):
            weight = min(bucket.seconds, heaviest) * bucket.trust
            weights.append(weight * 2 ** (-busy / self._half_life))
            busy += weight
        return weights[::-1]

    def _advance(self, now: float) -> None:
        if self._in_flight:
            passed = max(0.0, now - self._at)
            self._passed += passed
            self._share += passed / len(self._in_flight)
        self._at = max(now, self._at)

    def _rtt(self) -> float:
        if not self._small:
            return self._prior_rtt
        return sorted(self._small)[int(_RTT_QUANTILE * (len(self._small) - 1))]

    def _bounded(self, rate: float, now: float, rtt: float) -> float:
        """`rate`, or what a silent link can be at most.

        Something should have finished by now at `rate`; if nothing has, the link is slower.
        """
        if not self._in_flight:
            return rate
        silent = now - self._last_event - rtt
        smallest = min(transfer.num_bytes for transfer in self._in_flight.values())
        # Twice, because the transfers that share the link do not finish evenly.
        due = 2 * smallest * len(self._in_flight)
        return min(rate, due / silent) if silent > 0 and due > 0 else rate


def _quantile(weighted: list[tuple[float, float]], fraction: float) -> float:
    """The value below which `fraction` of the weight of sorted (value, weight) pairs lies."""
    target = fraction * sum(weight for _, weight in weighted)
    reached = 0.0
    for value, weight in weighted:
        reached += weight
        if reached >= target:
            return value
    return weighted[-1][0]
