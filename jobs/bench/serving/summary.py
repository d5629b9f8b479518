"""Figures of a load: percentiles, goodput, refusals and failures."""

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.bench.load.records import Records

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}


def percentiles_ms(seconds: NDArray[np.float64]) -> dict[str, float | None]:
    """Percentiles in ms; None of nothing. Those beyond what so few values can tell are the largest value."""
    if not len(seconds):
        return dict.fromkeys(PERCENTILES)
    values = np.percentile(1000 * seconds, list(PERCENTILES.values()))
    return {name: round(float(value), 3) for name, value in zip(PERCENTILES, values, strict=True)}


def goodput(records: Records, deadline_s: float, seconds: float) -> float:
    """Answers within a deadline, counted from when each request was due, per second.

    Args:
        records: Of the time that is looked at.
        deadline_s: Of each.
        seconds: How long that time is.
    """
    return float((records.answered & (records.latency <= deadline_s)).sum() / seconds)


def summary(records: Records, *, seconds: float, deadline_s: float) -> dict[str, Any]:
    """What became of the requests that were due in a stretch of time.

    Args:
        records: Of that time.
        deadline_s: For `goodput_per_s`.
        seconds: How long that time is.
    """
    sent = records.chosen(~np.isnan(records.sent))
    answered = sent.chosen(sent.answered)
    count = max(1, len(sent))
    return {
        "offered_per_s": round(len(sent) / seconds, 2),
        "answered_per_s": round(len(answered) / seconds, 2),
        "goodput_per_s": round(goodput(sent, deadline_s, seconds), 2),
        "requests": len(sent),
        "latency_ms": percentiles_ms(answered.latency),
        "first_byte_ms": percentiles_ms(answered.first - answered.scheduled),
        "degraded_share": round(float(answered.degraded.sum()) / max(1, len(answered)), 4),
        "refused_share": round(float(sent.refused.sum()) / count, 4),
        "refusals": refusals(sent),
        "failures": failures(sent),
        "client_lag_ms": percentiles_ms(sent.sent - sent.scheduled),
    }


def refusals(records: Records) -> dict[str, Any]:
    """How fast and how politely requests were refused.

    `time_ms` counts from when a request was due and holds the client's own lag; `server_ms` from when it was sent.
    """
    refused = records.chosen(records.refused)
    told = float((~np.isnan(refused.retry_after)).sum())
    return {
        "count": len(refused),
        "by_status": by_name(refused.status),
        "time_ms": percentiles_ms(refused.latency),
        "server_ms": percentiles_ms(refused.done - refused.sent),
        "with_retry_after": round(told / len(refused), 4) if len(refused) else None,
    }


def failures(records: Records) -> dict[str, Any]:
    """Requests with neither an answer nor a refusal, by status or by what went wrong."""
    failed = records.chosen(records.failed)
    names = [
        error or str(status)
        for error, status in zip(failed.error.tolist(), failed.status.tolist(), strict=True)
    ]
    return {"count": len(failed), "by_kind": dict(Counter(names).most_common())}


def by_name(values: NDArray[np.int64]) -> dict[str, int]:
    """How often each value occurs."""
    return {str(value): count for value, count in Counter(values.tolist()).most_common()}
