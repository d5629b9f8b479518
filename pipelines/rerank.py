"""Re-ranks a whole run with the fine stage, each pair exactly once; the same command again goes on.

The plan says which pairs are which shard, those of one image together. Actors read a shard's images, score its pairs
and lay down its files, the ledger commits it, and at the end the scored pairs are put in order. See
`pipelines.reranking` for the parts.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.commits import ERRORS, Commit
from pipelines.failpoints import reach
from pipelines.failures import raise_failure
from pipelines.interruption import stoppable
from pipelines.journal import start_journal
from pipelines.ledger import MANIFEST, Ledger
from pipelines.loading import reranking_backbone, scorer_digest, scorer_of
from pipelines.recipe import Recipe, require_files
from pipelines.reranking.catalogue import Catalogue
from pipelines.reranking.flow import MODELS, Flow
from pipelines.reranking.outcome import assemble
from pipelines.reranking.plan import (
    PLAN,
    chosen,
    pairs_of,
    planned_rows,
    summarise,
    write_plan,
)
from pipelines.reranking.score import ScorePairs, Work, scoring_threads
from pipelines.reranking.totals import Totals
from pipelines.runs import read_run
from pipelines.streaming import WHOLE, rows_alone, staying_actors
from pipelines.tasks import cluster_errors, require_actors
from slq.errors import DataError
from slq.files import file_sha256

log = logging.getLogger(__name__)
REPORT = "report.json"
"""The last run in numbers."""
_PLANNING = ("depth", "adaptive", "shard_pairs", "batch_size", "deterministic")
"""Settings of `rerank`, on which the plan or the last bits depend."""


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `rerank` would do, without doing it.

    Raises:
        ConfigError: The run is missing.
        DataError: It cannot be read.
    """
    section = recipe.rerank
    run = read_run(run_path(recipe))
    rows = chosen(run, section.depth, section.adaptive)
    return {
        "run": str(run_path(recipe)),
        "queries": len(pc.unique(run["query_id"])),
        "candidates": run.num_rows,
        "pairs": len(rows),
        "shards": -(-len(rows) // section.shard_pairs),
        "writes": recipe.storage.reranking,
    }


def run_path(recipe: Recipe) -> Path:
    """The run to re-rank."""
    return recipe.rerank.run or recipe.storage.evaluation / "run_slq.parquet"


def rerank(recipe: Recipe, *, retry_errors: bool = False, models: str = MODELS) -> dict[str, Any]:
    """Re-rank the recipe's run; running it again finishes what is missing and touches nothing that is done.

    Args:
        recipe: The resolved recipe.
        retry_errors: Score committed shards again that hold pairs which could not be scored, and only those; files of
            items may have been mended since.
        models: The module that gives the model.

    Returns:
        Where everything is, counts, costs and, where relevance is there, what the fine stage gained.

    Raises:
        ArtifactMismatchError: The folder belongs to another run, model or question.
        ConfigError: The cluster could not run the flow.
        DataError: More than `rerank.max_error_share` of the pairs cannot be scored, or the run is malformed.
        InterruptedRunError: The process was told to stop; committed shards stay.
        StorageError: An input cannot be read, or the output cannot be written.
    """
    require_files(recipe, "queries")
    path = run_path(recipe)
    run = read_run(path)
    scorer = scorer_digest(scorer_of(recipe, reranking_backbone(recipe, weights=False)))
    flow = Flow(recipe=recipe, scorer=scorer, models=models)
    with stoppable(recipe.storage.reranking), flow.ledger() as ledger:
        catalogue = Catalogue(recipe)
        identity = identity_of(recipe, scorer, path, catalogue)
        if retry_errors:  # whoever mended a file changed what items are looked up in
            before = ledger.identity() or identity
            identity["items"], identity["queries"] = before.get("items"), before.get("queries")
        ledger.begin(identity)
        if not ledger.store.exists(PLAN):
            _make_plan(recipe, ledger, run, catalogue)
        planned = planned_rows(ledger.store)
        commits = ledger.commits()
        todo = _todo(len(planned), commits, retry_errors=retry_errors)
        workers = min(recipe.resources.rerank_workers, max(1, len(todo)))
        again = {one["shard_id"] for one in todo}
        kept = {n: commit for n, commit in commits.items() if n not in again}
        totals = Totals(planned, kept, workers)
        totals.require_few_bad(recipe.rerank.max_error_share, ledger.store.url(ERRORS))
        if todo:
            require_actors("resources.rerank_workers", workers, recipe.resources.gpus_per_worker)
            ledger.store.remove(MANIFEST)  # it would tell of what is made again
            with cluster_errors():
                _score(flow, ledger, todo, totals)
            totals.tell(now=True)
        _require_planned(planned, ledger.require_complete(len(planned)))
        found = assemble(recipe, ledger, scorer)
        found = {"folder": ledger.store.location, **found, "cost": totals.report()}
        ledger.store.write(REPORT, json.dumps(found, indent=2).encode())
        ledger.finish({**(ledger.identity() or {}), "num_shards": len(planned)})
    log.info(
        "%s: %d pairs scored, %d could not be; %.1f pairs/s",
        ledger.store.location,
        found["scored"],
        found["unscored"],
        totals.pairs_per_s,
    )
    return found


def _todo(
    num_shards: int, commits: Mapping[int, Commit], *, retry_errors: bool
) -> list[dict[str, Any]]:
    """`shard_id` and `generation` of what is to be scored, as `ScorePairs` takes them."""
    missing = [{"shard_id": n, "generation": None} for n in range(num_shards) if n not in commits]
    again = [
        {"shard_id": shard_id, "generation": commit.generation}
        for shard_id, commit in sorted(commits.items())
        if retry_errors and commit.quarantined
    ]
    return [*missing, *again]


def identity_of(recipe: Recipe, scorer: str, path: Path, catalogue: Catalogue) -> dict[str, Any]:
    """What the output depends on: the run, its items and queries, the model, and settings."""
    section = recipe.rerank.model_dump(mode="json")
    return {
        "made_by": "slq rerank",
        "run_sha256": file_sha256(path),
        "items": catalogue.items_state(),
        "queries": catalogue.queries_state(),
        "scorer": scorer,
        "num_threads": recipe.embed.num_threads,
        **{name: section[name] for name in _PLANNING},
    }


def _make_plan(recipe: Recipe, ledger: Ledger, run: pa.Table, catalogue: Catalogue) -> None:
    """Plan the pairs, and refuse at once what could not end well.

    Raises:
        DataError: More items or queries are not to be had than may be.
    """
    section = recipe.rerank
    rows = chosen(run, section.depth, section.adaptive)
    wanted = pc.unique(run["item_id"].take(rows))
    pairs = pairs_of(run, rows, catalogue.queries(), catalogue.items(wanted))
    bad = pairs.filter(pc.is_valid(pairs["problem"])).slice(0, 1).to_pylist()
    if bad and pairs["problem"].null_count < (1 - section.max_error_share) * pairs.num_rows:
        count = pairs.num_rows - pairs["problem"].null_count
        raise DataError(
            f"{count} of {pairs.num_rows} pairs cannot be scored, more than rerank.max_error_share allows "
            f"({section.max_error_share:.1%}): {bad[0]['query_id']}, {bad[0]['item_id']}: {bad[0]['problem']}; is the "
            "run of these queries and items?"
        )
    write_plan(ledger.store, run, pairs, section.shard_pairs)
    log.info("plan: %s", asdict(summarise(run, pairs, section.shard_pairs)))
    reach("plan_written")


def _score(flow: Flow, ledger: Ledger, todo: list[dict[str, Any]], totals: Totals) -> None:
    """Score shards and commit them.

    Raises:
        DataError: More pairs cannot be scored already than may be of all.
        SlqError: What ended the run; committed shards stay.
    """
    flow = replace(flow, journal=start_journal())
    errors, share = ledger.store.url(ERRORS), flow.recipe.rerank.max_error_share
    rows = iter(dataset(flow, todo, totals.workers).iter_rows())
    # Ended here, whatever happens: a flow that still runs while Ray shuts down takes the process with it, silently.
    with closing(rows):
        for row in rows:
            raise_failure(row)
            commit = Commit(**json.loads(row["commit"]))
            ledger.commit(commit)
            totals.add(commit, Work(**json.loads(row["work"])))
            totals.tell()
            totals.require_few_bad(share, errors)


def dataset(flow: Flow, todo: list[dict[str, Any]], workers: int) -> Any:
    """The flow on Ray Data."""
    gpus = flow.recipe.resources.gpus_per_worker
    return rows_alone(todo).map_batches(
        ScorePairs,
        **WHOLE,
        fn_constructor_kwargs={"flow": flow},
        compute=staying_actors(workers, scoring_threads(gpus)),
        num_cpus=0 if gpus else 1,
        num_gpus=gpus or None,
    )


def _require_planned(planned: list[int], commits: Mapping[int, Commit]) -> None:
    """Check that each shard accounts for every planned pair.

    Raises:
        DataError: Pairs were lost or came twice; the shard is named.
    """
    for shard_id, wanted in enumerate(planned):
        found = commits[shard_id].rows + commits[shard_id].quarantined
        if found != wanted:
            raise DataError(
                f"shard {shard_id} accounts for {found} pairs, but {wanted} were planned; remove the folder and run "
                "`slq rerank` again"
            )
