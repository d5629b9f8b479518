"""Checks a finished embedding data set from the outside, and tells everything that is wrong instead of the first.

Nothing is taken from the run that made it but what it left: hashes, counts and ids are compared with one another, and
a sample is embedded anew. Nothing is changed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.commits import shard_name
from pipelines.ledger import MANIFEST, Ledger
from pipelines.storage import RETRY_S, Store
from pipelines.tasks import collect, model_task
from pipelines.verification.findings import CHECKS, Finding, Report, first_few
from pipelines.verification.ids import find_duplicates, num_passes
from pipelines.verification.items import StoredItem
from pipelines.verification.records import (
    Records,
    calibration_of,
    check_counts,
    missing_files,
    plan_of,
    read_records,
    stray_files,
)
from pipelines.verification.sample import adapters_by_column, embed_anew, read_canary, spread
from pipelines.verification.shard import Promise, ShardFacts, check_shard
from slq.errors import ArtifactError

_NEEDED = ("dimension", "fingerprint", "num_quarantined", "num_rows", "num_shards", "outputs")


def verify(
    location: str | Path,
    *,
    adapters: Sequence[Path] = (),
    sample: int = 32,
    device: str = "cpu",
    retry_s: float = RETRY_S,
) -> Report:
    """Check a finished data set. Runs inside Ray, one task per shard; every shard is read once.

    Args:
        location: The data set: a folder or `scheme://bucket/prefix`.
        adapters: Folders of the adapters that made it, told apart by their fingerprints; by default the one that its
            manifest names, if that is still there.
        sample: Items besides the canary that are embedded anew, if their inputs can still be read; with 0 nothing is
            embedded, not even the canary.
        device: On which they are embedded: `cpu` or `cuda`.
        retry_s: How long failures of an object store are tried again.

    Raises:
        ArtifactError: There is no finished data set, or no adapter in a folder.
        ArtifactMismatchError: An adapter is not one of those that made the data set.
        StorageError: A store cannot be reached.
    """
    ledger = Ledger(location, retry_s)
    manifest = finished_manifest(ledger)
    report = Report(ledger.store.location)
    folders: dict[str, Path] = {}
    if sample:
        folders, report.notes = adapters_by_column(manifest, adapters)
    records = read_records(ledger.store)
    calibration, findings = calibration_of(ledger.store, manifest)
    report.findings += [*records.findings, *findings]
    _check_records(report, ledger.store, manifest, records)
    promise = Promise(
        location=ledger.store.location,
        retry_s=retry_s,
        dimension=manifest["dimension"],
        outputs=tuple(manifest["outputs"]),
        adapters=tuple(manifest.get("adapters", {})),
        calibration=calibration,
        passes=num_passes(sum(one.rows + one.quarantined for one in records.commits.values())),
    )
    chosen = spread(records.commits, sample if folders else 0)
    items = _check_shards(report, promise, records, chosen)
    canary, findings = read_canary(ledger.store)
    report.findings += findings
    if folders:
        _embed_anew(report, [*canary, *items], folders, promise.dimension, device)
    report.findings.sort(key=lambda finding: CHECKS.index(finding.check))
    return report


def finished_manifest(ledger: Ledger) -> dict[str, Any]:
    """The manifest of a finished data set.

    Raises:
        ArtifactError: There is none, or it is no manifest of embeddings.
    """
    manifest = ledger.manifest()
    where = ledger.store.location
    if manifest is None:
        raise ArtifactError(
            f"{where} is no finished embedding data set: it has no {MANIFEST}; run `slq embed` to its end first"
        )
    lacking = [name for name in _NEEDED if name not in manifest]
    if lacking:
        raise ArtifactError(
            f"{ledger.store.url(MANIFEST)} has no {first_few(lacking)}; delete it and run `slq embed` again"
        )
    return manifest


def _check_records(
    report: Report, store: Store, manifest: Mapping[str, Any], records: Records
) -> None:
    plan, findings = plan_of(store)
    report.findings += [
        *findings,
        *missing_files(store, manifest),
        *stray_files(store, records),
        *check_counts(manifest, records, plan),
    ]
    report.checked["counts"] = len(records.commits)


def _check_shards(
    report: Report, promise: Promise, records: Records, chosen: Mapping[int, list[int]]
) -> list[StoredItem]:
    """Look at every shard in a task of its own, then at what only all of them together tell.

    Returns:
        The chosen rows, by shard id and position.
    """
    import ray

    task = ray.remote(check_shard)
    tasks = [
        task.remote(promise, commit, chosen.get(shard_id, []))
        for shard_id, commit in sorted(records.commits.items())
    ]
    facts: list[ShardFacts] = collect(tasks, "verify shard")
    for one in facts:
        report.findings += one.findings
    report.findings += other_user_columns(facts)
    whole = [one for one in facts if one.is_whole]
    report.findings += find_duplicates(
        promise.location,
        promise.retry_s,
        [one.commit for one in whole],
        [one.hashes for one in whole],
        promise.passes,
    )
    sums = {
        "files": sum(one.files for one in facts),
        "schema": sum(one.user_schema is not None for one in facts),
        "rows": sum(one.rows for one in facts),
        "vectors": sum(one.vectors for one in facts),
        "ids": sum(one.ids for one in facts),
    }
    report.checked |= sums
    return [item for one in facts for item in one.items]


def other_user_columns(facts: Sequence[ShardFacts]) -> list[Finding]:
    """Shards whose user columns are not those that most shards have."""
    known = [(one.commit, one.user_schema) for one in facts if one.user_schema is not None]
    counts = Counter(schema for _, schema in known)
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    return [
        Finding(
            "schema",
            shard_name(commit.shard_id, commit.generation),
            f"the user's columns are ({schema}), and ({usual}) in most shards; readers of the whole folder would fail",
        )
        for commit, schema in known
        if schema != usual
    ]


def _embed_anew(
    report: Report,
    items: Sequence[StoredItem],
    folders: Mapping[str, Path],
    dimension: int,
    device: str,
) -> None:
    if not items:
        report.notes.append("nothing was embedded anew: no item could be read")
        return
    task = model_task(embed_anew, 1 if device.startswith("cuda") else 0)
    (anew,) = collect([task.remote(items, folders, dimension, device)], "verify sample")
    report.checked["embedding"] = anew.count
    report.findings += anew.findings
    report.notes += anew.notes
    report.largest_difference = anew.largest_difference
