"""Replicas and Serve's controller die or stand still under load: what clients notice, and how long it takes to heal."""

import random
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.bench.load.arrivals import Piece
from jobs.bench.load.sending import Load, Outcome, Stream
from jobs.bench.serving.answers import Found, wrong_answers
from jobs.bench.serving.charts import chaos_chart
from jobs.bench.serving.peak import best, peak_of
from jobs.bench.serving.processes import (
    CONTROLLER,
    KINDS,
    Actor,
    lives,
    pick,
    serve_actors,
    signal_to,
)
from jobs.bench.serving.replicas import Running, num_running, running_replicas, wait_until
from jobs.bench.serving.stand import (
    EMBEDDING,
    TEXT,
    OneClient,
    Settings,
    Stand,
    running,
    with_defaults,
)
from jobs.bench.serving.summary import summary
from pipelines.progress import show
from slq.errors import ServiceError

DEFAULTS = (
    *(
        f"serve.scaling.{kind}={{min_replicas: 2, max_replicas: 2}}"
        for kind in ("ingress", "backbone", "index", "partition")
    ),
    "resources.index_partitions=2",
)
"""At least two of each kind, unless `--set` says otherwise."""
_SHARE = 0.3
"""Of the peak, where no rate was asked for: one replica of two must be able to do it all."""
_PROBE_S = 5.0
_PATIENCE_S = 180.0
_LONG_S = 3600.0


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happened to a process.

    Attributes:
        kind: Of the process.
        signal: What it was sent, without SIG.
        pid: Of the process.
        at: When (s, of `time.monotonic`).
        healed_s: Until all replicas ran again, without it; None if they did not in time.
    """

    kind: str
    signal: str
    pid: int
    at: float
    healed_s: float | None


def measure(settings: Settings) -> dict[str, Any]:
    """Faults in turn under a load below capacity; every request that is not answered rightly counts."""
    settings = with_defaults(settings, seconds=5.0)
    with running(settings, DEFAULTS) as stand:
        bodies = [*stand.bodies(TEXT), *stand.bodies(EMBEDDING)]
        rate = settings.rates[0] if settings.rates else None
        if rate is None:
            probes = peak_of(stand, "chaos peak", bodies, seconds=_PROBE_S)
            rate = round(_SHARE * best(probes).good, 1)
        truth = _truth(stand, bodies)
        replicas = num_running()
        show(f"seed {settings.seed}, {rate:g}/s, replicas {replicas}")
        plan = stand.plan(bodies, keep=True)
        stream = Stream(range(len(bodies)), [Piece(_LONG_S, rate)])
        with Load(settings.out / "load", plan, [stream], settings.rng("chaos")) as load:
            faults = _strike(settings, replicas)
            outcome = load.stop()
    found = {"seed": settings.seed, "rate": rate, "replicas": replicas}
    found |= fault_figures(outcome, faults, truth, settings)
    found["chart"] = str(chaos_chart(outcome, faults, settings.out / "chaos.png"))
    return found


def _truth(stand: Stand, bodies: list[str]) -> dict[int, Found]:
    """What each query is answered while all is well."""
    client = OneClient(stand.url)
    found = {}
    for number, body in enumerate(bodies):
        _, status, content = client.ask("/search", body)
        if status != 200:
            raise ServiceError(
                f"before any fault a search was answered {status}: {content[:300]!r}"
            )
        found[number] = Found.of(content)
    client.close()
    return found


def _strike(settings: Settings, replicas: Mapping[str, int]) -> list[Fault]:
    """Every kind with every signal, then the controller; between them the service heals and has a calm time."""
    rng = random.Random(settings.seed)
    there = {one.kind for one in serve_actors()}
    kinds = settings.kinds or tuple(kind for kind in KINDS if kind in there)
    plan = [(kind, name) for kind in kinds if kind != CONTROLLER for name in settings.signals]
    if not settings.kinds or CONTROLLER in settings.kinds:
        plan.append((CONTROLLER, "KILL"))
    found = []
    time.sleep(settings.seconds)
    for kind, name in plan:
        fault = _one(kind, name, rng, replicas)
        healed = "not healed" if fault.healed_s is None else f"healed in {fault.healed_s:.1f} s"
        show(f"SIG{name} to {kind} (pid {fault.pid}): {healed}")
        found.append(fault)
        time.sleep(settings.seconds)
    return found


def _one(kind: str, name: str, rng: random.Random, replicas: Mapping[str, int]) -> Fault:
    victim = pick(serve_actors(), kind, rng)
    began = time.monotonic()
    signal_to(victim, getattr(signal, f"SIG{name}"))
    healed = wait_until(lambda: is_healed(victim, running_replicas(), replicas), _PATIENCE_S)
    seconds = time.monotonic() - began if healed else None
    if lives(victim.pid):
        signal_to(victim, signal.SIGCONT)  # so that it can be ended with the rest
    return Fault(kind, name, victim.pid, began, seconds)


def is_healed(victim: Actor, now: Running, before: Mapping[str, int]) -> bool:
    """Whether a process is out of the way and as many replicas run as before it fell."""
    if victim in serve_actors() or any(victim.name in actors for actors in now.values()):
        return False
    return all(len(now.get(name, ())) >= count for name, count in before.items())


def fault_figures(
    outcome: Outcome, faults: list[Fault], truth: Mapping[int, Found], settings: Settings
) -> dict[str, Any]:
    """What clients noticed, in all and of each fault: from it until the next one.

    A request fails if it is not answered, for whatever reason: a refusal counts, too, as the load is below capacity.
    An answer is wrong if it is another than before the faults and does not say that it is degraded.
    """
    records = outcome.records
    others = np.array(wrong_answers(outcome.answers, records.target.tolist(), truth), bool)
    wrong = others & ~records.degraded
    starts = [outcome.start, *(one.at for one in faults), float("inf")]

    def told(start: float, end: float) -> dict[str, Any]:
        inside = (records.scheduled >= start) & (records.scheduled < end)
        some = records.chosen(inside)
        last = min(end, float(records.scheduled.max())) if len(records) else start
        seconds = max(last - start, 1e-9)
        found = summary(some, seconds=seconds, deadline_s=settings.deadline_ms / 1000)
        slowest = 1000 * some.latency.max() if len(some) else 0.0
        return {
            "requests": len(some),
            "failed": int((~some.answered).sum()),
            "wrong": int(wrong[inside].sum()),
            "degraded": int(some.degraded.sum()),
            "slowest_ms": round(float(slowest), 1),
            "latency_ms": found["latency_ms"],
            "failures": {**found["failures"]["by_kind"], **found["refusals"]["by_status"]},
        }

    of_each = [
        {
            "kind": one.kind,
            "signal": one.signal,
            "healed_s": None if one.healed_s is None else round(one.healed_s, 1),
            **told(one.at, end),
        }
        for one, end in zip(faults, starts[2:], strict=True)
    ]
    return {
        "all": told(outcome.start, float("inf")),
        "before_faults": told(outcome.start, starts[1]),
        "faults": of_each,
        "generator_us_per_request": round(outcome.generator_us),
    }
