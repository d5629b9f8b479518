"""How an index is built, chosen by trials for the goal of a recipe. What was found stays beside the index."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.embeddings import Embeddings
from pipelines.recipe import Recipe
from slq.artifacts import require_same_fingerprint
from slq.errors import ConfigError
from slq.files import file_sha256, read_json, write_json
from slq.index import IndexConfig
from slq.index.config import GoalConfig
from slq.index.parts import EMBEDDING, matrix
from slq.index.trials import choose, exact_truth, run_trials, verified
from slq.index.writing import SegmentOf
from slq.quantization import cut

log = logging.getLogger(__name__)
CHOICES = "choices"
CHOICE = "choice"
"""Under which the source of a version names its choice."""
_COMPARISONS = 4 * 10**9  # vectors times queries: some minutes of one core
_LEAST_QUERIES = (
    50  # fewer say nothing about recall; with 10^9 vectors, less than an hour of reading them
)


@dataclass(frozen=True)
class Choice:
    """How an index shall be built, and why.

    Attributes:
        config: With the goal.
        path: Where it is recorded: trials, reason, and what the whole index reached.
        queries: (queries, dimension) float32 unit vectors of texts.
    """

    config: IndexConfig
    path: Path
    queries: NDArray[np.float32]

    @classmethod
    def made(cls, recipe: Recipe, found: Embeddings) -> "Choice":
        """Try settings on a sample, or take what was chosen for these vectors before.

        Raises:
            ArtifactMismatchError: The adapter is not the one that the vectors are of.
            ConfigError: No setting reaches the goal, or there are no text queries.
            HardwareError: A GPU is asked for that this process does not see: it tries settings itself.
            StorageError: The choice cannot be written.
        """
        config, goal = recipe.index, recipe.index.goal
        if goal is None:
            raise ConfigError("index.goal is not set; nothing is to be chosen")
        path = recipe.storage.index / CHOICES / f"{choice_name(recipe, found)}.json"
        queries = text_queries(recipe, found, goal.num_queries)
        if path.exists():
            record = read_json(path)
            log.info("settings were chosen before: %s", record["reason"])
        else:
            trials = run_trials(_sample(found, goal, config.seed), queries, config, found.num_rows)
            best, reason = choose(trials, goal)
            log.info("%s: %s", best.name, reason)
            record = {
                "goal": goal.model_dump(),
                "sample_rows": min(goal.sample_rows, found.num_rows),
                "num_queries": len(queries),
                "chosen": best.to_json(),
                "reason": reason,
                "config": best.config.recorded(),
                "trials": [one.to_json() for one in trials],
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
        chosen = IndexConfig.model_validate(record["config"]).placed_as(config)
        return cls(chosen, path, queries)

    def settle(self, segment_of: SegmentOf, config: IndexConfig) -> IndexConfig:
        """Measure the whole index, and visit more of it where the sample promised too much.

        A latency that does not hold is told and recorded: the index is as good as it can be, and is published.
        """
        segment, goal = segment_of(config), config.goal or GoalConfig()
        asking = self.queries[: max(_LEAST_QUERIES, _COMPARISONS // len(segment))]
        truth = exact_truth(segment, asking, goal.top_k)
        settled, reached = verified(segment_of, config, asking, truth)
        log.info(
            "the whole index reaches recall %.3f at %.2f ms, with %d probes",
            reached["recall"],
            reached["latency_ms"],
            settled.num_probes,
        )
        for name, missed in {
            "recall": reached["recall"] < goal.recall,
            "latency_ms": goal.latency_ms is not None and reached["latency_ms"] > goal.latency_ms,
        }.items():
            if missed:
                log.warning(
                    "%s is %.3g, not %g as on the sample", name, reached[name], getattr(goal, name)
                )
        record = read_json(self.path)
        write_json(self.path, {**record, "reached": reached, "config": settled.recorded()})
        return settled


def choice_name(recipe: Recipe, found: Embeddings) -> str:
    """Of the choice for these settings, vectors and queries.

    Raises:
        ConfigError: The queries cannot be read.
    """
    told = [
        recipe.index.model_dump(exclude={"device"}),  # where it searches decides what is fast
        found.state,
        found.fingerprint,
        file_sha256(_queries_path(recipe)),
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _queries_path(recipe: Recipe) -> Path:
    path = recipe.data.path("queries")
    if not path.is_file():
        raise ConfigError(
            f"index.goal is measured on text queries, and there is no data.queries {path}"
        )
    return path


def _sample(found: Embeddings, goal: GoalConfig, seed: int) -> NDArray[np.float16]:
    """(sample, dimension) vectors of whole shards, which are chosen by the seed."""
    commits = found.shards.commits
    order = np.random.default_rng(seed).permutation(len(commits))
    chosen = replace(found.shards, commits=tuple(commits[number] for number in order))
    taken: list[NDArray[np.float16]] = []
    count = 0
    for table in chosen.tables():
        taken.append(matrix(table[EMBEDDING]))
        count += len(taken[-1])
        if count >= goal.sample_rows:
            break
    return np.concatenate(taken)[: goal.sample_rows]


def text_queries(recipe: Recipe, found: Embeddings, most: int) -> NDArray[np.float32]:
    """(queries, dimension) float32 unit vectors of texts of `data.queries`, chosen by the seed.

    Args:
        recipe: The resolved recipe.
        found: What they shall search.
        most: How many; all where there are fewer.

    Raises:
        ArtifactMismatchError: The adapter is not the one that the vectors are of.
        ConfigError: There are no text queries.
    """
    from slq.encoder import Encoder

    path = _queries_path(recipe)
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, columns=["text"]).to_pylist()
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f"index.goal is measured on text queries, and data.queries {path} cannot be read: {error}"
        ) from None
    texts = [row["text"] for row in rows if row["text"]]
    if not texts:
        raise ConfigError(f"index.goal is measured on text queries, and {path} has none")
    count = min(most, len(texts))
    chosen = np.random.default_rng(recipe.index.seed).choice(len(texts), count, replace=False)
    encoder = Encoder.from_pretrained(recipe.storage.adapter)
    require_same_fingerprint(
        found.fingerprint,
        encoder.fingerprint,
        expected_in="the embeddings",
        found_in=f"adapter {recipe.storage.adapter}",
        remedy="name the adapter that they were made with",
    )
    return cut(encoder.encode([texts[number] for number in np.sort(chosen)]), found.dimension)
