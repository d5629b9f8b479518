"""What a data set says of itself: its commit records, its plan and its manifest, held against one another."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.commits import (
    COMMITS,
    ERRORS,
    SHARDS,
    Commit,
    parse_attempt,
    parse_final,
    parse_record,
    record_name,
)
from pipelines.corpus import Plan, read_plan
from pipelines.embedding.calibration import CALIBRATION
from pipelines.embedding.canary import CANARY
from pipelines.embedding.card import CARD
from pipelines.embedding.flow import PLAN
from pipelines.ledger import MANIFEST
from pipelines.ledger_reader import remake
from pipelines.storage import Store, concurrently
from pipelines.verification.files import committed_files
from pipelines.verification.findings import Finding, first_few
from slq.errors import ArtifactError


@dataclass(slots=True)
class Records:
    """The commit records of a data set.

    Attributes:
        commits: The latest one of each shard, by shard id.
        damaged: Shards whose latest record cannot be read.
        findings: Why not.
    """

    commits: dict[int, Commit] = field(default_factory=dict)
    damaged: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def read_records(store: Store) -> Records:
    """Read all latest commit records; a damaged one is a finding here, where the ledger would end with an error.

    Raises:
        StorageError: The store cannot be read.
    """
    latest: dict[int, int] = {}
    for file in store.files(COMMITS):
        found = parse_record(file.name)
        if found is not None:
            latest[found[0]] = max(found[1], latest.get(found[0], 0))
    shards = sorted(latest.items())
    texts = concurrently(lambda shard: store.read(record_name(*shard)), shards)
    records = Records()
    for (shard_id, generation), text in zip(shards, texts, strict=True):
        try:
            records.commits[shard_id] = Commit.from_json(text.decode(), shard_id, generation)
        except ValueError as error:
            place = record_name(shard_id, generation)
            message = f"is damaged: {error}; {remake(shard_id)}"
            records.damaged.append(shard_id)
            records.findings.append(Finding("files", place, message))
    return records


def stray_files(store: Store, records: Records) -> Iterator[Finding]:
    """Files among shards and quarantined rows that no commit record names.

    Raises:
        StorageError: The store cannot be read.
    """
    known = {name for commit in records.commits.values() for name in committed_files(commit)}
    for folder in (SHARDS, ERRORS):
        for file in store.files(folder):
            shard = parse_final(file.name) or parse_attempt(file.name)
            if file.name not in known and (shard is None or shard[0] not in records.damaged):
                yield Finding(
                    "files",
                    file.name,
                    "no commit record names it, yet readers of the folder would take it in; if no run is at work, "
                    "delete it",
                )


def missing_files(store: Store, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Files beside the shards that a finished data set has, and this one lacks; the plan is left to `plan_of`.

    Raises:
        StorageError: The store cannot be read.
    """
    wanted = {CARD: "it says what the columns are"}
    if manifest["num_rows"]:
        wanted[CANARY] = "no encoder can be checked against these vectors without it"
    for name, why in wanted.items():
        if not store.exists(name):
            yield Finding(
                "files",
                name,
                f"is gone; {why}; delete {MANIFEST} and run `slq embed` again to have it written",
            )


def calibration_of(
    store: Store, manifest: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The ranges of int8 and binary vectors; None where there are none.

    Raises:
        StorageError: The store cannot be read.
    """
    if not {"int8", "binary"} & set(manifest["outputs"]):
        return None, []
    try:
        found: dict[str, Any] = json.loads(store.read(CALIBRATION))
        sound = found["scale"] > 0 and len(found["thresholds"]) == manifest["dimension"]
        problem = "" if sound else "it does not fit the vectors"
    except FileNotFoundError:
        found, problem = {}, "it is gone"
    except (ValueError, TypeError, KeyError) as error:
        found, problem = {}, f"it is damaged: {error}"
    if not problem:
        return found, []
    message = f"{problem}, so int8 and binary vectors mean nothing; embed into another storage.dir"
    return None, [Finding("files", CALIBRATION, message)]


def plan_of(store: Store) -> tuple[Plan | None, list[Finding]]:
    """The plan of the data set; None, and a finding, where it cannot be opened.

    Raises:
        StorageError: The store cannot be read.
    """
    try:
        return read_plan(store, PLAN), []
    except ArtifactError as error:
        return None, [Finding("files", PLAN, str(error))]


def check_counts(
    manifest: Mapping[str, Any], records: Records, plan: Plan | None
) -> Iterator[Finding]:
    """Shards, rows and quarantined rows as manifest, commit records and plan have them; all must agree."""
    known = records.commits.keys() | set(records.damaged)
    shards = {MANIFEST: manifest["num_shards"], f"{COMMITS}/": len(known)}
    if plan is not None:
        shards[PLAN] = len(plan)
    missing = sorted(set(range(manifest["num_shards"])) - known)
    if missing or len(set(shards.values())) > 1:
        told = ", ".join(f"{place} has {count}" for place, count in shards.items())
        lacking = f"; there is no record of shard {first_few(missing)}" if missing else ""
        yield Finding("counts", MANIFEST, f"the number of shards is not one: {told}{lacking}")
    elif not records.damaged:
        yield from _sums(manifest, records.commits)
    if plan is not None:
        yield from _planned_rows(plan, records.commits)


def _sums(manifest: Mapping[str, Any], commits: Mapping[int, Commit]) -> Iterator[Finding]:
    sums = {
        "num_rows": sum(commit.rows for commit in commits.values()),
        "num_quarantined": sum(commit.quarantined for commit in commits.values()),
    }
    for name, found in sums.items():
        if manifest[name] != found:
            yield Finding(
                "counts",
                MANIFEST,
                f"{name} is {manifest[name]}, but the commit records add up to {found}; delete {MANIFEST} and run "
                "`slq embed` again to have it written anew",
            )


def _planned_rows(plan: Plan, commits: Mapping[int, Commit]) -> Iterator[Finding]:
    """Read as a stream: the plan of an image folder holds the name of every image."""
    odd = []
    try:
        for shard in plan:
            commit, rows = commits.get(shard.shard_id), shard.num_rows
            found = rows if commit is None else commit.rows + commit.quarantined
            if rows is not None and rows != found:
                odd.append(f"shard {shard.shard_id} ({rows} planned, {found} committed)")
    except ArtifactError as error:
        yield Finding("files", PLAN, str(error))
    if odd:
        yield Finding("counts", PLAN, f"rows were lost, or came twice: {first_few(odd)}")
