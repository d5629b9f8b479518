"""Settings chosen for a goal: the fastest that reaches it, or which limit cannot hold; measured again on the whole."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import slq.index.trials
from jobs.choices import best_trials, choice_table, write_choice_chart
from slq.errors import ConfigError
from slq.index import IndexConfig
from slq.index.building import build_segment
from slq.index.config import GoalConfig
from slq.index.segment import Segment
from slq.index.trials import (
    Trial,
    choose,
    exact_truth,
    measured,
    memory_of,
    recall_of,
    run_trials,
    verified,
)
from tests.unit.index_data import Given, table, unit_vectors

COUNT, DIMENSION = 3000, 32
NONE = np.zeros(0, np.int64)


def vectors() -> NDArray[np.float16]:
    return unit_vectors(COUNT).astype(np.float16)


def trial(recall: float, latency_ms: float, memory: int, **setting: object) -> Trial:
    config = IndexConfig.model_validate({"kind": "ivf", **setting})
    return Trial(config, recall, latency_ms, 1000 / latency_ms, memory)


TRIALS = [
    trial(0.90, 1.0, 10 * 2**20, codes="pq4", num_probes=4),
    trial(0.97, 4.0, 10 * 2**20, codes="pq4", num_probes=32),
    trial(0.97, 2.0, 200 * 2**20, codes="int8", num_probes=8),
    trial(0.97, 2.0, 400 * 2**20, codes="float16", num_probes=8),
    trial(1.00, 9.0, 400 * 2**20, codes="float16", num_probes=64),
]


def goal(**limits: object) -> GoalConfig:
    return GoalConfig.model_validate(limits)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"recall": 0.95}, 2),  # the smaller of two that are as fast
        ({"recall": 0.9}, 0),
        ({"recall": 0.95, "memory": "64MiB"}, 1),
        ({"recall": 0.99, "latency_ms": 10}, 4),
    ],
)
def test_the_fastest_setting_that_reaches_the_goal_is_chosen(
    limits: dict[str, object], expected: int
) -> None:
    best, reason = choose(TRIALS, goal(**limits))
    assert best is TRIALS[expected]
    assert "of 5 tried" in reason
    assert f"recall {best.recall:.3f}, {best.latency_ms:.2f} ms" in reason


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (
            {"recall": 0.999, "latency_ms": 5, "memory": "300MiB"},
            "recall 0.999@10, memory 300.0MiB, latency 5 ms on the sample: recall would have to be 0.970 "
            "(int8, 8 of 64 lists, 4x candidates)",
        ),
        (
            {"recall": 0.95, "latency_ms": 3, "memory": "64MiB"},
            "recall would have to be 0.900 (pq4, 4 of 64 lists, 4x candidates); or memory would have to be 200.0MiB "
            "(int8, 8 of 64 lists, 4x candidates); or latency would have to be 4.00 ms (pq4, 32 of",
        ),
        ({"recall": 0.999, "latency_ms": 1, "memory": "1MiB"}, "two of its limits would have to"),
    ],
)
def test_a_goal_that_is_impossible_says_which_limit_cannot_hold(
    limits: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(TRIALS, goal(**limits))
    assert expected in str(caught.value)


def test_trials_measure_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slq.index.trials, "_FEW_ROWS", 100)
    monkeypatch.setattr(slq.index.trials, "_PROBES", (1, 8))
    monkeypatch.setattr(slq.index.trials, "_OVERSAMPLES", (1.0, 16.0))
    config = IndexConfig(goal=goal(num_queries=40), words=True)
    queries = unit_vectors(40, seed=1)
    trials = run_trials(vectors(), queries, config, 4 * COUNT)
    kinds = dict.fromkeys(one.config.codes for one in trials)
    assert list(kinds) == ["float16", "int8", "rabitq", "pq4"]
    by_codes = {codes: [one for one in trials if one.config.codes == codes] for codes in kinds}
    for codes, ours in by_codes.items():
        few, many = ours[0], ours[-1]
        assert few.recall < many.recall
        assert few.config.num_probes == 1
        assert few.memory == many.memory == memory_of(many.config, 4 * COUNT, DIMENSION), codes
        assert few.config.goal == config.goal
        assert few.config.words
        assert few.config.num_lists == 4 * COUNT // 39  # of the whole, not of the sample
    lists = by_codes["pq4"][0].config.num_lists
    assert by_codes["pq4"][0].memory == 4 * COUNT * (2 + 8) + 4 * lists * DIMENSION
    assert by_codes["rabitq"][0].memory == 4 * COUNT * (4 + 8 + 8) + 4 * lists * DIMENSION
    assert by_codes["int8"][0].memory == 4 * COUNT * (32 + 8) + 4 * lists * DIMENSION


def test_of_few_items_all_are_compared() -> None:
    trials = run_trials(vectors(), unit_vectors(5, seed=1), IndexConfig(goal=goal()), COUNT)
    assert [(one.config.kind, one.recall, one.memory) for one in trials] == [
        ("flat", 1.0, 4 * COUNT * DIMENSION)
    ]


def test_recall_counts_true_rows_wherever_they_stand() -> None:
    truth = np.array([[1, 2], [3, 4]])
    assert recall_of(np.array([[2, 1], [3, 9]]), truth) == 0.75
    assert recall_of(np.array([[8, 7], [-1, -1]]), truth) == 0.0
    assert recall_of(np.array([[1, -1], [3, -1]]), np.array([[1, -1], [3, -1]])) == 1.0


def test_the_whole_index_visits_more_until_the_goal_is_reached(tmp_path: Path) -> None:
    config = IndexConfig(
        kind="ivf", codes="pq4", num_lists=64, num_probes=1, oversample=1, goal=goal(recall=0.6)
    )
    rows = table(COUNT)
    build_segment(tmp_path, [Given(rows)], DIMENSION, config)
    queries = unit_vectors(30, seed=1)

    def segment_of(one: IndexConfig) -> Segment:
        return Segment(tmp_path, one, NONE)

    truth = exact_truth(segment_of(config), queries, 10)
    assert measured(segment_of(config), queries, truth)[0] < 0.3
    settled, reached = verified(segment_of, config, queries, truth)
    assert reached["recall"] >= 0.6
    assert settled.num_probes > 8
    assert settled.oversample > 8
    assert measured(segment_of(settled), queries, truth)[0] == reached["recall"]
    half = settled.model_copy(
        update={"num_probes": settled.num_probes // 2, "oversample": settled.oversample / 2}
    )
    assert measured(segment_of(half), queries, truth)[0] < 0.6
    perfect = config.model_copy(update={"goal": goal(recall=1.0)})
    settled, _ = verified(segment_of, perfect, queries, truth)
    assert settled.num_probes <= 64  # it ends, whatever is reached


def test_a_choice_is_shown_and_drawn(tmp_path: Path) -> None:
    from rich.console import Console

    wanted = goal(recall=0.95, latency_ms=3)
    best, reason = choose(TRIALS, wanted)
    record = {
        "goal": wanted.model_dump(),
        "sample_rows": 200_000,
        "num_queries": 500,
        "chosen": best.to_json(),
        "reason": reason,
        "trials": [one.to_json() for one in [*TRIALS, trial(0.8, 3.0, 10 * 2**20, codes="pq4")]],
        "reached": {"recall": 0.961, "latency_ms": 2.5, "queries_per_s": 700.0},
    }
    console = Console(width=120, record=True)
    console.print(choice_table(record))
    text = console.export_text()
    assert "int8, 8 of 64 lists, 4x candidates" in text
    assert "0.970" in text
    assert "200.0MiB" in text
    assert "the whole index" in text.splitlines()[-1] + text.splitlines()[-2]
    kept = [one["name"] for one in best_trials(record["trials"])]  # type: ignore[arg-type]
    assert len(kept) == 5  # slower and worse ones are left out
    assert "pq4, 4 of 64 lists" in text
    assert "float16, 64 of 64 lists" in text
    path = write_choice_chart(record, tmp_path / "choice.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
