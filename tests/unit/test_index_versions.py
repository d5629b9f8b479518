"""Versions of an index: published whole or not at all, grown, thinned out, joined, taken back."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import slq.index.checks
import slq.index.writing
from slq.errors import ArtifactError, ArtifactMismatchError, DataError, StorageError
from slq.index import (
    Content,
    VectorIndex,
    append,
    compact,
    current_version,
    delete,
    prune,
    roll_back,
    versions,
)
from slq.index.building import INDEX
from slq.index.items import IDS, ITEMS
from slq.index.vectors import VECTORS
from slq.index.versions import MANIFEST, POINTER, SEGMENTS, read_manifest, require_whole
from tests.unit.index_data import (
    COUNT,
    DIMENSION,
    FLAT,
    IVF,
    Given,
    published,
    table,
    unit_vectors,
)

QUERY = unit_vectors(1, seed=1)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def segment_of(index: VectorIndex, folder: Path) -> Path:
    return folder / SEGMENTS / index.manifest.segments[0].name


def test_publishing_keeps_old_versions_and_moves_the_pointer(tmp_path: Path) -> None:
    first = published(tmp_path)
    before = tree(tmp_path / "v000001") | tree(segment_of(first, tmp_path))
    second = published(tmp_path, seed=2)
    assert (first.version, second.version) == ("v000001", "v000002")
    assert current_version(tmp_path) == "v000002"
    assert tree(tmp_path / "v000001") | tree(segment_of(first, tmp_path)) == before
    old = VectorIndex(tmp_path, "v000001")
    assert old.search(QUERY, 5) == first.search(QUERY, 5) != second.search(QUERY, 5)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".lock", POINTER, SEGMENTS, "v000001", "v000002"]


def test_the_pointer_moves_only_to_a_version_that_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = os.replace

    def watching(source: Path, target: Path, **options: object) -> None:
        if Path(target).name == POINTER:
            version = Path(source).read_text().strip()
            require_whole(tmp_path, read_manifest(tmp_path, version), again=True)
            seen.append(len(VectorIndex(tmp_path, version)))
        original(source, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", watching)
    published(tmp_path)
    assert seen == [COUNT]


FILES = [
    *(f"parts/0000{part}/{name}" for part in (0, 1) for name in (IDS, ITEMS, VECTORS)),
    f"partitions/0000/{INDEX}",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_corrupt_file_is_refused_and_named(tmp_path: Path, name: str, damage: str) -> None:
    path = segment_of(published(tmp_path), tmp_path) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name} does not match the sha256 in its manifest"):
        VectorIndex(tmp_path)


def test_a_file_is_hashed_once_and_again_only_where_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = published(tmp_path)
    read: list[str] = []
    original = slq.index.checks.file_sha256

    def watching(path: Path) -> str:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(slq.index.checks, "file_sha256", watching)
    VectorIndex(tmp_path)
    assert read == []  # whoever wrote them has hashed them
    items = segment_of(index, tmp_path) / FILES[1]
    os.utime(items)
    VectorIndex(tmp_path)
    VectorIndex(tmp_path)
    assert read == [ITEMS]
    read.clear()
    moved = tmp_path.with_name("moved")
    shutil.copytree(tmp_path, moved, copy_function=shutil.copy)  # other times, other inodes
    VectorIndex(moved)
    assert sorted(read) == sorted(Path(name).name for name in FILES)


def test_a_file_that_changes_while_it_is_hashed_is_not_taken_for_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = published(tmp_path)
    items = segment_of(index, tmp_path) / FILES[1]
    os.utime(items)  # so that it is hashed again
    original = slq.index.checks.file_sha256

    def damaging(path: Path) -> str:
        digest = original(path)
        path.write_bytes(path.read_bytes()[:-1])
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(slq.index.checks, "file_sha256", damaging)
        require_whole(tmp_path, index.manifest)
    with pytest.raises(ArtifactError, match=rf"{ITEMS} does not match"):
        require_whole(tmp_path, index.manifest)


def test_damage_that_leaves_size_and_time_is_found_where_all_is_asked_for(tmp_path: Path) -> None:
    index = published(tmp_path)
    path = segment_of(index, tmp_path) / FILES[1]
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ArtifactError, match=rf"{ITEMS} does not match"):
        require_whole(tmp_path, index.manifest, again=True)


def test_a_folder_without_an_index_or_with_a_damaged_manifest_is_an_artifact_error(
    tmp_path: Path,
) -> None:
    with pytest.raises(ArtifactError, match="holds no index; build one with `slq index`"):
        VectorIndex(tmp_path)
    published(tmp_path)
    (tmp_path / "v000001" / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        VectorIndex(tmp_path)
    (tmp_path / "v000001" / MANIFEST).write_text('{"version": "v000001"}')
    with pytest.raises(ArtifactError, match=r"is not of this slq; rebuild with `slq index`"):
        VectorIndex(tmp_path)
    (tmp_path / POINTER).write_text("v000009\n")
    with pytest.raises(ArtifactError, match="is missing"):
        VectorIndex(tmp_path)


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "failing",
    ["mkdir", "vectors", "items", "save", "faiss", "manifest", "rename", "pointer", "replace"],
)
def test_a_full_disk_is_a_storage_error_and_the_old_version_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    import faiss
    import pyarrow as pa

    def faiss_without_space(*_: object) -> None:
        raise RuntimeError(
            "Error in x() at y.cpp:3: write error in z: 1 != 2 (No space left on device)"
        )

    first = published(tmp_path)
    with monkeypatch.context() as patch:
        if failing == "vectors":
            patch.setattr(np.lib.format, "write_array_header_1_0", no_space)
        elif failing == "items":
            patch.setattr(pa.ipc, "new_file", no_space)
        elif failing == "save":
            patch.setattr(np, "save", no_space)
        elif failing == "faiss":
            patch.setattr(faiss, "write_index", faiss_without_space)
        elif failing == "replace":
            patch.setattr(os, "replace", no_space)
        else:
            name = {"manifest": "open", "pointer": "write_text"}.get(failing, failing)
            patch.setattr(Path, name, no_space)
        with pytest.raises(StorageError, match="No space left on device; free space"):
            published(tmp_path, seed=2)
    assert current_version(tmp_path) == "v000001"
    assert VectorIndex(tmp_path).search(QUERY, 5) == first.search(QUERY, 5)
    assert published(tmp_path, seed=2).search(QUERY, 5) != first.search(QUERY, 5)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("other", ["build", "append", "delete", "compact"])
def test_whoever_changes_an_index_that_is_being_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    published(tmp_path)
    changes = {
        "build": lambda: published(tmp_path, seed=3),
        "append": lambda: append(tmp_path, Content([Given(table(9))], DIMENSION, "3f2a")),
        "delete": lambda: delete(tmp_path, ["item-1"]),
        "compact": lambda: compact(tmp_path),
    }
    original, refused = Path.rename, []

    def late(self: Path, target: Path) -> Path:
        if Path(target).name == "v000002":
            with pytest.raises(StorageError, match="is being changed by another process; wait"):
                changes[other]()
            refused.append(other)
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", late)
        published(tmp_path, seed=2)
    assert refused == [other]
    assert versions(tmp_path) == ["v000001", "v000002"]
    changes[other]()
    assert current_version(tmp_path) == "v000003"


def test_a_change_of_a_version_that_was_taken_back_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(tmp_path)
    published(tmp_path, seed=2)
    original = slq.index.writing.open_segments

    def slow(folder: Path, *arguments: object) -> object:
        roll_back(tmp_path)
        return original(folder, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(slq.index.writing, "open_segments", slow)
        with pytest.raises(
            StorageError, match="was at v000002 when this change began and is at v0"
        ):
            delete(tmp_path, ["item-1"])
    assert current_version(tmp_path) == "v000001"
    assert delete(tmp_path, ["item-1"])[0].version == "v000003"


def test_what_killed_changes_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    published(tmp_path)
    left = [
        tmp_path / ".a1b2.partial",
        tmp_path / SEGMENTS / ".c3d4.partial",
        tmp_path / SEGMENTS / ".begun-0123",
    ]
    for folder in left:
        folder.mkdir()
        (folder / "file").write_text("half")
    published(tmp_path, seed=2)
    assert not any(folder.exists() for folder in left)


def test_deleted_items_are_found_no_more_and_older_versions_still_have_them(
    tmp_path: Path,
) -> None:
    before = published(tmp_path, IVF)
    best = [hit.id for hit in before.search(QUERY, 3)[0]]
    manifest, gone = delete(tmp_path, [best[0], best[2], "unknown"])
    assert (manifest.version, gone, manifest.num_vectors) == ("v000002", 2, COUNT - 2)
    after = VectorIndex(tmp_path)
    (hits,) = after.search(QUERY, COUNT)
    assert hits[0].id == best[1]
    assert len(hits) == len(after) == COUNT - 2
    assert (after.find(best[0]), after.find(best[1])) == (None, hits[0].row)
    assert after.search(QUERY, 3, where=f"id = '{best[0]}'") == [[]]
    assert VectorIndex(tmp_path, "v000001").search(QUERY, 3) == before.search(QUERY, 3)
    assert delete(tmp_path, [best[0], "unknown"])[1] == 0
    assert current_version(tmp_path) == "v000002"
    delete(tmp_path, [best[1]])
    assert len(VectorIndex(tmp_path)) == COUNT - 3


def test_a_corrupt_list_of_deleted_rows_is_refused(tmp_path: Path) -> None:
    published(tmp_path)
    delete(tmp_path, ["item-3"])
    (path,) = (tmp_path / "v000002").glob("*.npy")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"deleted\.npy does not match"):
        VectorIndex(tmp_path)


def test_an_item_that_comes_again_replaces_what_was_there(tmp_path: Path) -> None:
    published(tmp_path, IVF)
    rows = table(20, seed=9, first=COUNT - 10)
    manifest = append(tmp_path, Content([Given(rows)], DIMENSION, "3f2a"))
    index = VectorIndex(tmp_path)
    assert len(index) == manifest.num_vectors == COUNT + 10
    assert index.find(f"item-{COUNT - 10}") == COUNT
    fresh = unit_vectors(20, seed=9)
    (hit,) = index.search(fresh[:1], 1)[0]
    assert (hit.id, hit.row) == (f"item-{COUNT - 10}", COUNT)
    ids = [hit.id for hit in index.search(QUERY, COUNT + 20)[0]]
    assert len(ids) == len(set(ids)) == COUNT + 10


def test_a_compact_index_finds_the_same_in_one_segment(tmp_path: Path) -> None:
    published(tmp_path, IVF)
    append(tmp_path, Content([Given(table(20, seed=9, first=COUNT - 10))], DIMENSION, "3f2a"))
    delete(tmp_path, ["item-3", f"item-{COUNT + 3}"])
    before = VectorIndex(tmp_path)
    manifest = compact(tmp_path)
    after = VectorIndex(tmp_path)
    assert (len(manifest.segments), manifest.segments[0].num_deleted) == (1, 0)
    assert len(after) == len(before) == COUNT + 8
    queries = unit_vectors(20, seed=4)
    ours, theirs = (one.search(queries, 15) for one in (after, before))
    for one, other in zip(ours, theirs, strict=True):
        assert [hit.id for hit in one] == [hit.id for hit in other]
        np.testing.assert_allclose([h.score for h in one], [h.score for h in other], atol=1e-6)
    number = after.find("item-17")
    assert number is not None
    assert after.row(number)["text"] == "t17"
    assert compact(tmp_path, FLAT).config["kind"] == "flat"


def test_an_index_of_which_all_is_deleted_answers_nothing_and_cannot_be_joined(
    tmp_path: Path,
) -> None:
    published(tmp_path, IVF)
    delete(tmp_path, [f"item-{n}" for n in range(COUNT)])
    assert VectorIndex(tmp_path).search(QUERY, 5) == [[]]
    with pytest.raises(ArtifactError, match="holds no items any more; build it anew"):
        compact(tmp_path)


def test_only_vectors_of_the_same_space_are_appended(tmp_path: Path) -> None:
    published(tmp_path)
    with pytest.raises(
        ArtifactMismatchError,
        match=r"holds vectors of 3f2a with 32 values, the new ones are of 91bc with 32",
    ):
        append(tmp_path, Content([Given(table(9))], DIMENSION, "91bc"))
    with pytest.raises(ArtifactMismatchError, match="of 3f2a with 8"):
        append(tmp_path, Content([Given(table(9))], 8, "3f2a"))
    with pytest.raises(DataError, match="there are more than 5 vectors"):
        append(tmp_path, Content([Given(table(9), 5)], DIMENSION, "3f2a"))
    assert versions(tmp_path) == ["v000001"]


def test_rolling_back_is_one_step_or_to_a_name_and_needs_whole_files(tmp_path: Path) -> None:
    first = published(tmp_path)
    published(tmp_path, seed=2)
    published(tmp_path, seed=3)
    assert roll_back(tmp_path) == "v000002" == current_version(tmp_path)
    assert roll_back(tmp_path) == "v000001"
    assert VectorIndex(tmp_path).search(QUERY, 5) == first.search(QUERY, 5)
    with pytest.raises(ArtifactError, match="has no version before v000001; it has v000001, v00"):
        roll_back(tmp_path)
    assert roll_back(tmp_path, "v000003") == "v000003"
    with pytest.raises(ArtifactError, match="has no v000007; it has v000001, v000002, v000003"):
        roll_back(tmp_path, "v000007")
    (segment_of(first, tmp_path) / FILES[1]).write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="does not match"):
        roll_back(tmp_path, "v000001")
    assert current_version(tmp_path) == "v000003"


def test_pruning_keeps_the_newest_the_current_and_every_segment_they_hold(tmp_path: Path) -> None:
    published(tmp_path)
    delete(tmp_path, ["item-1"])
    published(tmp_path, seed=2)
    published(tmp_path, seed=3)
    roll_back(tmp_path, "v000002")
    building = tmp_path / SEGMENTS / "of-a-build-that-is-about-to-publish"
    building.mkdir()
    assert prune(tmp_path, keep=1) == ["v000001", "v000003"]
    building.rmdir()  # and so it was still there
    assert versions(tmp_path) == ["v000002", "v000004"]
    held = {one.name for v in versions(tmp_path) for one in read_manifest(tmp_path, v).segments}
    assert {path.name for path in (tmp_path / SEGMENTS).iterdir()} == held
    assert len(held) == 2
    assert len(VectorIndex(tmp_path)) == COUNT - 1
    assert len(VectorIndex(tmp_path, "v000004")) == COUNT


def test_an_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    from slq.index import write_version

    rows = [Given(table(5)), Given(table(5, first=3))]
    with pytest.raises(DataError, match="2 ids come twice, first 'item-3'; an index needs unique"):
        write_version(tmp_path, Content(rows, DIMENSION, "3f2a"), FLAT)
    with pytest.raises(DataError, match="5 vectors came instead of 6"):
        write_version(tmp_path, Content([Given(table(5), 6)], DIMENSION, "3f2a"), FLAT)
    with pytest.raises(DataError, match="there are no items to index"):
        write_version(tmp_path, Content([], DIMENSION, "3f2a"), FLAT)
    assert not list((tmp_path / SEGMENTS).iterdir())
