"""More requests than the service can answer: what it answers in time, how it refuses, and what memory it takes."""

import statistics
from collections import Counter
from typing import Any

import numpy as np

from jobs.bench.load.arrivals import Piece
from jobs.bench.load.bare import bare_server
from jobs.bench.load.sending import Outcome, Stream
from jobs.bench.serving.charts import overload_chart
from jobs.bench.serving.noop import NOOP, start_apps, stop_apps
from jobs.bench.serving.peak import Probe, best, peak_of, probed, told
from jobs.bench.serving.processes import memory_figures, resident_bytes
from jobs.bench.serving.sampling import Sampler
from jobs.bench.serving.stand import MODES, TEXT, Settings, Stand, running, with_defaults
from jobs.bench.serving.summary import percentiles_ms, summary
from pipelines.progress import show

GOODPUT_BAR, REFUSAL_BAR_MS = 0.85, 50.0
_PROBE_S = 6.0
_WARM_S = 2.0
_BESIDE_PER_S = 5.0
"""Requests beside the load: to an app that does nothing, through the same proxy, and to a server without Ray."""


def measure(settings: Settings) -> dict[str, Any]:
    """By kind of search: the peak, and runs at multiples of its goodput, each between two runs at that rate."""
    settings = with_defaults(settings, seconds=60.0)
    found: dict[str, Any] = {}
    with running(settings) as stand, bare_server() as bare:
        noop = stand.url + start_apps()[NOOP]
        for mode in settings.modes:
            found[mode] = _of_mode(stand, mode, [noop, bare])
        stop_apps()
    chart = overload_chart(found, settings.out / "overload.png")
    return {
        "goodput_bar": GOODPUT_BAR,
        "refusal_bar_ms": REFUSAL_BAR_MS,
        **found,
        "chart": str(chart),
    }


def _of_mode(stand: Stand, mode: str, beside: list[str]) -> dict[str, Any]:
    bodies = stand.bodies(TEXT, MODES[mode])
    probes = peak_of(stand, f"{mode} peak", bodies, seconds=_PROBE_S)
    # What it can do, and not the rate at which it did: that may lie far above on a noisy machine.
    rate = best(probes).good
    before = _at_peak(stand, mode, bodies, rate, number=0)
    seen, runs = [before], []
    for number, factor in enumerate(stand.settings.factors, start=1):
        run = _overloaded(stand, f"{mode} {factor:g}x", bodies, factor * rate, beside)
        after = _at_peak(stand, mode, bodies, rate, number=number)
        beside_it = statistics.mean([before.good, after.good])
        seen.append(after)
        good = run["goodput_per_s"]
        run |= {"factor": factor, "to_neighbours": round(good / max(beside_it, 1e-9), 3)}
        show(f"{mode} at {factor:g}x: {good}/s in time, refused {run['refusals']['time_ms']}")
        runs.append(run)
        before = after
    highest = max(one.good for one in [*probes, *seen])
    for run in runs:
        run["to_peak"] = round(run["goodput_per_s"] / max(highest, 1e-9), 3)
    return {
        "peak_goodput_per_s": round(highest, 2),
        "peak_rate": round(rate, 2),
        "probes": told(probes),
        "at_peak_rate": told(seen),
        "runs": runs,
    }


def _at_peak(stand: Stand, mode: str, bodies: list[str], rate: float, *, number: int) -> Probe:
    """The service at its peak, right before or after an overload."""
    seconds = _WARM_S + max(_PROBE_S, stand.settings.seconds / 4)
    stream = Stream(range(len(bodies)), [Piece(seconds, rate)])
    outcome = stand.send(f"{mode} at peak {number}", stand.plan(bodies), [stream])
    deadline_s = stand.settings.deadline_ms / 1000
    return probed(outcome.records, outcome.start + _WARM_S, outcome.start + seconds, deadline_s)


def _overloaded(
    stand: Stand, name: str, bodies: list[str], rate: float, beside: list[str]
) -> dict[str, Any]:
    """One run at a rate beyond the peak."""
    settings = stand.settings
    plan = stand.plan(
        bodies,
        beside,
        slow_clients=settings.slow_clients,
        large_every_s=settings.large_every_s,
    )
    seconds = _WARM_S + settings.seconds
    streams = [Stream(range(len(bodies)), [Piece(seconds, rate)])]
    streams += [
        Stream([len(bodies) + n], [Piece(seconds, _BESIDE_PER_S)]) for n in range(len(beside))
    ]
    with Sampler(resident_bytes) as memory:
        outcome = stand.send(name, plan, streams)
    return overload_figures(outcome, settings, len(bodies)) | {
        "rate": round(rate, 2),
        "memory": memory_figures(memory.samples),
    }


def overload_figures(outcome: Outcome, settings: Settings, num_bodies: int) -> dict[str, Any]:
    """What one run tells; targets behind the searches' are the app that does nothing and the server without Ray."""
    start = outcome.start + _WARM_S
    counted = outcome.records.between(start, start + settings.seconds)
    ours = counted.chosen(counted.target < num_bodies)
    others = {
        name: counted.chosen(counted.target == num_bodies + n)
        for n, name in enumerate(("noop", "bare"))
    }
    return {
        **summary(ours, seconds=settings.seconds, deadline_s=settings.deadline_ms / 1000),
        "beside_ms": {name: percentiles_ms(one.latency) for name, one in others.items()},
        "generator_us_per_request": round(outcome.generator_us),
        "generator_cpu_share": round(outcome.cpu_s / (_WARM_S + settings.seconds), 3),
        "rude": rude_figures(outcome.rude),
    }


def rude_figures(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """What slow clients and large bodies were told, and how soon."""
    found: dict[str, Any] = {}
    for kind in sorted({one["kind"] for one in outcomes}):
        ours = [one for one in outcomes if one["kind"] == kind]
        found[kind] = {
            "by_status": dict(Counter(str(one["status"]) for one in ours).most_common()),
            "time_ms": percentiles_ms(np.array([one["seconds"] for one in ours])),
            "still_held": sum(one.get("held", False) for one in ours),
            "most_bytes": max(one["bytes"] for one in ours),
        }
    return found
