"""Latency over the rate of requests that come whenever they come."""

from typing import Any

from jobs.bench.load.arrivals import Piece
from jobs.bench.load.records import Records, joined
from jobs.bench.load.sending import Stream
from jobs.bench.serving.charts import latency_chart
from jobs.bench.serving.peak import best, peak_of, told
from jobs.bench.serving.stand import MODES, TEXT, Settings, Stand, running, with_defaults
from jobs.bench.serving.summary import summary
from pipelines.progress import show

_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.25)
"""Of the peak, where no rates were asked for."""
_PROBE_S = 6.0
_WARM_S = 1.0


def measure(settings: Settings) -> dict[str, Any]:
    """By kind of search, what became of requests at each rate; rounds go through all rates in turn."""
    settings = with_defaults(settings, seconds=20.0)
    with running(settings) as stand:
        found = {mode: _of_mode(stand, mode) for mode in settings.modes}
    chart = latency_chart(found, settings.out / "latency.png")
    return {**found, "chart": str(chart)}


def _of_mode(stand: Stand, mode: str) -> dict[str, Any]:
    settings = stand.settings
    bodies = stand.bodies(TEXT, MODES[mode])
    found: dict[str, Any] = {}
    rates = list(settings.rates)
    if not rates:
        probes = peak_of(stand, f"{mode} peak", bodies, seconds=_PROBE_S)
        found["probes"] = told(probes)
        rates = [round(share * best(probes).good, 1) for share in _SHARES]
    runs: dict[float, list[Records]] = {rate: [] for rate in rates}
    cpu: list[float] = []
    for number in range(settings.repeats):
        for rate in rates:
            stream = Stream(range(len(bodies)), [Piece(_WARM_S + settings.seconds, rate)])
            outcome = stand.send(f"{mode} {rate} {number}", stand.plan(bodies), [stream])
            start = outcome.start + _WARM_S
            runs[rate].append(outcome.records.between(start, start + settings.seconds))
            cpu.append(outcome.generator_us)
            show(f"{mode}, {rate:g}/s: {figures_at(settings, runs[rate])['latency_ms']} ms")
    found["rates"] = [{"rate": rate, **figures_at(settings, parts)} for rate, parts in runs.items()]
    found["generator_us_per_request"] = round(max(cpu))
    return found


def figures_at(settings: Settings, parts: list[Records]) -> dict[str, Any]:
    """What became of one rate's requests, over all rounds."""
    return summary(
        joined(parts),
        seconds=settings.seconds * len(parts),
        deadline_s=settings.deadline_ms / 1000,
    )
