"""Verification without Ray: vectors, ids, counts, columns and single shards, each held against what must be there."""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.verifying import checks_table, finding_lines
from pipelines.commits import (
    Commit,
    attempt_name,
    errors_name,
    record_name,
    shard_name,
)
from pipelines.corpus import Shard, write_plan
from pipelines.ledger import Ledger
from pipelines.storage import Store, open_store
from pipelines.verification.findings import Finding, Report, first_few
from pipelines.verification.ids import hashes_of, num_passes, occurrences, read_hashes, repeated
from pipelines.verification.records import (
    Records,
    calibration_of,
    check_counts,
    missing_files,
    plan_of,
    read_records,
    stray_files,
)
from pipelines.verification.sample import adapters_by_column, read_canary, spread
from pipelines.verification.shard import Promise, ShardFacts, check_shard
from pipelines.verification.vectors import wrong_vectors
from pipelines.verify import finished_manifest, other_user_columns
from slq.arrow import ERRORS, embedding_schema, vector_column
from slq.errors import ArtifactError
from slq.quantization import Calibration, calibrate, cut, to_bits, to_int8
from tests.faulty_store import faulty_store

DIMENSION = 12
OUTPUTS = ("float16", "int8", "binary")
USER = [pa.field("kind", pa.string())]


def unit_vectors(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return cut(np.random.default_rng(seed).normal(size=(count, DIMENSION)), DIMENSION).astype(
        np.float32
    )


# ---- vectors ----


def forms(count: int = 500) -> tuple[dict[str, Any], Calibration]:
    vectors = unit_vectors(count)
    ranges = calibrate(vectors)
    return {
        "embedding": vectors.astype(np.float16),
        "embedding_int8": to_int8(vectors, ranges),
        "embedding_bits": to_bits(vectors, ranges),
    }, ranges


def wrong_rows(columns: dict[str, Any], ranges: Calibration | None) -> dict[str, list[int]]:
    found = wrong_vectors(columns, ranges)
    return {problem: np.flatnonzero(mask).tolist() for problem, mask in found.items() if mask.any()}


def test_forms_that_were_made_before_rounding_to_float16_are_right() -> None:
    columns, ranges = forms(5000)
    from_stored = columns["embedding"].astype(np.float32)
    assert (to_int8(from_stored, ranges) != columns["embedding_int8"]).any()  # rounding shows
    assert wrong_rows(columns, ranges) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_told_once(value: float) -> None:
    columns, ranges = forms()
    columns["embedding"][7, 3] = value
    assert wrong_rows(columns, ranges) == {"embedding holds values that are not finite": [7]}


@pytest.mark.parametrize(
    ("factor", "is_wrong"), [(1.0, False), (1.001, False), (1.004, True), (0, True)]
)
def test_a_norm_may_leave_one_by_rounding_only(factor: float, is_wrong: bool) -> None:
    columns, ranges = forms()
    columns["embedding"][7] = (unit_vectors(8)[7] * factor).astype(np.float16)
    found = wrong_rows({"embedding": columns["embedding"]}, ranges)
    assert found == ({"embedding has no unit norm": [7]} if is_wrong else {})


def test_another_adapters_vectors_are_looked_at_too() -> None:
    columns, ranges = forms()
    columns["embedding_cats"] = columns["embedding"] * np.float16(2)
    assert list(wrong_rows(columns, ranges)) == ["embedding_cats has no unit norm"]


@pytest.mark.parametrize(("steps", "is_wrong"), [(1, False), (2, True), (-2, True)])
def test_codes_may_be_one_step_off(steps: int, is_wrong: bool) -> None:
    columns, ranges = forms()
    exact = to_int8(columns["embedding"].astype(np.float32), ranges)
    value = int(np.argmin(np.abs(exact[9])))  # far from the ends of the range
    columns["embedding_int8"][9, value] = exact[9, value] + steps
    found = wrong_rows(columns, ranges)
    assert found == ({"embedding_int8 is not what embedding gives": [9]} if is_wrong else {})


def test_bits_may_differ_only_next_to_their_threshold() -> None:
    columns, ranges = forms()
    values = columns["embedding"][4].astype(np.float32)
    near = np.array(ranges.thresholds)
    near[2] = values[2] * (1 + 2**-12)  # nearer than float16 can tell
    for value, is_wrong in ((2, False), (5, True)):
        packed = to_bits(columns["embedding"].astype(np.float32), Calibration(ranges.scale, near))
        packed[4, value // 8] ^= 128 >> value % 8
        found = wrong_rows(
            {"embedding": columns["embedding"], "embedding_bits": packed},
            Calibration(ranges.scale, near),
        )
        assert found == ({"embedding_bits is not what embedding gives": [4]} if is_wrong else {})


# ---- ids ----


def test_hashes_of_all_passes_are_those_of_one() -> None:
    ids = pa.array([f"item {n}" for n in range(1000)] + [None, "ü", ""])
    every = hashes_of(ids, 0, 1)
    parts = [hashes_of(pa.chunked_array([ids]), number, 3) for number in range(3)]
    assert len(every) == 1002
    assert min(len(part) for part in parts) > 200
    assert sorted(np.concatenate(parts)) == sorted(every)
    expected = hashlib.blake2b("ü".encode(), digest_size=8).digest()
    assert every[1000] == np.frombuffer(expected, np.uint64)[0]


def test_repeated_values_are_found_across_and_inside_of_shards() -> None:
    hashes = [np.array(values, np.uint64) for values in ([5, 1, 9], [2**63, 1], [], [7, 7, 7])]
    assert repeated(hashes).tolist() == [1, 7]
    assert repeated([]).tolist() == []


@pytest.mark.parametrize(
    ("ids", "passes"), [(0, 1), (1, 1), (10**8, 1), (10**8 + 1, 2), (10**9, 10)]
)
def test_so_many_ids_take_so_many_passes(ids: int, passes: int) -> None:
    assert num_passes(ids) == passes


# ---- the sample ----


@pytest.mark.parametrize("count", [1, 3, 7, 16, 100])
def test_a_sample_is_spread_over_all_rows(count: int) -> None:
    sizes = {0: 4, 1: 0, 2: 9, 5: 3}
    found = spread({n: commit_of(n, rows) for n, rows in sizes.items()}, count)
    assert 1 not in found
    rows = [(n, position) for n, positions in sorted(found.items()) for position in positions]
    assert len(rows) == len(set(rows)) == min(count, 16)
    assert all(0 <= position < sizes[n] for n, position in rows)
    starts = {0: 0, 2: 4, 5: 13}
    gaps = np.diff([starts[n] + position for n, position in rows])
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_nothing_is_chosen_from_nothing() -> None:
    assert spread({}, 4) == {}
    assert spread({0: commit_of(0, 0)}, 4) == {}
    assert spread({0: commit_of(0, 8)}, 0) == {}


def test_without_any_adapter_a_note_says_what_to_do(tmp_path: Path) -> None:
    manifest = {"fingerprint": "a", "adapter": str(tmp_path / "gone")}
    columns, notes = adapters_by_column(manifest, [])
    assert columns == {}
    assert notes == [
        f"there is no adapter at {tmp_path}/gone, so nothing was embedded anew; give --adapter"
    ]
    with pytest.raises(ArtifactError, match="gone"):
        adapters_by_column(manifest, [tmp_path / "gone"])


# ---- a data set, written by hand ----


def commit_of(shard_id: int, rows: int, **others: Any) -> Commit:
    values = {"quarantined": 0, "sha256": "", "bytes": 0, "attempt": "a", **others}
    return Commit(shard_id=shard_id, rows=rows, **values)


def shard_table(shard_id: int, rows: list[int], ranges: Calibration) -> pa.Table:
    vectors = unit_vectors(len(rows), seed=shard_id)
    columns = {
        "id": [f"item {shard_id}-{row}" for row in rows],
        "embedding": vector_column(vectors.astype(np.float16)),
        "embedding_int8": vector_column(to_int8(vectors, ranges)),
        "embedding_bits": vector_column(to_bits(vectors, ranges)),
        "modality": ["text"] * len(rows),
        "uri": [None] * len(rows),
        "text": ["a fox"] * len(rows),
        "width": [None] * len(rows),
        "height": [None] * len(rows),
        "content_hash": ["0"] * len(rows),
        "shard_id": [shard_id] * len(rows),
        "row_in_shard": rows,
        "kind": ["x"] * len(rows),
    }
    return pa.table(columns, schema=embedding_schema(DIMENSION, USER, outputs=OUTPUTS))


def errors_table(shard_id: int, rows: list[int]) -> pa.Table:
    return pa.table(
        {
            "id": [f"item {shard_id}-{row}" for row in rows],
            "uri": ["x.png"] * len(rows),
            "stage": ["decode"] * len(rows),
            "error": ["unreadable"] * len(rows),
            "message": ["no image"] * len(rows),
            "shard_id": [shard_id] * len(rows),
            "row_in_shard": rows,
        },
        schema=ERRORS,
    )


def as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


RANGES = calibrate(unit_vectors(500))


def put_shard(store: Store, data: pa.Table, errors: pa.Table, shard_id: int = 0) -> Commit:
    """Write the files of a shard and a record that vouches for them as they are."""
    files = {shard_name(shard_id): as_bytes(data)}
    if errors.num_rows:
        files[errors_name(shard_id)] = as_bytes(errors)
    for name, content in files.items():
        store.write(name, content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    commit = commit_of(
        shard_id,
        data.num_rows,
        quarantined=errors.num_rows,
        sha256=hashes[shard_name(shard_id)],
        errors_sha256=hashes.get(errors_name(shard_id)),
    )
    store.write(record_name(shard_id), commit.to_json().encode())
    return commit


def look(store: Store, commit: Commit, chosen: tuple[int, ...] = ()) -> ShardFacts:
    promise = Promise(store.location, 5, DIMENSION, OUTPUTS, (), RANGES.to_json(), 1)
    return check_shard(promise, commit, chosen)


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "disk":
        yield open_store(tmp_path / "embeddings")
    else:
        with faulty_store(share=0) as server:
            yield open_store(f"s3://{server.bucket}/embeddings", retry_s=5)


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    return open_store(tmp_path / "embeddings")


def sound_shard(store: Store, shard_id: int = 0) -> Commit:
    data = shard_table(shard_id, [0, 1, 3, 4], RANGES)
    return put_shard(store, data, errors_table(shard_id, [2, 5]), shard_id)


def test_a_sound_shard_gives_counts_and_the_rows_that_were_asked_for(store: Store) -> None:
    commit = sound_shard(store)
    facts = look(store, commit, chosen=(2,))
    assert facts.findings == []
    assert (facts.files, facts.rows, facts.vectors, facts.ids) == (2, 4, 12, 6)
    assert facts.user_schema == "kind: string"
    (item,) = facts.items
    assert (item.id, item.place, item.text) == ("item 0-3", f"row 3 of {shard_name(0)}", "a fox")
    assert list(item.vectors) == ["embedding"]
    expected = unit_vectors(4)[2].astype(np.float16)
    np.testing.assert_array_equal(item.vectors["embedding"], expected)
    ids = pa.array([f"item 0-{row}" for row in range(6)])
    assert sorted(facts.hashes) == sorted(hashes_of(ids, 0, 1))
    assert sorted(read_hashes(store.location, 5, commit, 0, 1)) == sorted(facts.hashes)
    assert occurrences(store.location, 5, commit, hashes_of(ids[2:4], 0, 1)) == [
        ("item 0-2", errors_name(0), 2),
        ("item 0-3", shard_name(0), 3),
    ]


def test_a_shard_may_be_all_quarantined_and_its_record_older_than_their_hash(disk: Store) -> None:
    empty = shard_table(0, [], RANGES)
    commit = put_shard(disk, empty, errors_table(0, [0, 1]))
    facts = look(disk, commit, chosen=(0,))
    assert (facts.findings, facts.items, facts.rows, facts.ids) == ([], [], 0, 2)
    older = dataclasses.replace(commit, errors_sha256=None)
    assert look(disk, older).findings == []
    assert list(stray_files(disk, Records({0: older}))) == []
    disk.remove(errors_name(0))
    assert [finding.place for finding in look(disk, older).findings] == [errors_name(0)]


Damage = Callable[[Store, Commit], Commit]


def cut_short(name: str) -> Damage:
    def damage(store: Store, commit: Commit) -> Commit:
        store.write(name, store.read(name)[:-20])
        return commit

    return damage


def removed(name: str) -> Damage:
    def damage(store: Store, commit: Commit) -> Commit:
        store.remove(name)
        return commit

    return damage


def rewritten(
    data: Callable[[pa.Table], pa.Table] = lambda table: table,
    errors: Callable[[pa.Table], pa.Table] = lambda table: table,
) -> Damage:
    """Other content under a right record."""

    def damage(store: Store, commit: Commit) -> Commit:
        return put_shard(
            store, data(shard_table(0, [0, 1, 3, 4], RANGES)), errors(errors_table(0, [2, 5]))
        )

    return damage


def with_column(name: str, values: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        position = table.schema.names.index(name)
        return table.set_column(
            position,
            table.schema.field(position),
            pa.array(values, table.schema.field(position).type),
        )

    return change


def nothing_in(store: Store, commit: Commit) -> Commit:
    """No Parquet file, and a record that vouches for it."""
    store.write(shard_name(0), b"PAR1 nonsense")
    return commit_of(
        0,
        4,
        quarantined=2,
        sha256=hashlib.sha256(b"PAR1 nonsense").hexdigest(),
        errors_sha256=commit.errors_sha256,
    )


@pytest.mark.parametrize(
    ("damage", "check", "place", "message"),
    [
        (cut_short(shard_name(0)), "files", shard_name(0), "its sha256 is .* was committed; delete commits/000000"),
        (cut_short(errors_name(0)), "files", errors_name(0), "its sha256 is .* was committed"),
        (removed(shard_name(0)), "files", shard_name(0), "it is gone, though it was committed"),
        (removed(errors_name(0)), "files", errors_name(0), "it is gone"),
        (nothing_in, "files", shard_name(0), "it is no Parquet file that can be read: "),
        (
            rewritten(with_column("shard_id", [0, 0, 8, 0])),
            "rows", shard_name(0), "^shard_id is not 0 in 1 of 4 rows: 8 \\(row 3\\)$",
        ),
        (
            rewritten(errors=with_column("shard_id", [1, 2])),
            "rows", errors_name(0), "^shard_id is not 0 in 2 of 2 rows: 1 \\(row 2\\), 2 \\(row 5\\)",
        ),
        (
            rewritten(with_column("row_in_shard", [0, 3, 1, 4])),
            "rows", shard_name(0), "row_in_shard must rise, but 1 stands behind 3",
        ),
        (
            rewritten(with_column("row_in_shard", [0, 1, 3, 9])),
            "rows", shard_name(0), "rows 0 to 5, .* are not all there once: 4 missing",
        ),
        (
            rewritten(errors=with_column("row_in_shard", [2, 2])),
            "rows", shard_name(0), "are not all there once: 5 missing",
        ),
        (
            rewritten(lambda table: table.drop_columns(["width"])),
            "schema", shard_name(0), "column 7 is height: int32, and must be width: int32; nothing else",
        ),
        (
            rewritten(errors=lambda table: table.drop_columns(["row_in_shard"])),
            "schema", errors_name(0), "column 6 is missing, and must be row_in_shard: int32",
        ),
        (
            rewritten(with_column("embedding", [[0.5] * DIMENSION] * 4)),
            "vectors", shard_name(0),
            r"embedding has no unit norm in 4 of 4 rows: 'item 0-0' \(row 0\), .* 'item 0-3' \(row 3\) and 1 more",
        ),
        (
            rewritten(with_column("embedding_bits", [[0, 0]] * 4)),
            "vectors", shard_name(0), "embedding_bits is not what embedding gives in 4 of 4 rows",
        ),
    ],
)  # fmt: skip
def test_each_damage_is_one_finding(
    disk: Store, damage: Damage, check: str, place: str, message: str
) -> None:
    commit = damage(disk, sound_shard(disk))
    (finding,) = look(disk, commit).findings
    assert (finding.check, finding.place) == (check, place)
    assert re.search(message, finding.message), finding.message


def test_rows_that_were_not_committed_are_counted(disk: Store) -> None:
    commit = sound_shard(disk)
    (finding,) = look(disk, dataclasses.replace(commit, rows=5)).findings
    assert finding == Finding("counts", shard_name(0), "it has 4 rows, but 5 were committed")


def test_a_row_whose_vector_is_wrong_is_not_asked_for_again(disk: Store) -> None:
    vectors = unit_vectors(4)
    vectors[1] *= 2
    damage = rewritten(with_column("embedding", list(vectors.astype(np.float16))))
    facts = look(disk, damage(disk, sound_shard(disk)), chosen=(0, 1, 2))
    assert [item.id for item in facts.items] == ["item 0-0", "item 0-3"]


def test_user_columns_must_be_the_same_everywhere() -> None:
    facts = [ShardFacts(commit_of(n, 1), user_schema="kind: string") for n in range(3)]
    assert other_user_columns(facts) == []
    facts[1].user_schema = "kind: int32"
    facts.append(ShardFacts(commit_of(3, 1)))  # damaged, and told elsewhere
    (finding,) = other_user_columns(facts)
    assert (finding.check, finding.place) == ("schema", shard_name(1))
    assert (
        "the user's columns are (kind: int32), and (kind: string) in most shards" in finding.message
    )


# ---- records, plan, manifest ----


def planned(store: Store, tmp_path: Path, sizes: list[int]) -> None:
    shards = (Shard(n, "a.parquet", 0, rows, state="0" * 16) for n, rows in enumerate(sizes))
    write_plan(shards, tmp_path / "plan.parquet")
    store.upload(tmp_path / "plan.parquet", "plan.parquet")


def counts(store: Store, manifest: dict[str, int], records: Records | None = None) -> list[Finding]:
    plan, findings = plan_of(store)
    assert findings == []
    return list(check_counts(manifest, records or read_records(store), plan))


def whole(**changes: int) -> dict[str, int]:
    return {"num_shards": 2, "num_rows": 8, "num_quarantined": 4, **changes}


@pytest.fixture
def two_shards(disk: Store, tmp_path: Path) -> Store:
    for shard_id in range(2):
        sound_shard(disk, shard_id)
    planned(disk, tmp_path, [6, 6])
    return disk


def test_counts_that_agree_give_no_finding(two_shards: Store) -> None:
    assert counts(two_shards, whole()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": 9}, "num_rows is 9, but the commit records add up to 8; delete manifest.json"),
        ({"num_quarantined": 0}, "num_quarantined is 0, but the commit records add up to 4"),
        (
            {"num_shards": 3},
            "the number of shards is not one: manifest.json has 3, commits/ has 2, plan.parquet has 2; there is no "
            "record of shard 2",
        ),
        ({"num_shards": 1}, "manifest.json has 1, commits/ has 2, plan.parquet has 2"),
    ],
)  # fmt: skip
def test_an_edited_manifest_is_told(
    two_shards: Store, changes: dict[str, int], message: str
) -> None:
    (finding,) = counts(two_shards, whole(**changes))
    assert (finding.check, finding.place) == ("counts", "manifest.json")
    assert message in finding.message


def test_a_record_that_is_gone_is_told_with_its_shard(two_shards: Store) -> None:
    two_shards.remove(record_name(0))
    (finding,) = counts(two_shards, whole())
    assert "commits/ has 1, plan.parquet has 2; there is no record of shard 0" in finding.message


def test_rows_that_were_planned_and_not_committed_are_told(
    two_shards: Store, tmp_path: Path
) -> None:
    planned(two_shards, tmp_path, [6, 7])
    (finding,) = counts(two_shards, whole())
    assert (finding.check, finding.place) == ("counts", "plan.parquet")
    assert "shard 1 (7 planned, 6 committed)" in finding.message


def test_a_damaged_record_is_one_finding_and_the_others_are_read(two_shards: Store) -> None:
    two_shards.write(record_name(1), b'{"shard_id": 1')
    records = read_records(two_shards)
    assert (sorted(records.commits), records.damaged) == ([0], [1])
    (finding,) = records.findings
    assert (finding.check, finding.place) == ("files", "commits/000001.json")
    assert (
        "delete commits/000001*.json, shards/part-000001*.parquet, errors/part-000001*.parquet and manifest.json, "
        "and run `slq embed` again" in finding.message
    )
    assert counts(two_shards, whole(), records) == []
    assert list(stray_files(two_shards, records)) == []


def test_only_the_latest_generation_counts(two_shards: Store) -> None:
    with Ledger(two_shards.location) as ledger:
        data, attempt = as_bytes(shard_table(1, list(range(6)), RANGES)), "b"
        two_shards.write(attempt_name(shard_name(1, 1), attempt), data)
        sha256 = hashlib.sha256(data).hexdigest()
        ledger.commit(commit_of(1, 6, sha256=sha256, attempt=attempt, generation=1))
    records = read_records(two_shards)
    assert records.commits[1].generation == 1
    assert counts(two_shards, whole(num_rows=10, num_quarantined=2), records) == []
    assert look(two_shards, records.commits[1]).findings == []
    strays = [finding.place for finding in stray_files(two_shards, records)]
    assert strays == [shard_name(1), errors_name(1)]


def test_files_that_nobody_committed_are_told(two_shards: Store) -> None:
    for name in (
        "shards/copy.parquet",
        "errors/part-000001.9.parquet",
        "shards/.part-000000.parquet.x",
    ):
        two_shards.write(name, b"")
    found = list(stray_files(two_shards, read_records(two_shards)))
    assert sorted(finding.place for finding in found) == [
        "errors/part-000001.9.parquet", "shards/.part-000000.parquet.x", "shards/copy.parquet",
    ]  # fmt: skip
    assert "no commit record names it" in found[0].message


def test_a_plan_that_is_gone_or_damaged_is_told(two_shards: Store) -> None:
    two_shards.write("plan.parquet", two_shards.read("plan.parquet")[:100])
    plan, (finding,) = plan_of(two_shards)
    assert plan is None
    assert (finding.check, finding.place) == ("files", "plan.parquet")
    two_shards.remove("plan.parquet")
    assert len(plan_of(two_shards)[1]) == 1


def test_a_plan_whose_rows_cannot_be_read_is_told(two_shards: Store) -> None:
    data = two_shards.read("plan.parquet")
    two_shards.write("plan.parquet", data[:4] + bytes(100) + data[104:])
    (finding,) = counts(two_shards, whole())
    assert (finding.check, finding.place) == ("files", "plan.parquet")


def test_what_else_belongs_to_a_data_set_is_missed(disk: Store) -> None:
    found = {finding.place for finding in missing_files(disk, whole())}
    assert found == {"README.md", "canary.parquet"}
    disk.write("README.md", b"")
    assert list(missing_files(disk, whole(num_rows=0))) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it is gone, so int8 and binary vectors mean nothing; embed into another storage.dir"),
        (b"{", "it is damaged: "),
        (json.dumps(calibrate(unit_vectors(9)[:, :4]).to_json()).encode(), "it does not fit the vectors"),
    ],
)  # fmt: skip
def test_ranges_that_cannot_be_used_are_told(
    disk: Store, content: bytes | None, message: str
) -> None:
    if content is not None:
        disk.write("calibration.json", content)
    found, (finding,) = calibration_of(disk, {"outputs": OUTPUTS, "dimension": DIMENSION})
    assert found is None
    assert (finding.check, finding.place) == ("files", "calibration.json")
    assert message in finding.message
    assert calibration_of(disk, {"outputs": ["float16"], "dimension": DIMENSION}) == (None, [])


def test_a_damaged_canary_is_told(disk: Store) -> None:
    assert read_canary(disk) == ([], [])
    disk.write("canary.parquet", b"PAR1")
    items, (finding,) = read_canary(disk)
    assert items == []
    assert (finding.check, finding.place) == ("files", "canary.parquet")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "is no finished embedding data set: it has no manifest.json; run `slq embed` to its end"),
        ({"num_rows": 3, "num_shards": 1}, "has no dimension, fingerprint, num_quarantined and 1 more"),
    ],
)  # fmt: skip
def test_what_is_no_finished_data_set_is_refused(
    disk: Store, manifest: dict[str, int] | None, message: str
) -> None:
    if manifest:
        disk.write("manifest.json", json.dumps(manifest).encode())
    with pytest.raises(ArtifactError, match=message):
        finished_manifest(Ledger(disk.location))


# ---- what is shown ----


def test_few_names_stand_for_many() -> None:
    assert first_few(["a", "b"]) == "a, b"
    assert first_few(list(range(7))) == "0, 1, 2 and 4 more"


def test_the_table_has_a_line_per_check_and_findings_follow() -> None:
    report = Report("x", findings=[Finding("ids", "shards/[1].parquet", "twice")] * 23)
    report.checked["ids"] = 1234
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(checks_table(report))
    text = console.export_text()
    assert "1,234 ids" in text
    assert "23 findings" in text
    assert len(text.strip().splitlines()) == 8
    lines = finding_lines(report.findings)
    console.print(lines[0])
    assert console.export_text().strip() == "ids shards/[1].parquet: twice"
    assert lines[-1] == "and 3 more; --json shows all"
    assert report.to_json()["is_sound"] is False
    assert json.loads(json.dumps(Report("x").to_json()))["is_sound"] is True
