"""Builds a knowledge-aware benchmark, each caption exactly once; the same command again goes on.

Captions are planned into shards. Actors word a shard's captions anew, check and judge them, and lay down its files; the
ledger commits it. At the end people's decisions are read, captions that stand twice go, and the funnel, the benchmark
and the review sheet are written. Only that last part is done anew each time, as decisions may have come.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from pipelines.commits import ERRORS, Commit
from pipelines.failpoints import reach
from pipelines.failures import raise_failure
from pipelines.interruption import stoppable
from pipelines.karr.endpoint import require_key
from pipelines.karr.identity import identity_of
from pipelines.karr.neighbours import embed_images
from pipelines.karr.outcome import assemble
from pipelines.karr.shards import MakeShards, Work, ledger_of
from pipelines.karr.source import (
    PLAN,
    captions,
    captions_path,
    mend_plan,
    planned_rows,
    read_captions,
    write_plan,
)
from pipelines.karr.totals import Totals
from pipelines.ledger import MANIFEST, Ledger
from pipelines.recipe import Recipe
from pipelines.streaming import WHOLE, rows_alone, staying_actors
from pipelines.tasks import cluster_errors, require_actors
from slq.errors import DataError
from slq.karr.lexicon import require_wordnet

log = logging.getLogger(__name__)
REPORT = "report.json"
"""The last run in numbers."""


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `karr` would do, without doing it: captions, shards, and questions to language models.

    Raises:
        ConfigError: The captions are missing.
        DataError: They cannot be used.
    """
    section = recipe.karr
    if captions_path(recipe) is None and not recipe.data.path("queries").exists():
        scenes = recipe.data.scenes
        if scenes is not None:
            usable = total = scenes.test + scenes.unseen
            return {"source": "generated first", **_asked(recipe, total, usable)}
    rows = captions(recipe)
    usable = sum(row["reason"] is None for row in rows)
    found = {"source": str(captions_path(recipe) or recipe.data.path("queries"))}
    return {**found, **_asked(recipe, len(rows), usable), "identify": section.identify.by}


def _asked(recipe: Recipe, total: int, usable: int) -> dict[str, Any]:
    section = recipe.karr
    each = 0 if section.rewriter.kind == "clues" else 2 + section.rewriter.ask_whether_named
    votes = sum(judge.kind in ("endpoint", "local") for judge in section.judges)
    return {
        "captions": total,
        "usable": usable,
        "shards": -(-total // section.shard_rows),
        "rewriter": section.rewriter.model,
        "questions": usable * (each + votes),
        "questions_at_most": usable * (each * section.rewriter.tries + votes),
        "writes": str(recipe.storage.karr),
    }


def karr(recipe: Recipe, *, retry_errors: bool = False) -> dict[str, Any]:
    """Build the recipe's benchmark; running it again finishes what is missing and reads new decisions.

    Args:
        recipe: The resolved recipe.
        retry_errors: Make shards again that hold captions without an answer or a readable image, and only those.

    Returns:
        Where everything is, the funnel, categories, agreement and costs; plain data.

    Raises:
        ArtifactError: An adapter is asked for and missing.
        ArtifactMismatchError: The folder belongs to other captions, models or settings.
        ConfigError: A key, a lexicon or a file is missing, or an endpoint refuses all requests.
        DataError: Too many captions get no answer, or a review file breaks the rules.
        InterruptedRunError: The process was told to stop; committed shards stay.
        StorageError: An input cannot be read, or the output cannot be written.
    """
    _require_models(recipe)
    with stoppable(str(recipe.storage.karr)), ledger_of(recipe) as ledger:
        identity = identity_of(recipe)
        if retry_errors:  # whoever mended an image changed the source
            before = ledger.identity() or identity
            identity |= {
                name: before[name] for name in before if name.endswith(("_sha256", "_state"))
            }
        ledger.begin(identity)
        if not ledger.store.exists(PLAN):
            write_plan(ledger.store, captions(recipe), recipe.karr.shard_rows)
            reach("plan_written")
        elif retry_errors:
            mend_plan(recipe, ledger.store)
        planned, commits = planned_rows(ledger.store), ledger.commits()
        todo = _todo(len(planned), commits, retry_errors=retry_errors)
        again = {one["shard_id"] for one in todo}
        totals = Totals(planned, {n: one for n, one in commits.items() if n not in again})
        totals.require_few_errors(recipe.karr.max_error_share, ledger.store.url(ERRORS))
        if todo:
            ledger.store.remove(MANIFEST)  # it would tell of what is made again
            _make(recipe, ledger, todo, totals, retry_errors=retry_errors)
        _require_planned(planned, ledger.require_complete(len(planned)))
        found = {**assemble(recipe, ledger), "cost": totals.report()}
        ledger.store.write(REPORT, json.dumps(found, indent=2).encode())
        ledger.finish({**(ledger.identity() or {}), "num_shards": len(planned)})
    funnel = found["funnel"]
    log.info("%s: %d rows of %d captions", found["benchmark"], funnel["num_out"], funnel["num_in"])
    return found


def _require_models(recipe: Recipe) -> None:
    """Refuse what no worker could do, before any of them starts.

    Raises:
        ConfigError: A key or a lexicon is missing.
    """
    section = recipe.karr
    endpoints = [section.rewriter.endpoint if section.rewriter.kind == "endpoint" else None]
    endpoints += [judge.endpoint for judge in section.judges if judge.kind == "endpoint"]
    for endpoint in endpoints:
        if endpoint is not None:
            require_key(endpoint)
    if section.wordnet:
        require_wordnet(section.wordnet)


def _todo(
    num_shards: int, commits: Mapping[int, Commit], *, retry_errors: bool
) -> list[dict[str, Any]]:
    """`shard_id` and `generation` of what is to be made, as `MakeShards` takes them."""
    missing = [{"shard_id": n, "generation": None} for n in range(num_shards) if n not in commits]
    again = [
        {"shard_id": shard_id, "generation": commit.generation}
        for shard_id, commit in sorted(commits.items())
        if retry_errors and commit.quarantined
    ]
    return [*missing, *again]


def _make(
    recipe: Recipe,
    ledger: Ledger,
    todo: list[dict[str, Any]],
    totals: Totals,
    *,
    retry_errors: bool,
) -> None:
    """Make shards and commit them.

    Raises:
        DataError: More captions are without an answer already than may be of all.
        SlqError: What ended the run; committed shards stay.
    """
    workers = min(recipe.karr.workers, len(todo))
    require_actors("karr.workers", workers, recipe.resources.gpus_per_worker)
    errors, share = ledger.store.url(ERRORS), recipe.karr.max_error_share
    with cluster_errors():
        if recipe.karr.identify.by != "off":
            embed_images(recipe, read_captions(ledger.store), ledger.store, again=retry_errors)
        rows = iter(_dataset(recipe, todo, workers).iter_rows())
        # Ended here, whatever happens: a flow that still runs while Ray shuts down takes the process with it.
        with closing(rows):
            for row in rows:
                raise_failure(row)
                ledger.commit(Commit(**json.loads(row["commit"])))
                totals.add(Work(**json.loads(row["work"])))
                totals.tell()
                totals.require_few_errors(share, errors)
    totals.tell(now=True)


def _dataset(recipe: Recipe, todo: list[dict[str, Any]], workers: int) -> Any:
    """The flow on Ray Data."""
    gpus = recipe.resources.gpus_per_worker
    return rows_alone(todo).map_batches(
        MakeShards,
        **WHOLE,
        fn_constructor_kwargs={"recipe": recipe, "workers": workers},
        compute=staying_actors(workers, 1),
        num_cpus=0 if gpus else 1,
        num_gpus=gpus or None,
    )


def _require_planned(planned: list[int], commits: Mapping[int, Commit]) -> None:
    """Check that each shard accounts for every planned caption.

    Raises:
        DataError: Captions were lost or came twice; the shard is named.
    """
    for shard_id, wanted in enumerate(planned):
        found = commits[shard_id].rows + commits[shard_id].quarantined
        if found != wanted:
            raise DataError(
                f"shard {shard_id} accounts for {found} captions, but {wanted} were planned; remove the folder and run "
                "`slq karr` again"
            )
