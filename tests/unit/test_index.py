"""The faiss index against numpy, and versions that are published whole or not at all."""

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

import slq.index
from slq.errors import ArtifactError, ConfigError, DataError, StorageError
from slq.index import (
    MANIFEST,
    POINTER,
    ROWS,
    VECTORS,
    IndexConfig,
    VectorIndex,
    build,
    current_version,
    publish,
)

COUNT, DIMENSION = 200, 16
FLAT = IndexConfig()


def unit_vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rows(count: int = COUNT) -> pa.Table:
    return pa.table(
        {"id": [f"item-{n}" for n in range(count)], "text": [f"t{n}" for n in range(count)]}
    )


def published(folder: Path, config: IndexConfig = FLAT, seed: int = 0) -> VectorIndex:
    publish(
        folder, build(config, unit_vectors(COUNT, seed)), rows(), fingerprint="3f2a", config=config
    )
    return VectorIndex(folder)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_flat_search_equals_brute_force(tmp_path: Path) -> None:
    index = published(tmp_path / "index")
    vectors, queries = unit_vectors(COUNT), unit_vectors(20, seed=1)
    similarity = queries.astype(np.float64) @ vectors.astype(np.float64).T
    for found, row in zip(index.search(queries, 10), similarity, strict=True):
        best = np.argsort(-row, kind="stable")[:10]
        assert [hit.row for hit in found] == best.tolist()
        assert [hit.id for hit in found] == [f"item-{n}" for n in best]
        np.testing.assert_allclose([hit.score for hit in found], row[best], atol=1e-6)


def test_queries_of_an_index_of_cut_vectors_are_cut_too(tmp_path: Path) -> None:
    vectors, queries = unit_vectors(COUNT), unit_vectors(20, seed=1)
    short = vectors[:, :6] / np.linalg.norm(vectors[:, :6], axis=1, keepdims=True)
    publish(tmp_path, build(FLAT, short), rows(), fingerprint="3f2a", config=FLAT)
    index = VectorIndex(tmp_path)
    cosines = short @ queries[:, :6].T / np.linalg.norm(queries[:, :6], axis=1)
    for found, column in zip(index.search(queries, 5), cosines.T, strict=True):
        assert [hit.row for hit in found] == np.argsort(-column, kind="stable")[:5].tolist()
        np.testing.assert_allclose([hit.score for hit in found], np.sort(column)[:-6:-1], atol=1e-6)
    with pytest.raises(DataError, match="vectors of 5 values cannot be cut to 6"):
        index.search(queries[:, :5], 3)


def test_ivf_with_every_list_probed_equals_flat(tmp_path: Path) -> None:
    queries = unit_vectors(20, seed=1)
    flat = published(tmp_path / "flat").search(queries, 10)
    ivf = published(tmp_path / "ivf", IndexConfig(kind="ivf", num_lists=8, num_probes=8))
    for ours, truth in zip(ivf.search(queries, 10), flat, strict=True):
        assert [hit.id for hit in ours] == [hit.id for hit in truth]
        np.testing.assert_allclose([h.score for h in ours], [h.score for h in truth], atol=1e-6)


def test_the_probes_of_ivf_survive_publishing(tmp_path: Path) -> None:
    config = IndexConfig(kind="ivf", num_lists=8, num_probes=1)
    few = published(tmp_path / "few", config).search(unit_vectors(20, seed=1), COUNT)
    assert all(0 < len(hits) < COUNT for hits in few)


@pytest.mark.parametrize("config", [FLAT, IndexConfig(kind="ivf", num_lists=8)])
def test_an_index_built_twice_is_the_same_bytes(config: IndexConfig) -> None:
    import faiss

    blobs = [faiss.serialize_index(build(config, unit_vectors(COUNT))).tobytes() for _ in range(2)]
    assert blobs[0] == blobs[1]


@pytest.mark.parametrize("config", [FLAT, IndexConfig(kind="ivf", num_lists=8)])
def test_ids_are_the_row_numbers(config: IndexConfig) -> None:
    vectors = unit_vectors(COUNT)
    index = build(config, vectors)
    _, ids = index.search(vectors, 1)
    assert ids[:, 0].tolist() == list(range(COUNT))


def test_more_results_than_vectors_gives_every_vector_once(tmp_path: Path) -> None:
    index = published(tmp_path / "index")
    (found,) = index.search(unit_vectors(1, seed=1), 10**9)
    assert sorted(hit.row for hit in found) == list(range(COUNT))
    assert len(index) == COUNT


def test_stored_columns_come_back_by_row(tmp_path: Path) -> None:
    index = published(tmp_path / "index")
    assert index.row(17) == {"id": "item-17", "text": "t17"}
    assert index.fingerprint == "3f2a"
    assert index.manifest["dimension"] == DIMENSION


def test_more_lists_than_vectors_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="num_lists is 64, but there are only 10 vectors"):
        build(IndexConfig(kind="ivf"), unit_vectors(10))


def test_publishing_keeps_old_versions_and_moves_the_pointer(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    first = published(folder)
    before = tree(folder / "v000001")
    second = published(folder, seed=2)
    assert (first.version, second.version) == ("v000001", "v000002")
    assert current_version(folder) == "v000002"
    assert tree(folder / "v000001") == before
    old = VectorIndex(folder, "v000001")
    query = unit_vectors(1, seed=1)
    assert old.search(query, 5) == first.search(query, 5) != second.search(query, 5)
    assert sorted(path.name for path in folder.iterdir()) == [POINTER, "v000001", "v000002"]


def test_the_pointer_moves_only_to_a_version_that_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "index", []
    original = os.replace

    def watching(source: Path, target: Path, **options: object) -> None:
        if Path(target).name == POINTER:
            version = Path(source).read_text().strip()
            seen.append(len(VectorIndex(folder, version)))  # checks every sha256
        original(source, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", watching)
    published(folder)
    assert seen == [COUNT]


@pytest.mark.parametrize("name", [VECTORS, ROWS])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_corrupt_file_is_refused_and_named(tmp_path: Path, name: str, damage: str) -> None:
    published(tmp_path / "index")
    path = tmp_path / "index" / "v000001" / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name} does not match the sha256 in its manifest"):
        VectorIndex(tmp_path / "index")


def test_a_folder_without_an_index_or_with_a_damaged_manifest_is_an_artifact_error(
    tmp_path: Path,
) -> None:
    with pytest.raises(ArtifactError, match="holds no index; build one with `slq index`"):
        VectorIndex(tmp_path)
    published(tmp_path / "index")
    (tmp_path / "index" / "v000001" / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        VectorIndex(tmp_path / "index")
    (tmp_path / "index" / POINTER).write_text("v000009\n")
    with pytest.raises(ArtifactError, match="is missing"):
        VectorIndex(tmp_path / "index")


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "failing", ["mkdir", "write_bytes", "write_table", "manifest", "rename", "pointer", "replace"]
)
def test_a_full_disk_is_a_storage_error_and_the_old_version_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder = tmp_path / "index"
    first = published(folder)
    query = unit_vectors(1, seed=1)
    with monkeypatch.context() as patch:
        if failing == "write_table":
            patch.setattr(slq.index.pq, "write_table", no_space)
        elif failing == "replace":
            patch.setattr(os, "replace", no_space)
        else:
            name = {"manifest": "open", "pointer": "write_text"}.get(failing, failing)
            patch.setattr(Path, name, no_space)
        with pytest.raises(StorageError, match="No space left on device; free space"):
            published(folder, seed=2)
    assert current_version(folder) == "v000001"
    assert VectorIndex(folder).search(query, 5) == first.search(query, 5)
    assert published(folder, seed=2).search(query, 5) != first.search(query, 5)
