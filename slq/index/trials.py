"""Chooses how an index is built by what it must reach: settings are tried on a sample, with real text queries.

Text queries are not distributed as images are, so settings that find an image's neighbours well may lose a text's.
Lists of a sample are as long as those of the whole will be: a trial visits as much as a search of the whole will, but
for the comparison with centroids. The fewer lists a sample has the more it promises; what was chosen is measured again
on the whole, see `verified`.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ByteSize

from slq.arrow import vector_column
from slq.errors import ConfigError
from slq.index import codes
from slq.index.building import build_segment
from slq.index.config import GoalConfig, IndexConfig
from slq.index.exact import NO_ROW, Rows, exact_search
from slq.index.parts import EMBEDDING
from slq.index.segment import Segment

_GRID: tuple[dict[str, Any], ...] = (
    {"codes": "float16"},
    {"codes": "int8"},
    {"codes": "rabitq", "rotation": "random"},
    {"codes": "pq4", "rotation": "opq"},
)
_PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_OVERSAMPLES = (2.0, 4.0, 8.0, 16.0, 32.0)
_FEW_ROWS = 20_000  # lists of fewer would be no faster
_LEAST_LIST = 39  # vectors that faiss wants for a centroid
_GRAPH_FROM_LISTS = 10_000
_TIMED_QUERIES = 50
_ROW_BYTES = 8
_GRAPH_BYTES = 2 * 32 * 4  # links of a centroid on the lowest layer, where nearly all are
_MOST_VISITED = 0.5  # share of a sample's lists: who visits more finds much in a sample, and little in the whole


@dataclass(frozen=True)
class Trial:
    """What a setting reached.

    Attributes:
        config: The setting, for the whole corpus.
        recall: On the sample.
        latency_ms: Median of one query alone.
        queries_per_s: Of all queries in one call.
        memory: Bytes for the whole corpus.
    """

    config: IndexConfig
    recall: float
    latency_ms: float
    queries_per_s: float
    memory: int

    @property
    def name(self) -> str:
        """The setting in a few words."""
        config = self.config
        if config.kind == "flat":
            return "flat"
        words = [config.codes, f"{config.num_probes} of {config.num_lists} lists"]
        if config.is_rescored:
            words.append(f"{config.oversample:g}x candidates")
        return ", ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "kind": self.config.kind,
            "codes": self.config.codes,
            "num_lists": self.config.num_lists,
            "num_probes": self.config.num_probes,
            "oversample": self.config.oversample,
            "recall": round(self.recall, 4),
            "latency_ms": round(self.latency_ms, 3),
            "queries_per_s": round(self.queries_per_s, 1),
            "memory": self.memory,
        }


def run_trials(
    vectors: NDArray[np.float16],
    queries: NDArray[np.float32],
    config: IndexConfig,
    count: int,
) -> list[Trial]:
    """Try a small grid of settings.

    Args:
        vectors: (sample, dimension) float16.
        queries: (queries, dimension) float32 unit vectors.
        config: Has a goal.
        count: Vectors of the whole corpus.

    Returns:
        For each kind of codes that `config.search_device` can search, more and more lists and candidates.

    Raises:
        HardwareError: A device is not here.
    """
    goal = config.goal or GoalConfig()
    found: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="slq-trials-") as name:
        for number, setting in enumerate(_settings(config, count)):
            tried = setting.model_copy(
                update={
                    "num_lists": max(1, round(setting.num_lists * len(vectors) / count)),
                    "words": False,
                }
            )
            if tried.unfit(*vectors.shape) or tried.unsearchable():
                continue
            home = Path(name, str(number))
            build_segment(home, [_Sample(vectors)], vectors.shape[1], tried)
            found += _trials(home, setting, tried, queries, goal, (count, vectors.shape[1]))
    return found


def _settings(config: IndexConfig, count: int) -> Iterator[IndexConfig]:
    """Kinds of codes, with lists for the whole corpus."""
    if count < _FEW_ROWS:
        yield config.model_copy(update={"kind": "flat"})
        return
    num_lists = 2 ** round(np.log2(4 * np.sqrt(count)))
    num_lists = min(num_lists, count // _LEAST_LIST)
    for setting in _GRID:
        quantizer = "hnsw" if num_lists >= _GRAPH_FROM_LISTS else "flat"
        yield config.model_copy(
            update={"kind": "ivf", "num_lists": num_lists, "quantizer": quantizer, **setting}
        )


def memory_of(config: IndexConfig, count: int, dimension: int) -> int:
    """Bytes of codes, row numbers, and centroids with their graph."""
    if config.kind == "flat":
        return 4 * count * dimension
    centroid = 4 * dimension + (_GRAPH_BYTES if config.quantizer == "hnsw" else 0)
    code = codes.code_bytes(config, dimension) + _ROW_BYTES
    return count * code + config.num_lists * centroid


@dataclass(frozen=True)
class _Sample:
    """The sample as a source."""

    vectors: NDArray[np.float16]

    @property
    def num_rows(self) -> int:
        """Of the sample."""
        return len(self.vectors)

    def tables(self) -> Iterator[pa.Table]:
        """Numbers as ids, and vectors."""
        ids = pa.array([str(number) for number in range(len(self.vectors))])
        yield pa.table({"id": ids, EMBEDDING: vector_column(self.vectors)})


def _trials(
    home: Path,
    setting: IndexConfig,
    tried: IndexConfig,
    queries: NDArray[np.float32],
    goal: GoalConfig,
    shape: tuple[int, int],
) -> list[Trial]:
    """More and more lists and candidates, until more of them find nothing more."""
    none = np.zeros(0, np.int64)
    truth = exact_truth(Segment(home, tried, none), queries, goal.top_k)
    memory, found = memory_of(setting, *shape), []
    most = max(1, int(_MOST_VISITED * tried.num_lists)) if tried.kind == "ivf" else 1
    probes = [n for n in _PROBES if n <= most]
    for num_probes in probes:
        for oversample in _OVERSAMPLES if tried.is_rescored else (1.0,):
            chosen = {"num_probes": num_probes, "oversample": oversample}
            segment = Segment(home, tried.model_copy(update=chosen), none)
            recall, latency, rate = measured(segment, queries, truth)
            found.append(Trial(setting.model_copy(update=chosen), recall, latency, rate, memory))
    return found


def exact_truth(segment: Segment, queries: NDArray[np.float32], top_k: int) -> Rows:
    """(queries, top_k) rows that are nearest."""
    return exact_search(queries, segment.vectors.blocks(), top_k)[1]


def measured(
    segment: Segment, queries: NDArray[np.float32], truth: Rows
) -> tuple[float, float, float]:
    """Recall of a segment, milliseconds of a query alone, and queries per second of all together."""
    top_k = truth.shape[1]
    began = time.perf_counter()
    _, rows = segment.search(queries, top_k)
    rate = len(queries) / (time.perf_counter() - began)
    alone = []
    for query in queries[:_TIMED_QUERIES, None]:
        began = time.perf_counter()
        segment.search(query, top_k)
        alone.append(time.perf_counter() - began)
    return recall_of(rows, truth), 1000 * statistics.median(alone), rate


def recall_of(found: Rows, truth: Rows) -> float:
    """Share of the true rows that were found; what fills up where there are too few does not count."""
    pairs = [
        ({*one.tolist()}, {*other.tolist()} - {NO_ROW})
        for one, other in zip(found, truth, strict=True)
    ]
    return sum(len(one & other) for one, other in pairs) / sum(len(other) for _, other in pairs)


def choose(trials: Sequence[Trial], goal: GoalConfig) -> tuple[Trial, str]:
    """The fastest setting that reaches the goal, of equally fast ones the smallest, and why.

    Raises:
        ConfigError: None does; which of recall, memory and latency cannot hold is told.
    """
    good = [one for one in trials if not _failures(one, goal)]
    if not good:
        raise ConfigError(_impossible(trials, goal))
    best = min(good, key=lambda one: (one.latency_ms, one.memory))
    reason = (
        f"the fastest of {len(good)} settings, of {len(trials)} tried, that reach {_told(goal)}: "
        f"recall {best.recall:.3f}, {best.latency_ms:.2f} ms, {ByteSize(best.memory).human_readable()}"
    )
    return best, reason


def _failures(trial: Trial, goal: GoalConfig) -> frozenset[str]:
    """What of the goal a setting does not reach."""
    failed = {
        "recall": trial.recall < goal.recall,
        "memory": goal.memory is not None and trial.memory > goal.memory,
        "latency": goal.latency_ms is not None and trial.latency_ms > goal.latency_ms,
    }
    return frozenset(name for name, fails in failed.items() if fails)


def _impossible(trials: Sequence[Trial], goal: GoalConfig) -> str:
    """Which limit cannot hold: what each would have to be if the others stay."""
    nearest = {
        "recall": lambda one: (-one.recall, one.latency_ms),
        "memory": lambda one: (one.memory, one.latency_ms),
        "latency": lambda one: (one.latency_ms, one.memory),
    }
    told = []
    for name, order in nearest.items():
        alone = [one for one in trials if _failures(one, goal) == {name}]
        if alone:
            best = min(alone, key=order)
            value = {
                "recall": f"{best.recall:.3f}",
                "memory": ByteSize(best.memory).human_readable(),
                "latency": f"{best.latency_ms:.2f} ms",
            }[name]
            told.append(f"{name} would have to be {value} ({best.name})")
    ways = "; or ".join(told) or "two of its limits would have to give way at once"
    return f"no setting reaches the goal of {_told(goal)} on the sample: {ways}"


def _told(goal: GoalConfig) -> str:
    words = [f"recall {goal.recall:g}@{goal.top_k}"]
    if goal.memory is not None:
        words.append(f"memory {goal.memory.human_readable()}")
    if goal.latency_ms is not None:
        words.append(f"latency {goal.latency_ms:g} ms")
    return ", ".join(words)


def verified(
    segment_of: Callable[[IndexConfig], Segment],
    config: IndexConfig,
    queries: NDArray[np.float32],
    truth: Rows,
) -> tuple[IndexConfig, dict[str, float]]:
    """Visit more lists and candidates of the whole until the recall of the goal is reached there too.

    Args:
        segment_of: Makes the segment with other settings.
        config: As chosen.
        queries: (queries, dimension) float32 unit vectors.
        truth: Their nearest rows.

    Returns:
        The settings, and what they reach; with all lists (on a GPU, 2,048) and most candidates at the end, whatever
        they reach.
    """
    goal = config.goal or GoalConfig()
    while True:
        recall, latency, rate = measured(segment_of(config), queries, truth)
        reached = {"recall": recall, "latency_ms": latency, "queries_per_s": rate}
        is_last = config.num_probes >= config.most_probes and config.oversample >= _OVERSAMPLES[-1]
        if recall >= goal.recall or config.kind == "flat" or is_last:
            return config, reached
        config = config.model_copy(
            update={
                "num_probes": min(config.most_probes, 2 * config.num_probes),
                "oversample": min(_OVERSAMPLES[-1], 2 * config.oversample),
            }
        )
