"""Every row of a study against its baseline, query by query."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from jobs.compare.study import ZERO_SHOT, Plan
from pipelines.progress import show
from pipelines.ranking import RANKS_FILE
from slq.files import file_sha256
from slq.metrics import holm, paired_permutation

OWN = "slq"
Ranks = Mapping[str, tuple[int, tuple[str, ...]]]
"""Of each query: where its first relevant item stands, and the subsets that it belongs to."""


def paired_p(
    plan: Plan, results: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, str], dict[str, float]]:
    """Two-sided p of a paired randomisation test on hit@1, of each run's systems by subset.

    Systems that were measured on other queries than the baseline (as where some were held out to fit a weight) have
    none, and neither have the baseline itself and runs whose ranks are those of another evaluation.

    Args:
        plan: The study.
        results: Of its runs.
    """
    folders = {ZERO_SHOT: plan.zero_shot.storage.evaluation}
    folders |= {run.name: run.recipe.storage.evaluation for run in plan.runs}
    found = {
        name: read_ranks(folder / RANKS_FILE, results.get(name, {}).get("ranks_sha256"))
        for name, folder in folders.items()
    }
    first = found[plan.baseline].get(OWN)
    if first is None:
        return {}
    return {
        (run, system): tested(ranks, first)
        for run, systems in found.items()
        for system, ranks in systems.items()
        if (run, system) != (plan.baseline, OWN) and ranks.keys() == first.keys()
    }


def corrected(
    paired: Mapping[tuple[str, str], Mapping[str, float]],
) -> dict[tuple[str, str], dict[str, float]]:
    """The same, corrected by Holm's rule for the number of systems that are tested on a subset."""
    found: dict[tuple[str, str], dict[str, float]] = {key: {} for key in paired}
    for subset in {name for of in paired.values() for name in of}:
        keys = [key for key, of in paired.items() if subset in of]
        for key, value in zip(keys, holm([paired[key][subset] for key in keys]), strict=True):
            found[key][subset] = value
    return found


def read_ranks(path: Path, sha256: str | None) -> dict[str, Ranks]:
    """Ranks by system; none where an evaluation has written none.

    Args:
        path: Of the file.
        sha256: That it had when the run was measured.
    """
    if sha256 is None or not path.is_file():
        return {}
    if file_sha256(path) != sha256:
        show(
            f"{path} was written by another evaluation, so its run is not tested against the others"
        )
        return {}
    found: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {}
    for row in pq.read_table(path).to_pylist():
        of_system = found.setdefault(row["system"], {})
        of_system[row["query_id"]] = (row["rank"], tuple(row["subsets"]))
    return dict(found)


def tested(ranks: Ranks, baseline: Ranks) -> dict[str, float]:
    """P by subset.

    Args:
        ranks: Of a system.
        baseline: Of the one that it is held against; of the same queries.
    """
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for name, (rank, subsets) in ranks.items():
        for subset in subsets:
            pairs.setdefault(subset, []).append((rank == 1, baseline[name][0] == 1))
    return {subset: _p(np.array(found, np.float64)) for subset, found in pairs.items()}


def _p(hits: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> float:
    return paired_permutation(hits[:, 0], hits[:, 1])
