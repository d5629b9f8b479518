"""What HTTP and Ray Serve add to the work of a coarse search: ours against apps that do nothing, and the work alone."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from jobs.bench.serving.noop import COMPOSED, NOOP, start_apps, stop_apps
from jobs.bench.serving.stand import (
    EMBEDDING,
    TEXT,
    OneClient,
    Settings,
    Stand,
    running,
    with_defaults,
)
from jobs.bench.serving.summary import percentiles_ms
from pipelines.loading import encoder_of, use_processors
from pipelines.progress import show
from slq.errors import ServiceError

BAR_MS = 1.0
_TOP_K = 10
_KINDS = (TEXT, EMBEDDING)
_WARM_UP = 30
_LEAST = 20
_PAUSE_S = 0.008  # what an empty request takes on two shared cores
Side = Callable[[int], Mapping[str, float]]
"""Asks query number so and so once; gives seconds: `whole`, and parts."""
Rounds = dict[str, list[dict[str, list[float]]]]
"""By side, of each round: parts and their seconds."""


def measure(settings: Settings) -> dict[str, Any]:
    """Medians over rounds of `ours - noop - direct` in ms, for a query by text and for one by embedding.

    Every round has so many requests of each side, one side after the other: HTTP by one client over one connection, to
    ours, to an app that does nothing, and to one that asks another deployment; and the same encoding and search in this
    process on the replica's number of threads, one after the other and, as a service has it, each after a pause: caches
    and processors have gone cold by then.
    """
    settings = with_defaults(settings, seconds=60.0, repeats=5)
    with running(settings) as stand, ExitStack() as stack:
        paths = start_apps()
        stack.callback(stop_apps)
        sides = sides_of(stand, paths, stack)
        warm = {name: _asked(side, _WARM_UP) for name, side in sides.items()}
        round_s = sum(statistics.median(parts["whole"]) for parts in warm.values())
        count = max(_LEAST, int(settings.seconds / settings.repeats / round_s))
        rounds: Rounds = {name: [] for name in sides}
        for number in range(settings.repeats):
            for name, side in sides.items():
                rounds[name].append(_asked(side, count))
            show(f"round {number + 1}/{settings.repeats}: {_line(rounds)}")
    return {
        **figures(rounds),
        "requests_in_a_round": count,
        "rounds": settings.repeats,
        "top_k": _TOP_K,
        "batch_wait_ms": 1000 * stand.recipe.serve.batch_wait_s,
    }


def sides_of(stand: Stand, paths: Mapping[str, str], stack: ExitStack) -> dict[str, Side]:
    """All sides by name.

    Args:
        stand: The service.
        paths: Of the apps that do nothing.
        stack: Closes connections.
    """
    bodies = {kind: stand.bodies(kind, top_k=_TOP_K) for kind in _KINDS}

    def http(path: str, kind: str, *, has_timings: bool = False) -> Side:
        client = OneClient(stand.url)
        stack.callback(client.close)

        def ask(number: int) -> Mapping[str, float]:
            body = bodies[kind][number % len(bodies[kind])]
            seconds, status, content = client.ask(path, body)
            if status != 200:
                raise ServiceError(f"{path} answered {status}: {content[:300]!r}")
            parts = json.loads(content)["timings_ms"] if has_timings else {}
            return {"whole": seconds, **{name: value / 1000 for name, value in parts.items()}}

        return ask

    return {
        "noop": http(paths[NOOP], TEXT),
        TEXT: http("/search", TEXT, has_timings=True),
        "direct_text": _direct_text(stand),
        "paused_text": _after_a_pause(_direct_text(stand)),
        "composed": http(paths[COMPOSED], TEXT),
        EMBEDDING: http("/search", EMBEDDING, has_timings=True),
        "direct_embedding": _direct_embedding(stand),
        "paused_embedding": _after_a_pause(_direct_embedding(stand)),
    }


def _after_a_pause(side: Side) -> Side:
    """The same, each time after as long as HTTP takes without any work; the pause itself does not count."""

    def ask(number: int) -> Mapping[str, float]:
        time.sleep(_PAUSE_S)
        return side(number)

    return ask


def _direct_text(stand: Stand) -> Side:
    use_processors(stand.recipe.serve.num_threads)
    encoder = encoder_of(stand.recipe)
    index = stand.recipe.index_place.open()

    def ask(number: int) -> Mapping[str, float]:
        began = time.perf_counter()
        vectors = encoder.encode([stand.texts[number % len(stand.texts)]])
        encoded = time.perf_counter()
        (hits,) = index.search(vectors, _TOP_K)
        index.columns_of(hits)
        ended = time.perf_counter()
        return {"whole": ended - began, "embed": encoded - began, "search": ended - encoded}

    return ask


def _direct_embedding(stand: Stand) -> Side:
    index = stand.recipe.index_place.open()

    def ask(number: int) -> Mapping[str, float]:
        place = number % len(stand.vectors)
        began = time.perf_counter()
        (hits,) = index.search(stand.vectors[place : place + 1], _TOP_K)
        index.columns_of(hits)
        return {"whole": time.perf_counter() - began}

    return ask


def _asked(side: Side, count: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for number in range(count):
        for name, seconds in side(number).items():
            found.setdefault(name, []).append(seconds)
    return found


def figures(rounds: Rounds) -> dict[str, Any]:
    """What rounds tell: each side's percentiles, and what is ours beyond an empty app and the work.

    Percentiles are over all requests; `overhead_ms` (work one after the other), `overhead_after_pauses_ms` and
    `handle_ms` are medians over rounds of differences of the
    rounds' medians, so that what disturbs a whole round falls on all its sides.
    """
    middles = {
        name: [1000 * statistics.median(one["whole"]) for one in found]
        for name, found in rounds.items()
    }

    def beyond(work: str) -> dict[str, list[float]]:
        return {
            kind: [
                ours - noop - alone
                for ours, noop, alone in zip(
                    middles[kind], middles["noop"], middles[f"{work}_{kind}"], strict=True
                )
            ]
            for kind in _KINDS
        }

    differences = beyond("direct")
    handle = [
        with_handle - without
        for with_handle, without in zip(middles["composed"], middles["noop"], strict=True)
    ]
    return {
        "overhead_ms": {kind: _median(values) for kind, values in differences.items()},
        "overhead_after_pauses_ms": {
            kind: _median(values) for kind, values in beyond("paused").items()
        },
        "bar_ms": BAR_MS,
        "handle_ms": _median(handle),
        "sides_ms": {
            name: percentiles_ms(np.concatenate([one["whole"] for one in found]))
            for name, found in rounds.items()
        },
        "parts_ms": {name: _parts(found) for name, found in rounds.items() if len(found[0]) > 1},
        "overhead_ms_by_round": {
            kind: [round(value, 3) for value in values] for kind, values in differences.items()
        },
    }


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def _parts(found: Sequence[Mapping[str, list[float]]]) -> dict[str, float]:
    """Medians of parts in ms, over all requests."""
    names = [name for name in found[0] if name != "whole"]
    return {name: _median([1000 * value for one in found for value in one[name]]) for name in names}


def _line(rounds: Rounds) -> str:
    """The last round's medians."""
    return "  ".join(
        f"{name} {1000 * statistics.median(found[-1]['whole']):.2f} ms"
        for name, found in rounds.items()
    )
