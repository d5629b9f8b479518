"""Segments built in parts and partitions: bit for bit what is built at once, and resumed where it was ended."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import slq.index.segment
from slq.errors import ArtifactError, ConfigError, StorageError
from slq.index import Content, IndexConfig, VectorIndex, build, codes, write_version
from slq.index.building import INDEX, PARTITIONS, balanced, here, part_rows
from slq.index.versions import SEGMENTS
from tests.unit.index_data import (
    COUNT,
    DIMENSION,
    FLAT,
    IVF,
    Given,
    small_partitions,
    stored,
    table,
    unit_vectors,
)

ALL_CODES = [
    FLAT,
    *(
        IVF.model_copy(update=update)
        for update in (
            {"codes": "float32"},
            {"codes": "float16", "rotation": "random"},
            {"codes": "int8"},
            {"codes": "int4"},
            {"codes": "rabitq", "rotation": "random"},
            {"codes": "pq4", "rotation": "opq", "quantizer": "hnsw"},
        )
    ),
]
NAMES = [f"{one.kind}-{one.codes}" for one in ALL_CODES]
QUERIES = unit_vectors(20, seed=1)


def parts_of(*sizes: int) -> list[Given]:
    rows, edges = table(), np.cumsum([0, *sizes, COUNT - sum(sizes)])
    return [Given(rows.slice(a, b - a)) for a, b in itertools.pairwise(edges)]


def written(
    folder: Path,
    config: IndexConfig,
    parts: Sequence[Given],
    origin: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    content = Content(parts, DIMENSION, "3f2a", origin)
    manifest = write_version(folder, content, config, **options)
    return folder / SEGMENTS / manifest.segments[0].name


@pytest.mark.parametrize("config", ALL_CODES, ids=NAMES)
def test_a_segment_of_many_parts_is_bit_for_bit_the_index_that_is_built_at_once(
    tmp_path: Path, config: IndexConfig
) -> None:
    import faiss

    home = written(tmp_path, config, parts_of(7, 150, 1, 99))
    vectors = np.concatenate([v for _, v in VectorIndex(tmp_path)._segments[0].vectors.blocks()])
    with codes.threads(codes.num_cores()):  # as many as learn for a segment
        expected = faiss.serialize_index(build(config, vectors)).tobytes()
    found = (home / PARTITIONS / "0000" / INDEX).read_bytes()
    if config.rotation == "none":
        assert found == expected
    else:  # it rounds the last bit by how many vectors it turns at once
        same = np.frombuffer(found, np.uint8) == np.frombuffer(expected, np.uint8)
        assert same.mean() > 0.95
    np.testing.assert_allclose(vectors, stored(), atol=1e-6)


@pytest.mark.parametrize("config", ALL_CODES, ids=NAMES)
def test_partitions_find_what_one_index_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: IndexConfig
) -> None:
    monkeypatch.setattr(slq.index.segment, "_FEW_ROWS", 0)
    config = config.model_copy(update={"num_probes": 3, "oversample": 1.0})
    home = written(tmp_path / "many", small_partitions(config, 90), parts_of(100, 200))
    partitions = sorted((home / PARTITIONS).iterdir())
    assert len(partitions) >= 3
    vectors = np.concatenate(
        [v for _, v in VectorIndex(tmp_path / "many")._segments[0].vectors.blocks()]
    )
    whole = build(config, vectors)
    scores, rows = codes.search(whole, QUERIES, 12)
    indexes = [codes.read(path / INDEX) for path in partitions]
    if config.kind == "ivf":
        assert [codes.num_lists(one) for one in indexes] == [8] * len(indexes)
        sizes = [(path / INDEX).stat().st_size for path in partitions]
        assert min(sizes[1:]) < sizes[0]  # the first one has the centroids
        codes.share_centroids(indexes)
        codes.set_probes(indexes[0], config.num_probes)
    for selected in (None, np.full(COUNT // 8, 255, np.uint8)):
        together, numbers = codes.search_partitions(indexes, QUERIES, 12, selected)
        np.testing.assert_allclose(together, scores, atol=1e-4)
        same = np.mean(
            [len({*a} & {*b}) for a, b in zip(numbers.tolist(), rows.tolist(), strict=True)]
        )
        assert same > 11.5  # but for codes that are as near
    index = VectorIndex(tmp_path / "many")
    filtered, plain = (index.search(QUERIES, 12, where=where) for where in ("price < 100", None))
    assert [[hit.id for hit in hits] for hits in filtered] == [
        [hit.id for hit in hits] for hits in plain
    ]
    if config.codes == "float32":
        assert [[hit.row for hit in hits] for hits in plain] == rows.tolist()


def private_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


@pytest.mark.parametrize(
    "config", [one for one in ALL_CODES if one.codes not in ("rabitq", "pq4")], ids=NAMES[:5]
)
def test_vectors_stay_on_disk_when_an_index_is_read(tmp_path: Path, config: IndexConfig) -> None:
    import faiss

    vectors = unit_vectors(40_000, dimension=256)
    index = build(config.model_copy(update={"rotation": "none"}), vectors)
    faiss.write_index(index, str(tmp_path / INDEX))
    before = private_bytes()
    read = codes.read(tmp_path / INDEX)
    grown = private_bytes() - before
    assert (tmp_path / INDEX).stat().st_size > 40_000 * 128
    assert grown < 2 * 2**20
    lists = faiss.try_extract_index_ivf(read)
    if lists is not None:  # and are read by the threads that search
        kept = faiss.downcast_InvertedLists(lists.invlists)
        assert isinstance(kept, faiss.OnDiskInvertedLists)
        assert kept.prefetch_nthread == 0
    queries = unit_vectors(5, seed=3, dimension=256)
    for found, expected in zip(read.search(queries, 10), index.search(queries, 10), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("limit", [1, 4, 9, 100])
def test_ranges_of_lists_cover_all_and_hold_what_they_may(limit: int) -> None:
    sizes = np.array([3, 0, 5, 1, 1, 9, 0, 2])
    edges = balanced(sizes, limit)
    assert (edges[0], edges[-1]) == (0, len(sizes))
    held = [sizes[a:b] for a, b in itertools.pairwise(edges)]
    assert np.concatenate(held).tolist() == sizes.tolist()
    assert all(one.sum() <= limit or (one > 0).sum() == 1 for one in held)


class Failing:
    """Does all steps, but fails in one of them after so many calls; counts what was really done."""

    def __init__(self, step: str, after: int, error: type[Exception] = OSError) -> None:
        self.step, self.after, self.error = step, after, error

    def __call__(
        self,
        what: str,
        function: Callable[[Any], Any],
        arguments: Sequence[Any],
        *,
        device: str = "cpu",
    ) -> list[Any]:
        if what != self.step:
            return here(what, function, arguments, device=device)
        for argument in arguments[: self.after]:
            function(argument)
        raise self.error("the node is gone")


STEPS = [
    ("read rows", 1),
    ("compare ids", 0),
    ("learn lists and codes", 0),
    ("put vectors into lists", 2),
    ("write partitions", 1),
    ("index words", 0),
]


@pytest.mark.parametrize(("step", "after"), STEPS)
def test_a_build_that_was_ended_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: int
) -> None:
    config, parts = small_partitions(ALL_CODES[3], 150), parts_of(100, 200)
    config = config.model_copy(update={"words": True})
    whole = written(tmp_path / "whole", config, parts)
    expected = {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    source = {"embeddings": [{"location": "x", "sha256": "1"}]}
    with pytest.raises(StorageError, match="the node is gone"):
        written(tmp_path / "i", config, parts, origin=source, each=Failing(step, after))
    (begun,) = (tmp_path / "i" / SEGMENTS).iterdir()
    kept = {p.relative_to(begun): p.stat().st_ino for p in begun.rglob("*") if p.is_file()}
    home = written(tmp_path / "i", config, parts, origin=source)
    found = {p.relative_to(home): p.read_bytes() for p in home.rglob("*") if p.is_file()}
    checks = Path("checked.json")
    assert found.keys() == expected.keys()
    assert {**found, checks: b""} == {**expected, checks: b""}
    for name, inode in kept.items():
        if name.parts[0] != "work" and name.name != checks.name:
            assert (home / name).stat().st_ino == inode  # not written again
    assert len(kept) >= 4 * after
    assert not (home / "work").exists()


def test_a_build_of_something_else_does_not_go_on_from_there(tmp_path: Path) -> None:
    parts = parts_of(100)
    for digest in ("1", "2"):
        with pytest.raises(StorageError):
            written(
                tmp_path,
                IVF,
                parts,
                origin={"embeddings": [{"sha256": digest}]},
                each=Failing("write partitions", 0),
            )
        assert len(list((tmp_path / SEGMENTS).iterdir())) == 1
    with pytest.raises(StorageError):
        written(tmp_path, IVF, parts, each=Failing("write partitions", 0))
    assert not list((tmp_path / SEGMENTS).iterdir())


def test_a_build_that_was_ended_before_it_was_published_is_not_built_again(
    tmp_path: Path,
) -> None:
    source = {"embeddings": [{"sha256": "1"}]}

    def interrupted(*_: object) -> IndexConfig:
        raise KeyboardInterrupt

    config = IVF.model_copy(update={"num_probes": 2})  # what only a search depends on may change
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, config, parts_of(100), origin=source, settle=interrupted)
    (begun,) = (tmp_path / SEGMENTS).iterdir()

    def nobody(what: str, *_: object, **__: object) -> list[Any]:
        raise AssertionError(what)

    inode = begun.stat().st_ino
    home = written(tmp_path, IVF, parts_of(100), origin=source, each=nobody)
    assert home.stat().st_ino == inode
    assert len(VectorIndex(tmp_path)) == COUNT
    assert VectorIndex(tmp_path).manifest.config["num_probes"] == IVF.num_probes


@pytest.mark.parametrize(
    ("update", "problem"),
    [
        (
            {"codes": "pq4", "dimension": 20},
            "vectors of 20 values cannot be cut into 3 equal parts",
        ),
        (
            {"rotation": "opq", "count": 200},
            "opq is learnt from 256 vectors at least, and there are",
        ),
        ({"num_lists": 401}, "num_lists is 401, but there are only 400 vectors"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_read(
    tmp_path: Path, update: dict[str, Any], problem: str
) -> None:
    dimension, count = update.pop("dimension", DIMENSION), update.pop("count", COUNT)

    def nobody(what: str, *_: object, **__: object) -> list[Any]:
        raise AssertionError(what)

    config = IVF.model_copy(update=update)
    content = Content([Given(table(count))], dimension, "3f2a", {"embeddings": []})
    with pytest.raises(ConfigError, match=problem):
        write_version(tmp_path, content, config, each=nobody)
    assert not list((tmp_path / SEGMENTS).iterdir())


def test_what_killed_tasks_left_is_not_published(tmp_path: Path) -> None:
    source = {"embeddings": [{"sha256": "1"}]}
    with pytest.raises(StorageError):
        written(tmp_path, IVF, parts_of(100), origin=source, each=Failing("write partitions", 0))
    (begun,) = (tmp_path / SEGMENTS).iterdir()
    for place in ("parts/.00001.a1.partial", ".words.a2.partial", "partitions/.0000.a3.partial"):
        (begun / place).mkdir(parents=True)
    home = written(tmp_path, IVF, parts_of(100), origin=source)
    assert not list(home.rglob("*.partial"))


def test_damage_between_building_and_publishing_is_found(tmp_path: Path) -> None:
    source = {"embeddings": [{"sha256": "1"}]}
    parts = parts_of(100)
    with pytest.raises(StorageError):
        written(tmp_path, IVF, parts, origin=source, each=Failing("write partitions", 0))
    (path,) = tmp_path.glob(f"{SEGMENTS}/.begun-*/parts/00000/vectors.npy")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    written(tmp_path, IVF, parts, origin=source)
    with pytest.raises(ArtifactError, match=r"parts/00000/vectors\.npy does not match"):
        VectorIndex(tmp_path)


def test_parts_are_some_dozens_but_neither_tiny_nor_huge() -> None:
    assert [part_rows(count) for count in (1, 10**5, 10**7, 10**9)] == [
        16_384,
        16_384,
        156_250,
        1_048_576,
    ]


def test_a_partition_that_lost_rows_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slq.errors import DataError

    original = codes.fill_list

    def forgetful(
        index: Any, number: int, rows: NDArray[np.int64], coded: NDArray[np.uint8]
    ) -> None:
        if number != 5:
            original(index, number, rows, coded)

    monkeypatch.setattr(codes, "fill_list", forgetful)
    with pytest.raises(DataError, match=r"partitions hold \d+ of 400 vectors"):
        written(tmp_path, IVF, parts_of(100))
    assert not (tmp_path / "CURRENT").exists()
