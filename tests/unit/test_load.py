"""The load generator: arrivals are Poisson, nobody waits for slow answers, and everything that happens is noted."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from jobs.bench.load.arrivals import Piece, noisy, poisson, rate_at
from jobs.bench.load.bare import bare_server
from jobs.bench.load.generator import Plan
from jobs.bench.load.records import Records
from jobs.bench.load.rude import Rude
from jobs.bench.load.sending import Load, Outcome, Stream, merged_arrivals, send

compact = partial(json.dumps, separators=(",", ":"))  # as the service writes
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def server(handler: Handler) -> Iterator[str]:
    """A server in a thread; gives its URL."""
    loop, ready, port = asyncio.new_event_loop(), threading.Event(), []

    async def begin() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/{path:.*}", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port.append(runner.addresses[0][1])
        return runner

    async def end_others() -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def serve() -> None:
        runner = loop.run_until_complete(begin())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.run_until_complete(end_others())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def sent(folder: Path, plan: Plan, *streams: Stream, seed: int = 0) -> Outcome:
    return send(folder, plan, streams, np.random.default_rng(seed))


# ---- arrivals ----


def test_arrivals_are_a_poisson_process_of_the_given_rate() -> None:
    rate, seconds = 50.0, 400.0
    times = poisson([Piece(seconds, rate)], np.random.default_rng(5))
    expected = rate * seconds
    assert abs(len(times) - expected) < 4 * np.sqrt(expected)
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < seconds
    gaps = np.sort(np.diff(times))
    seen = np.arange(1, len(gaps) + 1) / len(gaps)
    exponential = 1 - np.exp(-rate * gaps)
    assert np.abs(seen - exponential).max() < 1.63 / np.sqrt(len(gaps))  # Kolmogorov's 1%
    counts = np.histogram(times, np.arange(seconds + 1))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.2)


def test_rates_change_from_piece_to_piece_and_the_seed_says_it_all() -> None:
    pieces = [Piece(100, 10), Piece(50, 0), Piece(100, 40)]
    times = poisson(pieces, np.random.default_rng(7))
    counts = np.histogram(times, [0, 100, 150, 250])[0]
    assert counts[1] == 0
    np.testing.assert_allclose(counts[[0, 2]], [1000, 4000], rtol=0.1)
    np.testing.assert_array_equal(times, poisson(pieces, np.random.default_rng(7)))
    assert len(poisson(pieces, np.random.default_rng(8))) != len(times)
    assert [rate_at(pieces, at) for at in (0, 99, 100, 150, 249, 250)] == [10, 10, 0, 40, 40, 0]


def test_noise_stays_within_its_share_and_lasts_as_long_as_asked() -> None:
    rng = np.random.default_rng(3)
    pieces = noisy(100, seconds=52, every_s=5, share=0.2, rng=rng)
    assert [piece.seconds for piece in pieces] == [5] * 10 + [2]
    rates = [piece.rate for piece in pieces]
    assert min(rates) >= 80
    assert max(rates) <= 120
    assert max(rates) - min(rates) > 10


def test_streams_come_together_in_the_order_of_time() -> None:
    streams = [Stream([0, 1], [Piece(50, 20)]), Stream([2], [Piece(50, 5)])]
    at, target = merged_arrivals(streams, np.random.default_rng(1))
    assert (np.diff(at) >= 0).all()
    counts = np.bincount(target)
    np.testing.assert_allclose(counts, [500, 500, 250], rtol=0.2)


# ---- the generator ----


def test_a_server_that_stalls_does_not_stall_the_load_and_every_waiting_request_counts(
    tmp_path: Path,
) -> None:
    """It answers nothing before the last request is there: a client that waits for answers would never send that."""
    pieces = [Piece(0.5, 80)]
    at, _ = merged_arrivals([Stream([0], pieces)], np.random.default_rng(0))
    arrived, everyone = [0], asyncio.Event()

    async def stall(_: web.Request) -> web.Response:
        arrived[0] += 1
        if arrived[0] == len(at):
            everyone.set()
        await everyone.wait()
        return web.json_response({})

    with server(stall) as url:
        outcome = sent(tmp_path, Plan([(url, "{}")]), Stream([0], pieces))
    records = outcome.records
    assert len(records) == len(at) > 20
    assert records.answered.all()
    np.testing.assert_allclose(records.scheduled - outcome.start, at)
    assert (records.done >= records.sent.max()).all()
    # latency is that of a user who came when the request was due
    assert (records.latency >= records.sent.max() - records.scheduled).all()
    assert (records.sent >= records.scheduled).all()
    assert outcome.generator_us > 0


def test_what_happens_to_each_request_is_noted(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        kind = request.path[1:]
        if kind == "refused":
            return web.Response(status=503, headers={"retry-after": "2"})
        if kind == "closed":
            assert request.transport is not None
            request.transport.close()
        if kind == "late":
            await asyncio.sleep(3)
        body = {"degraded": kind == "degraded", "asked": await request.json()}
        return web.json_response(body, dumps=compact)

    kinds = ["plain", "degraded", "refused", "closed", "late"]
    with server(answer) as url:
        targets = [(f"{url}/{kind}", f'{{"q":"{kind}"}}') for kind in kinds]
        targets.append(("http://127.0.0.1:9/nobody", "{}"))
        plan = Plan(targets, timeout_s=1.0, keep=True)
        outcome = sent(tmp_path, plan, Stream(range(6), [Piece(0.5, 100)]))
    records = outcome.records
    by_target = {kind: records.target == number for number, kind in enumerate([*kinds, "nobody"])}
    assert all(which.any() for which in by_target.values())
    for kind, status in {
        "plain": 200,
        "degraded": 200,
        "refused": 503,
        "closed": 0,
        "late": 0,
    }.items():
        assert set(records.status[by_target[kind]]) == {status}, kind
    assert (records.degraded == by_target["degraded"]).all()
    assert set(records.retry_after[by_target["refused"]]) == {2.0}
    assert np.isnan(records.retry_after[~by_target["refused"]]).all()
    assert set(records.error[by_target["closed"]]) == {"ServerDisconnectedError"}
    assert set(records.error[by_target["late"]]) <= {"TimeoutError", "ServerTimeoutError"}
    assert set(records.error[by_target["nobody"]]) == {"ClientConnectorError"}
    assert (records.latency[by_target["late"]] >= 1.0).all()
    assert (records.failed == (by_target["closed"] | by_target["late"] | by_target["nobody"])).all()
    answered = records.answered
    assert (records.first[answered] <= records.done[answered]).all()
    for body, has_answer, target in zip(outcome.answers, answered, records.target, strict=True):
        assert (f'"q":"{kinds[target]}"'.encode() in body) if has_answer else body == b""


def test_a_load_can_be_stopped_and_tells_of_what_it_sent(tmp_path: Path) -> None:
    seen = threading.Event()

    async def answer(_: web.Request) -> web.Response:
        seen.set()
        return web.json_response({})

    stream = Stream([0], [Piece(600, 50)])
    with (
        server(answer) as url,
        Load(tmp_path, Plan([(url, "{}")]), [stream], np.random.default_rng(0)) as load,
    ):
        assert seen.wait(30)
        outcome = load.stop()
    assert 0 < len(outcome.records) < 10_000
    assert outcome.records.answered.all()
    assert len(outcome.answers) == len(outcome.records)


def test_records_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    records = Records.planned(np.array([0, 1]), np.array([1.0, 2.0]))
    records.sent[0], records.status[0], records.error[1] = 1.5, 503, "ClientOSError"
    records.save(tmp_path / "records.npz")
    found = Records.load(tmp_path / "records.npz")
    np.testing.assert_array_equal(found.sent, [1.5, np.nan])
    assert found.status.tolist() == [503, 0]
    assert found.error.tolist() == ["", "ClientOSError"]
    assert found.refused.tolist() == [True, False]
    assert found.failed.tolist() == [False, True]


def test_rude_clients_note_how_they_were_turned_away() -> None:
    async def turn_away(request: web.Request) -> web.Response:
        if request.path == "/patient":
            await request.read()
        return web.Response(status=413 if (request.content_length or 0) > 2**20 else 408)

    async def scenario(url: str) -> list[str]:
        async with Rude(url, 2, 0.01) as rude:
            while not {"slow", "large"} <= {one["kind"] for one in rude.outcomes}:
                await asyncio.sleep(0.01)
        return [f"{one['kind']} {one['status']}" for one in rude.outcomes]

    async def patient(url: str) -> list[dict[str, Any]]:
        async with Rude(url, 2, 0) as rude:
            await asyncio.sleep(0.1)
        return rude.outcomes

    with server(turn_away) as url:
        found = set(asyncio.run(scenario(f"{url}/search")))
        held = asyncio.run(patient(f"{url}/patient"))
    assert [(one["kind"], one["held"]) for one in held] == [("slow", True)] * 2
    assert "slow 408" in found
    assert any(one.startswith("large") for one in found)
    assert "large 200" not in found


def test_the_server_without_ray_answers(tmp_path: Path) -> None:
    with bare_server() as url:
        outcome = sent(tmp_path, Plan([(url, "{}")]), Stream([0], [Piece(0.2, 100)]))
    assert outcome.records.answered.all()
