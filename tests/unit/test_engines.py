"""Handing over to other engines: written once, replaced whole, refused where something else is."""

import json
import logging
import os
import subprocess
import sys
from contextlib import ExitStack
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slq.arrow import vector_column
from slq.engines import SEARCH_ENGINES, Collection, engine
from slq.engines.base import Mark
from slq.engines.milvus import Milvus, MilvusIndex
from slq.engines.qdrant import Qdrant, QdrantIndex
from slq.errors import ArtifactError, ConfigError, DataError, StorageError
from tests.unit.engine_data import collection, place, written
from tests.unit.index_data import COUNT, DIMENSION, stored, table, unit_vectors

QUERIES = unit_vectors(20, seed=1)
SEARCHED = list(SEARCH_ENGINES)
LIVE = ["milvus", "qdrant"]


def rows_in(there: Any) -> dict[str, dict[str, Any]]:
    """All that can be found, by id."""
    with there.open() as index:
        (hits,) = index.search(QUERIES[:1], 10**6)
        rows = {hit.id: row for hit, row in zip(hits, index.columns_of(hits), strict=True)}
        assert len(rows) == len(hits) == len(index)
        return rows


def files_of(there: Any) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(there.target).rglob("*.lance")}


@pytest.mark.parametrize("kind", SEARCHED)
def test_what_is_there_already_is_known_and_another_state_replaces_it(
    tmp_path: Path, kind: str
) -> None:
    there = place(kind, tmp_path)
    assert there.mark() is None
    assert not there.holds("3f2a", DIMENSION, "state-1")
    list(there.write(collection(table(100))))
    assert there.holds("3f2a", DIMENSION, "state-1")
    assert not there.holds("3f2a", DIMENSION, "state-2")
    with there.open() as index:
        old = index.version
    later = table(250, first=50)  # some rows are gone, some replaced, some new
    list(there.write(collection(later, source="state-2")))
    assert list(rows_in(there).values()) != []
    assert rows_in(there) == {
        row["id"]: row for row in later.drop_columns(["embedding"]).to_pylist()
    }
    with there.open() as index:
        assert index.version != old
        np.testing.assert_allclose(index.vectors_of(["item-60"]), stored(250)[10:11], atol=1e-6)
    assert there.mark().source == "state-2"
    assert [*there.write(collection(later, source="state-2"))][-1] == 250  # the same again
    assert len(rows_in(there)) == 250


def test_an_older_version_of_a_table_stays_open_and_can_be_opened_anew(tmp_path: Path) -> None:
    there = written("lance", tmp_path)
    with there.open() as old:
        list(there.write(collection(table(50), source="state-2")))
        assert len(old) == COUNT == len(old.search(QUERIES[:1], COUNT)[0])
        with there.open(old.version) as again:
            assert (again.version, len(again)) == (old.version, COUNT)
    with there.open() as now:
        assert len(now) == 50
    with pytest.raises(ArtifactError, match=r"corpus\.lance has no version 99 any more"):
        there.open("99")
    with pytest.raises(ArtifactError, match="and state-1 is asked for"):
        there.open("state-1")  # of another engine


def test_a_table_may_lie_in_an_object_store(
    object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")  # the store of this machine has no certificate
    there: Any = engine("lance", f"s3://{object_store}/tables", "corpus")
    assert there.mark() is None
    list(there.write(collection(table(60))))
    list(there.write(collection(table(50), source="state-2")))
    assert there.holds("3f2a", DIMENSION, "state-2")
    assert rows_in(there).keys() == {f"item-{n}" for n in range(50)}


@pytest.mark.parametrize("kind", LIVE)
def test_a_collection_has_one_version_and_another_one_is_refused(tmp_path: Path, kind: str) -> None:
    there = written(kind, tmp_path)
    with there.open("state-1") as index:
        assert index.version == "state-1"
    with pytest.raises(ArtifactError, match="is at version state-1 now, and state-0 is asked for"):
        there.open("state-0")


@pytest.mark.parametrize("kind", SEARCHED)
def test_another_embedding_space_is_refused_and_both_are_named(tmp_path: Path, kind: str) -> None:
    there = written(kind, tmp_path)
    message = rf"{there.name}.* is of fingerprint 3f2a .*not of 91bc with 32; choose another name"
    with pytest.raises(ConfigError, match=message):
        there.holds("91bc", DIMENSION, "state-1")
    with pytest.raises(ConfigError, match=message):
        list(there.write(collection(fingerprint="91bc")))
    with pytest.raises(ConfigError, match="with 32 values a vector, not of 3f2a with 16"):
        there.holds("3f2a", 16, "state-1")
    assert len(rows_in(there)) == COUNT


@pytest.mark.parametrize("kind", LIVE)
def test_a_collection_that_is_half_written_cannot_be_opened_but_finished(
    tmp_path: Path, kind: str
) -> None:
    there = place(kind, tmp_path)
    writing = there.write(collection())
    next(writing)
    writing.close()  # what a killed process leaves
    assert not there.holds("3f2a", DIMENSION, "state-1")
    with pytest.raises(ArtifactError, match="is being written, or its writing was ended; run `slq"):
        there.open()
    list(there.write(collection()))
    assert len(rows_in(there)) == COUNT


@pytest.mark.parametrize("kind", LIVE)
def test_rows_that_others_wrote_stay(tmp_path: Path, kind: str) -> None:
    there = written(kind, tmp_path, table(20))
    vector = unit_vectors(1, seed=9)[0].tolist()
    with there.connection() as client:
        if kind == "milvus":
            client.upsert("corpus", [{"id": "theirs", "embedding": vector, "text": "new"}])
        else:
            from qdrant_client.models import PointStruct

            payload = {"id": "theirs", "text": "new"}
            client.upsert("corpus", [PointStruct(id=7, vector=vector, payload=payload)])
    list(there.write(collection(table(10), source="state-2")))
    found = rows_in(there)
    assert found.keys() == {"theirs", *(f"item-{n}" for n in range(10))}
    assert found["theirs"] == {"id": "theirs", "text": "new", "price": None, "content_hash": None}


def test_what_others_made_is_neither_opened_nor_overwritten(tmp_path: Path) -> None:
    import lance

    lance.write_dataset(table(3), f"{tmp_path}/lance/corpus.lance")
    with Milvus(f"{tmp_path}/milvus.db", "x").connection() as client:
        client.create_collection("corpus", dimension=DIMENSION, id_type="string", max_length=64)
    with Qdrant(f"{tmp_path}/qdrant", "x").connection() as client:
        from qdrant_client.models import Distance, PointStruct, VectorParams

        client.create_collection(
            "corpus", vectors_config=VectorParams(size=2, distance=Distance.DOT)
        )
        client.upsert("corpus", [PointStruct(id=1, vector=[1.0, 2.0])])
    for kind in SEARCHED:
        there = place(kind, tmp_path)
        for refused in (there.open, there.mark, lambda: list(there.write(collection()))):  # noqa: B023
            with pytest.raises(ConfigError, match=r"corpus.* was not written by slq"):
                refused()


@pytest.mark.parametrize("kind", SEARCHED)
def test_what_is_not_there_is_told_and_not_made(tmp_path: Path, kind: str) -> None:
    there = place(kind, tmp_path)
    with pytest.raises(ArtifactError, match=r"there is no .*corpus.*; write it with `slq index`"):
        there.open()
    assert list(tmp_path.iterdir()) == []
    list(place(kind, tmp_path, "other").write(collection(table(5))))
    with pytest.raises(ArtifactError, match=r"there is no .*corpus"):
        there.open()


@pytest.mark.parametrize("kind", ["npy", *SEARCHED])
def test_vectors_that_cannot_be_are_refused(tmp_path: Path, kind: str) -> None:
    vectors = unit_vectors(10).astype(np.float16)
    vectors[8] = np.nan
    damaged = table(10).set_column(1, "embedding", vector_column(vectors))
    with pytest.raises(DataError, match="the vector of row 8 is not finite or is zero"):
        list(place(kind, tmp_path).write(collection(damaged)))
    with pytest.raises(DataError, match="vectors of 32 values do not fit to 31"):
        list(place(kind, tmp_path, "other").write(collection(dimension=31)))
    with pytest.raises(DataError, match="came instead of 401"):
        list(place(kind, tmp_path, "third").write(collection(num_rows=401)))
    if kind != "npy":
        with pytest.raises(ArtifactError):
            place(kind, tmp_path, "third").open()


@pytest.mark.parametrize("kind", SEARCHED)
def test_ids_that_come_twice_are_told(tmp_path: Path, kind: str) -> None:
    twice = pa.concat_tables([table(20), table(5, first=18)])
    message = "takes 23 of 25 rows: some ids come twice; `slq verify` names them"
    with pytest.raises(DataError, match=message):
        list(place(kind, tmp_path).write(collection(twice)))
    with pytest.raises(ArtifactError):
        place(kind, tmp_path).open()


def test_ids_that_come_twice_leave_the_table_of_lance_as_it_was(tmp_path: Path) -> None:
    there = place("lance", tmp_path)
    list(there.write(collection(table(20))))
    with pytest.raises(DataError, match="takes 23 of 25 rows"):
        list(there.write(collection(pa.concat_tables([table(20), table(5, first=18)]))))
    with there.open() as index:
        assert len(index) == 20


def test_columns_of_all_kinds_go_where_there_is_json(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at = datetime.fromisoformat("2024-02-01T10:00:00+02:00")
    given = table(3).append_column("score", pa.array([float("nan"), 1.5, None]))
    given = given.append_column("at", pa.array([at] * 3, pa.timestamp("us", "Europe/Paris")))
    given = given.append_column("cost", pa.array([Decimal("1.50")] * 3, pa.decimal128(5, 2)))
    given = given.append_column("tags", pa.array([["a"], [], None]))
    given = given.append_column("kind", pa.array(["x", "y", None]).dictionary_encode())
    given = given.append_column("raw", pa.array([b"1", b"2", b"3"]))
    for kind in LIVE:
        with caplog.at_level(logging.WARNING):
            found = rows_in(written(kind, tmp_path, given))
        label = kind.capitalize()
        assert f"columns of bytes are left out, {label} keeps none: raw" in caplog.text
        plain = {"id": "item-0", "text": "t0", "price": 0, "content_hash": "0", "score": None}
        others = {"at": "2024-02-01T08:00:00", "cost": 1.5, "tags": ["a"], "kind": "x"}
        assert found["item-0"] == {**plain, **others}
    whole = rows_in(written("lance", tmp_path, given))["item-1"]
    assert (whole["raw"], whole["at"], whole["tags"]) == (b"2", at, [])


def test_names_that_an_engine_cannot_have_are_refused(tmp_path: Path) -> None:
    spaced = table(3).append_column("my price", pa.array([1, 2, 3]))
    with pytest.raises(ConfigError, match="Milvus has no field with the name 'my price'"):
        list(place("milvus", tmp_path).write(collection(spaced)))
    quoted = table(3).append_column('a "b"', pa.array([1, 2, 3]))
    with pytest.raises(ConfigError, match="Qdrant cannot filter by a column with the name"):
        list(place("qdrant", tmp_path).write(collection(quoted)))
    taken = table(3).append_column("query_index", pa.array([1, 2, 3]))
    with pytest.raises(ConfigError, match="Lance gives results a column query_index"):
        list(place("lance", tmp_path).write(collection(taken)))
    for kind in ("lance", "qdrant"):
        with written(kind, tmp_path, spaced).open() as index:
            (hits,) = index.search(QUERIES[:1], 3, where='"my price" = 2')
            assert [hit.id for hit in hits] == ["item-1"]


def test_plain_files_hold_vectors_and_items_in_one_order(tmp_path: Path) -> None:
    list(place("npy", tmp_path).write(collection()))
    folder = tmp_path / "npy" / "corpus"
    vectors, items = np.load(folder / "vectors.npy"), pq.read_table(folder / "items.parquet")
    assert vectors.dtype == np.float16
    np.testing.assert_array_equal(vectors, unit_vectors(COUNT).astype(np.float16))
    assert items["id"].to_pylist() == [f"item-{n}" for n in range(COUNT)]
    told = json.loads((folder / "description.json").read_text())
    assert told == {"fingerprint": "3f2a", "num_rows": COUNT, "dimension": DIMENSION}
    with pytest.raises(ConfigError, match="exists already; choose another --name"):
        list(place("npy", tmp_path).write(collection()))
    broken = Collection(
        iter([table(5)]), table(5).schema, 6, DIMENSION, fingerprint="3f2a", source="x"
    )
    with pytest.raises(DataError, match="5 vectors came instead of 6"):
        list(place("npy", tmp_path, "broken").write(broken))
    assert [path.name for path in (tmp_path / "npy").iterdir()] == ["corpus"]


# ---- places ----


def test_a_place_that_cannot_be_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="'faiss' is unknown; choose one of npy, lance, milvus"):
        engine("faiss", "x", "y")
    with pytest.raises(ConfigError, match="plain arrays go into a folder, and s3://x is none"):
        list(engine("npy", "s3://x", "y").write(collection()))
    with pytest.raises(ConfigError, match=r"a file of Milvus Lite ends in \.db, and that of x\.mv"):
        engine("milvus", "x.mv", "y")
    monkeypatch.setenv("MILVUS_TOKEN", "a-secret")
    monkeypatch.setenv("QDRANT_API_KEY", "a-secret")
    for kind, label in (("qdrant", "Qdrant"), ("milvus", "Milvus")):
        there = engine(kind, "https://127.0.0.1:1", "y")
        with pytest.raises(StorageError, match=rf"{label} at https://127\.0\.0\.1:1") as caught:
            list(there.write(collection()))
        assert "a-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "target", "variable"),
    [
        ("milvus", "http://root:Milvus@db:19530", "MILVUS_TOKEN"),
        ("milvus", "https://token@db", "MILVUS_TOKEN"),
        ("qdrant", "https://db:6333?api_key=Milvus", "QDRANT_API_KEY"),
        ("lance", "s3://AKIA:Milvus@bucket/prefix", "AWS_SECRET_ACCESS_KEY"),
        ("npy", "http://a:Milvus@b", "the environment"),
    ],
)
def test_an_address_with_credentials_is_refused_and_not_repeated(
    kind: str, target: str, variable: str
) -> None:
    with pytest.raises(ConfigError, match="an address holds no user, password or query") as caught:
        engine(kind, target, "y")
    assert variable in str(caught.value)
    assert not any(secret in str(caught.value) for secret in ("root", "Milvus@", "AKIA", "api_key"))


@pytest.mark.parametrize("kind", LIVE)
def test_what_only_one_process_can_open_says_so_and_is_free_when_it_is_closed(
    tmp_path: Path, kind: str
) -> None:
    there = written(kind, tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from slq.engines import engine\nfrom slq.errors import SlqError\n"
        "try:\n    with engine(*sys.argv[2:]).open() as index: print(len(index))\n"
        "except SlqError as error: print(error)"
    )
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", code, root, kind, there.target, there.name]

    def elsewhere() -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        assert "Traceback" not in done.stderr
        return done.stdout.strip()

    with there.open() as index:
        told = elsewhere()
        assert "Only one process at a time can open a f" in told
        assert "stop what has it open (a service?), or use a" in told
        assert len(index.search(QUERIES[:1], 3)[0]) == 3
    assert elsewhere() == str(COUNT)
    assert there.is_exclusive
    assert not engine(kind, "http://127.0.0.1:1", "y").is_exclusive  # type: ignore[attr-defined]


def test_a_file_of_milvus_lite_makes_the_folders_that_it_lies_in(tmp_path: Path) -> None:
    with Milvus(f"{tmp_path}/run/index/milvus.db", "x").connection() as client:
        assert client.list_collections() == []
    (tmp_path / "taken").write_text("a file")
    with (
        pytest.raises(StorageError, match="cannot be opened"),
        Milvus(f"{tmp_path}/taken/milvus.db", "x").connection(),
    ):
        pass


def test_a_file_of_milvus_lite_is_free_when_the_last_of_this_process_has_closed_it(
    tmp_path: Path,
) -> None:
    there = written("milvus", tmp_path)
    first, second = there.open(), there.open()
    first.close()
    assert len(second.search(QUERIES[:1], 3)[0]) == 3
    second.close()
    second.close()
    assert len(rows_in(there)) == COUNT


@pytest.mark.parametrize("kind", LIVE)
def test_an_engine_that_fails_is_a_storage_error(tmp_path: Path, kind: str) -> None:
    with written(kind, tmp_path).open() as index:
        drop = "drop_collection" if kind == "milvus" else "delete_collection"
        getattr(index._client, drop)("corpus")  # as another client could
        for asked in (
            lambda: index.search(QUERIES[:1], 3),
            lambda: index.item("item-1"),
            lambda: index.vectors_of(["item-1"]),
        ):
            with pytest.raises(StorageError, match=rf"{kind.capitalize()} at "):
                asked()


def test_a_cluster_is_asked_as_a_cluster() -> None:
    """No cluster is here: what is sent to one is looked at instead."""
    mark = Mark("3f2a", "state-1", 9, DIMENSION, {"id": "text"}, is_complete=True)
    milvus = MilvusIndex(Milvus("http://db:19530", "c"), None, mark, 20_000, ExitStack())
    with pytest.raises(
        DataError, match=r"exact search works with index.engine faiss, lance and qd"
    ):
        milvus.search(QUERIES, 3, exact=True)
    with pytest.raises(DataError, match="Milvus gives 16384 results at most, not 16385"):
        milvus.search(QUERIES, 16_385)

    class Client:
        """Keeps what it is asked."""

        def query_batch_points(self, name: str, requests: list[Any]) -> list[Any]:
            self.requests = requests
            return []

    client = Client()
    qdrant = QdrantIndex(Qdrant("http://db:6333", "c"), client, mark, 20_000, ExitStack())
    qdrant.search(QUERIES, 3, exact=True)
    assert len(client.requests) == len(QUERIES)  # in one request
    assert all(one.params.exact and one.with_payload for one in client.requests)
    qdrant.search(QUERIES, 3)
    assert client.requests[0].params is None
