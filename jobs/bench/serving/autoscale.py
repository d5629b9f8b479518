"""A load that steps up and down, and one that jumps about a level: how many replicas each deployment has meanwhile."""

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.bench.load.arrivals import Piece, noisy
from jobs.bench.load.sending import Outcome, Stream
from jobs.bench.serving.charts import autoscale_chart
from jobs.bench.serving.peak import best, peak_of
from jobs.bench.serving.replicas import num_running
from jobs.bench.serving.sampling import Sampler, Samples
from jobs.bench.serving.stand import MODES, TEXT, Settings, running, with_defaults
from jobs.bench.serving.summary import summary
from pipelines.progress import show

DEFAULTS = ("serve.scaling.backbone.max_replicas=3",)
"""Room to grow, unless `--set` says otherwise."""
_SHARES = (0.2, 1.5, 0.8)
"""Low, high and the noisy level, of the first replicas' peak, where no rates were asked for."""
_NOISE, _NOISE_EVERY_S = 0.2, 5.0
_PROBE_S = 4.0
_CALM_S = 10.0


def measure(settings: Settings) -> dict[str, Any]:
    """Replicas, rates and what became of requests, by phase; `changes` of `noise` should be none."""
    settings = with_defaults(settings, seconds=60.0)
    with running(settings, DEFAULTS) as stand:
        mode = settings.modes[0]
        bodies = stand.bodies(TEXT, MODES[mode])
        rates = list(settings.rates)
        if len(rates) != len(_SHARES):
            peak = best(peak_of(stand, "autoscale peak", bodies, seconds=_PROBE_S)).good
            rates = [round(share * peak, 1) for share in _SHARES]
            time.sleep(_CALM_S)
        phases = phases_of(settings, rates)
        pieces = [piece for phase in phases.values() for piece in phase]
        show(
            f"phases { ({name: sum(p.seconds for p in phase) for name, phase in phases.items()}) } s"
        )
        with Sampler(num_running) as watch:
            outcome = stand.send(
                "autoscale", stand.plan(bodies), [Stream(range(len(bodies)), pieces)]
            )
    series = series_of(outcome, pieces, watch.samples)
    chart = autoscale_chart(series, phases, settings.out / "autoscale.png")
    return {
        "mode": mode,
        "rates": dict(zip(("low", "high", "level"), rates, strict=True)),
        "phases": phase_figures(outcome, phases, watch.samples, settings),
        "series": series,
        "chart": str(chart),
    }


def phases_of(settings: Settings, rates: Sequence[float]) -> dict[str, list[Piece]]:
    """Stretches of the load by name: low, a step up, a step down, a level, and noise about it."""
    low, high, level = rates
    noise = noisy(
        level,
        seconds=2 * settings.seconds,
        every_s=_NOISE_EVERY_S,
        share=_NOISE,
        rng=settings.rng("noise"),
    )
    return {
        "low": [Piece(settings.seconds / 2, low)],
        "up": [Piece(settings.seconds, high)],
        "down": [Piece(settings.seconds, low)],
        "level": [Piece(settings.seconds, level)],
        "noise": noise,
    }


def changes(samples: Samples, start: float, end: float) -> dict[str, int]:
    """How often each deployment's number of running replicas changed in a stretch of time."""
    inside = [found for at, found in samples if start <= at < end]
    names = sorted({name for found in inside for name in found})
    return {
        name: sum(a.get(name) != b.get(name) for a, b in itertools.pairwise(inside))
        for name in names
    }


def phase_figures(
    outcome: Outcome, phases: Mapping[str, Sequence[Piece]], samples: Samples, settings: Settings
) -> dict[str, Any]:
    """What became of requests and replicas in each phase."""
    found, start = {}, outcome.start
    for name, pieces in phases.items():
        seconds = sum(piece.seconds for piece in pieces)
        end = start + seconds
        counts = [replicas for at, replicas in samples if start <= at < end]
        moved = changes(samples, start, end)
        found[name] = {
            **summary(
                outcome.records.between(start, end),
                seconds=seconds,
                deadline_s=settings.deadline_ms / 1000,
            ),
            "replicas_at_the_end": counts[-1] if counts else {},
            "changes": sum(moved.values()),
            "changes_by_deployment": moved,
        }
        start = end
    return found


def series_of(outcome: Outcome, pieces: Sequence[Piece], samples: Samples) -> dict[str, Any]:
    """Offered and answered rates by second, and replicas by sample."""
    seconds = int(np.ceil(sum(piece.seconds for piece in pieces)))
    edges = outcome.start + np.arange(seconds + 1)

    def per_s(times: NDArray[np.float64]) -> list[int]:
        return [int(count) for count in np.histogram(times, edges)[0]]

    names = sorted({name for _, found in samples for name in found})
    return {
        "offered_per_s": per_s(outcome.records.scheduled),
        "answered_per_s": per_s(outcome.records.done[outcome.records.answered]),
        "sample_s": [round(at - outcome.start, 2) for at, _ in samples],
        "replicas": {name: [found.get(name, 0) for _, found in samples] for name in names},
    }
