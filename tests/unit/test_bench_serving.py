"""What the benchmarks of the service make of their notes: figures, victims, tables and pictures."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jobs.bench import serving
from jobs.bench.load.arrivals import Piece
from jobs.bench.load.records import Records, joined
from jobs.bench.load.sending import Outcome
from jobs.bench.serving.answers import Found, wrong_answers
from jobs.bench.serving.autoscale import changes, phase_figures, phases_of, series_of
from jobs.bench.serving.chaos import Fault, fault_figures, is_healed
from jobs.bench.serving.charts import autoscale_chart, chaos_chart, latency_chart, overload_chart
from jobs.bench.serving.latency import figures_at
from jobs.bench.serving.overhead import figures
from jobs.bench.serving.overload import overload_figures, rude_figures
from jobs.bench.serving.peak import Probe, best, find_peak
from jobs.bench.serving.peak import told as probes_told
from jobs.bench.serving.processes import Actor, living, memory_figures, pick
from jobs.bench.serving.stand import Settings
from jobs.bench.serving.summary import goodput, percentiles_ms, summary
from jobs.bench.serving.tables import tables_of
from slq.errors import ServiceError

START = 1000.0
PNG = b"\x89PNG"


def records_of(count: int, *, seed: int = 0, seconds: float = 10.0, targets: int = 1) -> Records:
    """Requests over some seconds: answers, refusals and failures by turns of chance."""
    rng = np.random.default_rng(seed)
    found = Records.planned(
        rng.integers(0, targets, count), START + np.sort(rng.uniform(0, seconds, count))
    )
    found.sent[:] = found.scheduled + rng.exponential(0.001, count)
    found.done[:] = found.sent + rng.exponential(0.4, count)
    found.first[:] = found.sent + (found.done - found.sent) / 2
    found.status[:] = rng.choice([200, 200, 200, 503, 429, 500, 0], count)
    found.error[found.status == 0] = "ServerDisconnectedError"
    found.retry_after[(found.status == 503)] = 1.0
    found.degraded[:] = (found.status == 200) & (rng.random(count) < 0.3)
    return found


def outcome_of(records: Records, answers: Sequence[bytes] = (), rude: Any = ()) -> Outcome:
    return Outcome(records, START, 0.5, list(rude), list(answers) or [b""] * len(records))


# ---- figures ----


def test_percentiles_are_those_of_a_sorted_list() -> None:
    values = np.random.default_rng(0).exponential(1, 2001)
    ordered = 1000 * np.sort(values)
    found = percentiles_ms(values)
    for name, place in {"p50": 1000, "p90": 1800, "p99": 1980, "p99.9": 1998}.items():
        assert found[name] == pytest.approx(ordered[place], abs=1e-3)
    assert set(percentiles_ms(np.zeros(0)).values()) == {None}


def test_goodput_counts_answers_in_time_from_when_they_were_due() -> None:
    records = records_of(500)
    by_hand = sum(
        status == 200 and done - due <= 0.3
        for status, done, due in zip(records.status, records.done, records.scheduled, strict=True)
    )
    assert goodput(records, 0.3, 10.0) == pytest.approx(by_hand / 10)
    late = records_of(100)
    late.sent[:] = late.scheduled + 1.0  # a client that could not send in time
    late.done[:] = late.sent + 0.001
    assert goodput(late, 0.3, 10.0) == 0


def test_a_summary_tells_answers_refusals_and_failures_apart() -> None:
    records = records_of(700)
    found = summary(records, seconds=10, deadline_s=0.5)
    status = records.status
    assert found["requests"] == 700
    assert found["answered_per_s"] == pytest.approx((status == 200).sum() / 10, abs=0.01)
    refused = np.isin(status, (429, 503))
    assert found["refusals"]["count"] == refused.sum()
    assert found["refused_share"] == pytest.approx(refused.mean(), abs=1e-4)
    assert found["refusals"]["by_status"] == {
        str(one): int((status == one).sum()) for one in (429, 503)
    }
    with_header = (status == 503).sum() / refused.sum()
    assert found["refusals"]["with_retry_after"] == pytest.approx(with_header, abs=1e-4)
    times = 1000 * (records.done - records.scheduled)[refused]
    assert found["refusals"]["time_ms"]["p50"] == pytest.approx(np.median(times), abs=1e-3)
    times = 1000 * (records.done - records.sent)[refused]
    assert found["refusals"]["server_ms"]["p50"] == pytest.approx(np.median(times), abs=1e-3)
    assert found["failures"] == {
        "count": int(np.isin(status, (0, 500)).sum()),
        "by_kind": {
            "500": int((status == 500).sum()),
            "ServerDisconnectedError": int((status == 0).sum()),
        },
    }
    degraded = records.degraded.sum() / (status == 200).sum()
    assert found["degraded_share"] == pytest.approx(degraded, abs=1e-4)


def test_runs_are_summed_up_together() -> None:
    parts = [records_of(50, seed=seed) for seed in range(3)]
    found = figures_at(Settings(seconds=10), parts)
    assert found["requests"] == 150
    assert found["offered_per_s"] == 5
    assert len(joined(parts)) == 150


def test_overhead_is_ours_without_the_empty_app_and_the_work() -> None:
    def rounds(*seconds: float) -> list[dict[str, list[float]]]:
        return [{"whole": [one - 0.001, one, one + 0.5]} for one in seconds]

    found = figures(
        {
            "noop": rounds(0.002, 0.020, 0.003),  # the second round was disturbed, all of it
            "composed": rounds(0.005, 0.022, 0.006),
            "text": [{**one, "embed": [0.004] * 3} for one in rounds(0.012, 0.055, 0.013)],
            "direct_text": rounds(0.006, 0.030, 0.007),
            "embedding": rounds(0.006, 0.030, 0.006),
            "direct_embedding": rounds(0.001, 0.002, 0.001),
            "paused_text": rounds(0.008, 0.032, 0.009),
            "paused_embedding": rounds(0.002, 0.003, 0.003),
        }
    )
    assert found["overhead_ms_by_round"] == {"text": [4, 5, 3], "embedding": [3, 8, 2]}
    assert found["overhead_ms"] == {"text": 4, "embedding": 3}
    assert found["overhead_after_pauses_ms"] == {"text": 2, "embedding": 2}
    assert found["handle_ms"] == 3
    assert found["parts_ms"] == {"text": {"embed": 4}}
    assert found["sides_ms"]["noop"]["p50"] == 19  # of all nine


@pytest.mark.parametrize("capacity", [3.0, 95.0, 1000.0])
def test_the_peak_is_found_from_either_side(capacity: float) -> None:
    asked = []

    def ask(rate: float) -> Probe:
        asked.append(rate)
        return Probe(rate, rate if rate <= capacity else capacity / (rate / capacity) ** 2)

    found = best(find_peak(ask, 20.0))
    assert 0.8 * capacity <= found.good <= capacity
    assert found.offered <= 1.1 * capacity
    assert len(asked) <= 16
    assert probes_told([found]) == [
        {"offered_per_s": round(found.offered, 2), "goodput_per_s": round(found.good, 2)}
    ]


def test_a_service_that_answers_nothing_has_no_peak() -> None:
    assert best(find_peak(lambda rate: Probe(rate, 0.0), 20.0)).good == 0


# ---- processes ----

TABLE = {  # as Ray 2.60 tells of a service with two backbones and two partitions
    str(number): {"Name": name, "Pid": 100 + number, "State": state}
    for number, (name, state) in enumerate(
        [
            ("SERVE_CONTROLLER_ACTOR", "ALIVE"),
            ("SERVE_PROXY_ACTOR-ad268165b2717192bf581421d22699b019a93d6857c5b9f5a7d9483e", "ALIVE"),
            ("SERVE_REPLICA::slq#Ingress#pqbfdcdt", "ALIVE"),
            ("SERVE_REPLICA::slq#BackboneService#e78hp9ia", "ALIVE"),
            ("SERVE_REPLICA::slq#BackboneService#abcdefgh", "ALIVE"),
            ("SERVE_REPLICA::slq#BackboneService#zzzzzzzz", "DEAD"),
            ("SERVE_REPLICA::slq#IndexService#hgfedcba", "ALIVE"),
            ("SERVE_REPLICA::slq#Partition0#aaaaaaaa", "ALIVE"),
            ("SERVE_REPLICA::slq#Partition1#bbbbbbbb", "ALIVE"),
            ("SERVE_REPLICA::bench-noop#Ingress#cccccccc", "ALIVE"),
            ("", "ALIVE"),
        ]
    )
}


def test_a_victim_is_a_living_process_of_the_kind_that_was_asked_for() -> None:
    actors = living(TABLE)
    rng = random.Random(0)
    found = {
        kind: {pick(actors, kind, rng).pid for _ in range(50)}
        for kind in ("controller", "proxy", "ingress", "backbone", "index", "partition")
    }
    assert found == {
        "controller": {100},
        "proxy": {101},
        "ingress": {102},
        "backbone": {103, 104},
        "index": {106},
        "partition": {107, 108},
    }
    with pytest.raises(
        ServiceError, match="no process of kind 'gpu' lives; there are backbone, co"
    ):
        pick(actors, "gpu", rng)
    picks = [[pick(actors, "partition", random.Random(s)).pid for s in range(9)] for _ in range(2)]
    assert picks[0] == picks[1]


def test_a_service_is_healed_when_the_victim_is_gone_and_all_replicas_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victim = Actor("SERVE_REPLICA::slq#BackboneService#e78hp9ia", 103)
    there = [victim]
    monkeypatch.setattr("jobs.bench.serving.chaos.serve_actors", lambda: there)
    before = {"BackboneService": 2, "Ingress": 1}
    told = {"BackboneService": [victim.name, "a"], "Ingress": ["b"]}
    assert not is_healed(victim, told, before)  # nobody has noticed yet
    there.clear()
    assert not is_healed(victim, told, before)  # Ray has, and Serve has not
    assert not is_healed(victim, {}, before)  # the controller is away
    assert not is_healed(victim, {"BackboneService": ["a"], "Ingress": ["b"]}, before)
    assert is_healed(victim, {"BackboneService": ["a", "c", "d"], "Ingress": ["b"]}, before)


def test_growth_of_memory_is_a_slope_and_a_ratio() -> None:
    samples = [
        (50 + 30.0 * n, {"backbone": (100 + 3 * n) * 2**20, "proxy": 100 * 2**20}) for n in range(5)
    ]
    found = memory_figures(samples)
    assert found["slope_mib_per_min"] == pytest.approx(6)
    assert found["second_half_slope_mib_per_min"] == pytest.approx(6)
    assert found["max_to_first"] == pytest.approx(212 / 200)
    assert found["first_and_last_mib"] == {"backbone": [100, 112], "proxy": [100, 100]}
    assert found["seconds"] == [0, 30, 60, 90, 120]
    warm = [(float(n), {"proxy": min(n, 3) * 2**20}) for n in range(1, 9)]
    assert memory_figures(warm)["second_half_slope_mib_per_min"] == pytest.approx(0, abs=1e-9)
    assert memory_figures(warm)["slope_mib_per_min"] > 0
    assert memory_figures(warm[:1])["slope_mib_per_min"] == 0


# ---- faults ----


def body_of(*results: tuple[str, float]) -> bytes:
    return json.dumps(
        {"results": [{"id": name, "score": score} for name, score in results]}
    ).encode()


def test_an_answer_is_wrong_when_items_or_scores_are_others() -> None:
    truth = Found.of(body_of(("a", 0.9), ("b", 0.5), ("c", 0.49999)))
    right = [
        body_of(("a", 0.9), ("b", 0.5), ("c", 0.49999)),
        body_of(("a", 0.90002), ("c", 0.5), ("b", 0.49999)),  # equals changed places
        body_of(("a", 0.9), ("b", 0.5), ("d", 0.49999)),  # the cut goes between equals
        b"",
    ]
    wrong = [
        body_of(("b", 0.9), ("a", 0.5), ("c", 0.49999)),
        body_of(("a", 0.9), ("b", 0.5)),
        body_of(("a", 0.9), ("b", 0.48), ("c", 0.47)),
        body_of(("a", 0.9), ("x", 0.8), ("b", 0.5)),
        b'{"results": [{}]}',
        b"no JSON",
    ]
    found = wrong_answers([*right, *wrong], [0] * 10, {0: truth})
    assert found == [False] * len(right) + [True] * len(wrong)


def test_every_request_that_is_not_answered_rightly_counts_with_the_fault_before_it() -> None:
    records = Records.planned(np.zeros(6, np.int64), START + np.arange(6.0))
    records.sent[:], records.done[:] = records.scheduled, records.scheduled + 0.1
    records.status[:] = [200, 200, 503, 0, 200, 200]
    records.error[3] = "ClientOSError"
    records.done[4] += 2
    good, bad = (body_of((name, 1.0), ("z", 0.5)) for name in "ab")
    answers = [good, bad, b"", b"", good, bad]
    records.degraded[1] = True  # it says so itself
    faults = [
        Fault("backbone", "KILL", 1, START + 1.5, 3.2),
        Fault("controller", "KILL", 2, START + 4.5, None),
    ]
    found = fault_figures(
        outcome_of(records, answers), faults, {0: Found.of(good)}, Settings(seconds=1)
    )
    assert (found["all"]["requests"], found["all"]["failed"], found["all"]["wrong"]) == (6, 2, 1)
    first, second = found["faults"]
    assert (first["requests"], first["failed"], first["wrong"]) == (3, 2, 0)
    assert first["failures"] == {"ClientOSError": 1, "503": 1}
    assert (first["slowest_ms"], first["healed_s"]) == (2100, 3.2)
    assert (second["requests"], second["failed"], second["wrong"]) == (1, 0, 1)
    assert second["healed_s"] is None
    before = found["before_faults"]
    assert (before["failed"], before["wrong"], before["degraded"]) == (0, 0, 1)


# ---- overload and scaling ----


def test_an_overload_looks_at_its_own_requests_and_at_those_beside_them() -> None:
    records = records_of(900, seconds=12, targets=5)
    rude = [
        {"kind": "large", "status": 413, "bytes": 2**16, "seconds": 0.2},
        {"kind": "slow", "status": 0, "bytes": 30, "seconds": 30.0},
        {"kind": "slow", "status": 408, "bytes": 3, "seconds": 3.0},
    ]
    found = overload_figures(outcome_of(records, rude=rude), Settings(seconds=10), 3)
    late = records.scheduled >= START + 2  # the first seconds are for warming up
    assert found["requests"] == (late & (records.target < 3)).sum()
    beside = late & (records.target == 4)
    expected = 1000 * np.median(records.latency[beside])
    assert found["beside_ms"]["bare"]["p50"] == pytest.approx(expected, abs=1e-3)
    assert found["rude"] == rude_figures(rude)
    assert found["rude"]["slow"]["by_status"] == {"0": 1, "408": 1}
    assert found["rude"]["slow"]["time_ms"]["p50"] == pytest.approx(16_500)


def test_changes_of_replicas_are_counted_within_a_phase() -> None:
    counts = [1, 1, 2, 2, 1, 3, 3]
    samples = [(float(at), {"Backbone": count, "Index": 1}) for at, count in enumerate(counts)]
    assert changes(samples, 0, 7) == {"Backbone": 3, "Index": 0}
    assert changes(samples, 2, 4) == {"Backbone": 0, "Index": 0}
    assert changes(samples, 70, 80) == {}


def autoscaled() -> tuple[Outcome, dict[str, list[Piece]], list[tuple[float, dict[str, int]]]]:
    phases = phases_of(Settings(seconds=4, seed=2), [5, 40, 20])
    seconds = sum(piece.seconds for phase in phases.values() for piece in phase)
    samples = [
        (START + at, {"BackboneService": 1 + (3 < at < 9), "Ingress": 1})
        for at in range(int(seconds))
    ]
    return outcome_of(records_of(400, seconds=seconds)), phases, samples


def test_phases_follow_one_another_and_the_noise_comes_from_the_seed() -> None:
    outcome, phases, samples = autoscaled()
    assert list(phases) == ["low", "up", "down", "level", "noise"]
    assert phases == phases_of(Settings(seconds=4, seed=2), [5, 40, 20])
    assert phases["noise"] != phases_of(Settings(seconds=4, seed=3), [5, 40, 20])["noise"]
    found = phase_figures(outcome, phases, samples, Settings())
    assert [found[name]["changes"] for name in phases] == [0, 1, 1, 0, 0]
    assert sum(found[name]["requests"] for name in phases) == 400
    pieces = [piece for phase in phases.values() for piece in phase]
    series = series_of(outcome, pieces, samples)
    assert sum(series["offered_per_s"]) == 400
    assert max(series["replicas"]["BackboneService"]) == 2


# ---- tables and pictures ----


def everything(folder: Path) -> dict[str, Any]:
    """A result of each part, with its picture in a folder."""
    rows = [
        {"rate": r, **figures_at(Settings(seconds=10), [records_of(r, seed=r)])} for r in (30, 90)
    ]
    latency = {mode: {"rates": rows} for mode in ("coarse", "fine")}
    run = overload_figures(outcome_of(records_of(900, targets=5)), Settings(seconds=8), 3)
    memory = memory_figures([(0.0, {"proxy": 2**27}), (60.0, {"proxy": 2**27 + 2**20})])
    run |= {"factor": 2.0, "to_peak": 0.9, "to_neighbours": 0.95, "memory": memory}
    probes = probes_told([Probe(20, 20), Probe(50, 31)])
    overload = {"coarse": {"peak_goodput_per_s": 31.0, "probes": probes, "runs": [run]}}
    outcome, phases, samples = autoscaled()
    pieces = [piece for phase in phases.values() for piece in phase]
    series = series_of(outcome, pieces, samples)
    faults = [Fault("index", name, 3, START + 3, 2.0) for name in ("KILL", "KILL")]
    truth = {0: Found.of(body_of(("a", 1.0)))}
    chaos = fault_figures(outcome, faults, truth, Settings()) | {"rate": 5.0, "seed": 9}
    works = ("direct_text", "direct_embedding", "paused_text", "paused_embedding")
    sides = ("noop", "composed", "text", "embedding", *works)
    rounds = {name: [{"whole": [0.01, 0.02], "embed": [0.005, 0.005]}] for name in sides}
    return {
        "overhead": figures(rounds),
        "latency": {**latency, "chart": str(latency_chart(latency, folder / "latency.png"))},
        "overload": {**overload, "chart": str(overload_chart(overload, folder / "over.png"))},
        "chaos": {**chaos, "chart": str(chaos_chart(outcome, faults, folder / "chaos.png"))},
        "autoscale": {
            "phases": phase_figures(outcome, phases, samples, Settings()),
            "chart": str(autoscale_chart(series, phases, folder / "scale.png")),
        },
    }


def test_each_part_has_a_table_and_a_picture_and_survives_json(tmp_path: Path) -> None:
    found = everything(tmp_path)
    assert set(found) == set(serving.PARTS)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    console = Console(record=True, width=200, file=(tmp_path / "tables.txt").open("w"))
    for part, result in found.items():
        tables = list(tables_of(part, result))
        assert tables
        for table in tables:
            console.print(table)
        if part != "overhead":
            picture = Path(result["chart"])
            assert picture.read_bytes().startswith(PNG)
            assert picture.stat().st_size > 5000
    text = console.export_text()
    for words in ("ours - noop - direct", "peak 31.0/s", "KILL index again", "seed 9", "noise"):
        assert words in text
    console.file.close()


def test_parts_take_their_own_lengths_and_the_command_line_goes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def measure(settings: Settings) -> dict[str, Any]:
        seen.append(settings)
        return everything(tmp_path)["overhead"]

    monkeypatch.setattr("jobs.bench.serving.overhead.measure", measure)
    arguments = ["--part", "overhead", "--seed", "4", "--out", str(tmp_path / "out")]
    found = serving.run([*arguments, "--set", "serve.num_threads=1", "--rates", "5"])
    assert seen[0].seed == found["seed"] == 4
    assert (seen[0].overrides, seen[0].rates) == (("serve.num_threads=1",), (5.0,))
    written = json.loads((tmp_path / "out" / "overhead.json").read_text())
    assert written == json.loads(json.dumps(found))
    assert written["command"].startswith("slq bench serve --part overhead --seed 4")
    assert {"cpu", "cpus", "ray", "memory_gib"} <= set(written["hardware"])
    first, second = (serving.run(["--part", "overhead", "--out", str(tmp_path)]) for _ in range(2))
    assert first["seed"] != second["seed"]


def test_an_unknown_part_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        serving.run(["--part", "speed"])
    assert "'overload'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        serving.run(["--help"])
    assert "Example: slq bench serve" in capsys.readouterr().out
