"""Offline embedding of a corpus into Parquet shards, each row exactly once; the same command again goes on.

The plan says which rows are which shard. Workers read, encode and write in pieces of a bounded size, a shard is sealed
when its pieces are there, and the ledger commits it. See `pipelines.embedding` for the stages.
"""

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.commits import ERRORS, Commit
from pipelines.corpus import (
    Corpus,
    Plan,
    corpus_changed,
    corpus_of,
    read_plan,
    require_same_plan,
    rows_changed,
    write_plan,
)
from pipelines.embedding.calibration import CALIBRATION, measured_ranges, sample_shards
from pipelines.embedding.canary import write_canary
from pipelines.embedding.card import CARD, card
from pipelines.embedding.costs import with_estimate
from pipelines.embedding.driver import run
from pipelines.embedding.flow import MODELS, PLAN, Flow
from pipelines.embedding.models import adapter_configs, new_flow, stored_dimension
from pipelines.embedding.preflight import require_room, workers_for
from pipelines.embedding.shortage import shortage_told
from pipelines.embedding.totals import Totals, too_many_bad
from pipelines.failpoints import reach
from pipelines.failures import FAILURE, raise_failure
from pipelines.interruption import stoppable
from pipelines.ledger import MANIFEST, Ledger
from pipelines.recipe import Recipe
from pipelines.tasks import cluster_errors, model_task
from slq.artifacts import AdapterConfig

log = logging.getLogger(__name__)
REPORT = "report.json"
"""The last run in numbers."""
_SETTINGS = (  # of `embed`, on which the content depends
    "shard_rows",
    "batch_size",
    "batch_tokens",
    "piece_rows",
    "piece_bytes",
    "outputs",
    "deterministic",
)


def embed(recipe: Recipe, *, retry_errors: bool = False, models: str = MODELS) -> str:
    """Embed the recipe's corpus; running it again finishes what is missing and touches nothing that is done.

    Args:
        recipe: The resolved recipe.
        retry_errors: Read the quarantined rows again, and only those, of shards that are committed.
        models: The module that gives the models.

    Returns:
        Where the embedding data set is.

    Raises:
        ArtifactMismatchError: The folder belongs to another adapter, corpus or plan.
        ConfigError: The cluster could not run the flow: Ray Data would stall without a word.
        DataError: More than `embed.max_error_share` of the items were quarantined, or the corpus changed.
        InterruptedRunError: The process was told to stop; committed shards stay.
        StorageError: The corpus cannot be read, or the output cannot be written.
    """
    configs = adapter_configs(recipe)
    corpus = corpus_of(recipe)
    with (
        stoppable(recipe.storage.embeddings),
        Ledger(recipe.storage.embeddings, recipe.storage.retry_s) as ledger,
    ):
        digest = corpus.digest()
        identity = identity_of(recipe, configs, digest)
        if retry_errors:  # whoever mended a file changed the corpus
            identity["corpus_digest"] = _digest_of(ledger, digest)
        _require_same_files(ledger, corpus, identity)
        ledger.begin(identity)
        plan = planned(ledger, corpus, recipe.embed.shard_rows, identity["corpus_digest"])
        todo = _quarantined(ledger) if retry_errors else _missing(ledger, len(plan))
        if not todo and ledger.manifest() is not None:
            log.info("%s is complete: %d shards, nothing to do", ledger.store.location, len(plan))
            return ledger.store.location
        if todo:
            if retry_errors:
                ledger.store.remove(MANIFEST)  # it would count wrongly until the end
            _run(recipe, ledger, plan, todo, configs, models)
        if not retry_errors:
            require_same_plan(corpus, plan)
        commits = ledger.require_complete(len(plan))
        require_planned_rows(plan, commits)
        _finish(recipe, ledger, commits, identity)
    return ledger.store.location


def identity_of(recipe: Recipe, configs: list[AdapterConfig], corpus_digest: str) -> dict[str, Any]:
    """What the content of a data set depends on: input, plan, adapters and settings of the output."""
    section = recipe.embed.model_dump(mode="json")
    others = dict(zip(recipe.embed.adapters, [one.fingerprint for one in configs[1:]], strict=True))
    return {
        "fingerprint": configs[0].fingerprint,
        "corpus": recipe.data.corpus_location,
        "corpus_format": recipe.data.corpus_format,
        "columns": dict(recipe.data.columns),
        "corpus_digest": corpus_digest,
        "dimension": stored_dimension(recipe, configs[0].hidden_size),
        **({"adapters": others} if others else {}),
        **{name: section[name] for name in _SETTINGS},
    }


def _digest_of(ledger: Ledger, digest: str) -> str:
    """The digest of the corpus that a data set was begun with; of the corpus as it is where none was begun."""
    before = ledger.identity()
    return digest if before is None else str(before["corpus_digest"])


def _require_same_files(ledger: Ledger, corpus: Corpus, identity: dict[str, Any]) -> None:
    """Where nothing but the corpus is another one, name the file that is, which its digest cannot.

    Raises:
        DataError: The file was added, removed or written to since the data set was begun.
    """
    before = ledger.identity()
    if before is None or before.get("corpus_digest") == identity["corpus_digest"]:
        return
    is_same_run = before == {**identity, "corpus_digest": before.get("corpus_digest")}
    if is_same_run and ledger.store.exists(PLAN):
        require_same_plan(corpus, read_plan(ledger.store, PLAN))


def planned(ledger: Ledger, corpus: Corpus, shard_rows: int, digest: str) -> Plan:
    """The plan of the data set; made and stored by the first run.

    Raises:
        DataError: The corpus has another digest than it had when the run began.
    """
    if not ledger.store.exists(PLAN):
        with tempfile.TemporaryDirectory(prefix="slq-plan-") as folder:
            file = Path(folder) / PLAN
            summary = write_plan(corpus.shards(shard_rows), file)
            if corpus.digest() != digest:
                raise corpus_changed("files came, went or were written to meanwhile")
            ledger.store.upload(file, PLAN)
        rows = "an unknown number of" if summary.num_rows is None else f"{summary.num_rows:,}"
        log.info("%s: %s rows in %d shards", corpus.location, rows, summary.num_shards)
        reach("plan_written")
    return read_plan(ledger.store, PLAN)


def _missing(ledger: Ledger, num_shards: int) -> list[dict[str, Any]]:
    done = ledger.commits()
    return [{"shard_id": n, "generation": None} for n in range(num_shards) if n not in done]


def _quarantined(ledger: Ledger) -> list[dict[str, Any]]:
    """Committed shards with quarantined rows."""
    return [
        {"shard_id": shard_id, "generation": commit.generation}
        for shard_id, commit in ledger.commits().items()
        if commit.quarantined
    ]


def _run(
    recipe: Recipe,
    ledger: Ledger,
    plan: Plan,
    todo: list[dict[str, Any]],
    configs: list[AdapterConfig],
    models: str,
) -> None:
    """Measure ranges if they are asked for, then embed the shards."""
    import ray

    workers = workers_for(recipe, plan.summary.num_rows, len(todo))
    resources = recipe.resources.model_copy(update={"embed_workers": workers})
    recipe = recipe.model_copy(update={"resources": resources})
    require_room(recipe, ray.cluster_resources(), len(ray.nodes()))
    flow = new_flow(recipe, configs, models)
    if {"int8", "binary"} & set(recipe.embed.outputs):
        flow = _with_ranges(flow, ledger, len(plan))
    totals = Totals(len(plan), plan.summary.num_rows, ledger.commits(), workers)
    with shortage_told(recipe, ray.cluster_resources):
        run(flow, ledger, todo, totals)
    output_bytes = sum(commit.bytes for commit in ledger.commits().values())
    report = with_estimate(totals.report(), recipe, configs[0].fingerprint, output_bytes)
    ledger.store.write(REPORT, json.dumps(report, indent=2).encode())
    log.info(
        "embedded %d rows at %.1f rows/s; encoders were busy for %.0f%% of the time, %.1f%% of tokens were padding",
        totals.rows,
        totals.rows_per_s,
        100 * totals.busy_share,
        100 * totals.padding_share,
    )


def _with_ranges(flow: Flow, ledger: Ledger, num_shards: int) -> Flow:
    """The flow with the ranges of the data set, measured by the first run."""
    import ray

    if not ledger.store.exists(CALIBRATION):
        log.info("measuring ranges on %d items", flow.recipe.embed.calibration_rows)
        task = model_task(measured_ranges, flow.recipe.resources.gpus_per_worker)
        with cluster_errors():
            found = ray.get(task.remote(flow, sample_shards(num_shards)))
        if isinstance(found, str):
            raise_failure({FAILURE: found})
        ledger.store.create(CALIBRATION, json.dumps(found).encode())  # two drivers: the first one's
    return replace(flow, calibration=json.loads(ledger.store.read(CALIBRATION)))


def require_planned_rows(plan: Plan, commits: Mapping[int, Commit]) -> None:
    """Check that each shard accounts for every planned row.

    Raises:
        DataError: Rows were lost or came twice; the shard is named.
    """
    for shard in plan:
        commit = commits[shard.shard_id]
        found = commit.rows + commit.quarantined
        if shard.num_rows is not None and found != shard.num_rows:
            raise rows_changed(shard, found)


def _finish(
    recipe: Recipe, ledger: Ledger, commits: Mapping[int, Commit], identity: dict[str, Any]
) -> None:
    """Judge the share of quarantined items, then write canary, card and manifest."""
    rows = sum(commit.rows for commit in commits.values())
    bad = sum(commit.quarantined for commit in commits.values())
    errors, max_share = ledger.store.url(ERRORS), recipe.embed.max_error_share
    if bad > max_share * (rows + bad):
        raise too_many_bad(bad, rows + bad, max_share, errors)
    write_canary(ledger, commits)
    counts = {"num_shards": len(commits), "num_rows": rows, "num_quarantined": bad}
    manifest = {**identity, **counts, "adapter": str(recipe.storage.adapter)}
    ledger.store.write(CARD, card(manifest).encode())
    ledger.finish(manifest)
    log.info(
        "%s: %d rows in %d shards, %d quarantined", ledger.store.location, rows, len(commits), bad
    )
    if bad:
        log.info("quarantined items are in %s; --retry-errors reads them again", errors)
