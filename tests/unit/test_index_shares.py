"""An index in several processes' hands: together they find, to the bit, what one finds that holds it all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import slq.index.segment
from slq.errors import ArtifactError, DataError
from slq.index import Content, Hit, IndexConfig, VectorIndex, append, codes, delete
from slq.index.building import INDEX, PARTITIONS
from slq.index.checks import STAMPS
from slq.index.shares import (
    Candidates,
    IndexShare,
    dealt,
    held_by,
    merged,
    num_partitions,
)
from slq.index.vectors import VECTORS
from slq.index.versions import SEGMENTS
from tests.unit.index_data import (
    COUNT,
    DIMENSION,
    FLAT,
    Given,
    published,
    small_partitions,
    table,
    unit_vectors,
)
from tests.unit.test_index_building import ALL_CODES, NAMES

QUERIES = unit_vectors(6, seed=1)
FURTHER = 150


def grown(folder: Path, config: IndexConfig, *, rows_each: int = 60) -> VectorIndex:
    """Two segments of several partitions, with items that were replaced and some that were deleted."""
    sized = small_partitions(config, rows_each)
    published(folder, sized.model_copy(update={"num_probes": 3, "oversample": 1.5}))
    further = table(FURTHER, seed=5, first=COUNT - 20)
    append(folder, Content([Given(further)], DIMENSION, "3f2a"))
    delete(folder, [f"item-{n}" for n in range(0, COUNT, 9)])
    return VectorIndex(folder)


class Together:
    """The shares of an index; those in `lost` do not answer."""

    def __init__(self, folder: Path, version: str, count: int) -> None:
        self.shares = [IndexShare(folder, version, number, count) for number in range(count)]
        self.lost: set[int] = set()

    def __call__(
        self, queries: NDArray[np.float32], depths: Sequence[int], where: str | None
    ) -> list[Candidates | None]:
        answers = [
            share.scan(queries, depths, where)
            for number, share in enumerate(self.shares)
            if number not in self.lost
        ]
        return merged(answers, depths)


ASKED: dict[str, dict[str, Any]] = {
    "plainly": {},
    "widely filtered": {"where": "price < 8"},
    "narrowly filtered": {"where": "price = 3 and text like '%7%'"},
    "for nothing": {"where": "price > 99"},
    "without some": {"exclude": [f"item-{n}" for n in range(0, 60, 2)]},
    "for one of each content": {"distinct": True},
    "in all ways": {"where": "price <> 5", "exclude": ["item-8", "item-401"], "distinct": True},
    "exactly": {"exact": True},
}


@pytest.mark.parametrize("config", ALL_CODES, ids=NAMES)
@pytest.mark.parametrize("count", [1, 2, 3, 60])
@pytest.mark.parametrize("few_rows", [0, slq.index.segment._FEW_ROWS])
def test_shares_find_together_what_the_whole_index_finds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: IndexConfig,
    count: int,
    few_rows: int,
) -> None:
    monkeypatch.setattr(slq.index.segment, "_FEW_ROWS", few_rows)
    whole = grown(tmp_path, config)
    assert 4 <= num_partitions(whole.manifest) < 60
    together = Together(tmp_path, whole.version, count)
    head = VectorIndex(tmp_path, has_codes=False)
    for how, options in ASKED.items():
        for top_k in (1, 7, COUNT + FURTHER):
            expected = whole.search(QUERIES, top_k, **options)
            found = head.search(QUERIES, top_k, scan=together, **options)
            assert found == expected, how
    alone = head.search(QUERIES[:1], 10, scan=together)
    assert alone == whole.search(QUERIES[:1], 10)


def test_shares_find_together_what_the_whole_index_finds_by_words_too(tmp_path: Path) -> None:
    whole = grown(tmp_path, small_partitions(IndexConfig(words=True), 60))
    head, together = VectorIndex(tmp_path, has_codes=False), Together(tmp_path, whole.version, 3)
    words = [f"t{n} t{n + 1}" for n in range(len(QUERIES))]
    for where in (None, "price < 4"):
        expected = whole.search(QUERIES, 9, words=words, where=where)
        assert head.search(QUERIES, 9, words=words, where=where, scan=together) == expected


@pytest.mark.parametrize("config", ALL_CODES[:2], ids=NAMES[:2])
def test_what_is_left_of_lost_shares_is_the_best_of_their_rows(
    tmp_path: Path, config: IndexConfig
) -> None:
    sized = small_partitions(config, 60).model_copy(update={"num_probes": 8})
    whole = published(tmp_path, sized)
    together, head = Together(tmp_path, whole.version, 3), VectorIndex(tmp_path, has_codes=False)
    rows = {
        number: {
            hit.row
            for hits in head.search(QUERIES, COUNT, scan=_only(together, number))
            for hit in hits
        }
        for number in range(3)
    }
    assert sorted(row for held in rows.values() for row in held) == list(range(COUNT))
    together.lost = {1}
    expected = [
        [hit for hit in hits if hit.row not in rows[1]][:10]
        for hits in whole.search(QUERIES, COUNT)
    ]
    found = head.search(QUERIES, 10, scan=together)
    assert [[hit.id for hit in hits] for hits in found] == [
        [hit.id for hit in hits] for hits in expected
    ]


@pytest.mark.parametrize("config", ALL_CODES, ids=NAMES)
def test_what_is_left_is_found_where_all_codes_of_a_segment_are_lost(
    tmp_path: Path, config: IndexConfig
) -> None:
    published(tmp_path, small_partitions(config, 60))
    append(tmp_path, Content([Given(table(20, seed=5, first=COUNT))], DIMENSION, "3f2a"))
    whole, head = VectorIndex(tmp_path), VectorIndex(tmp_path, has_codes=False)
    count = num_partitions(whole.manifest)
    together = Together(tmp_path, whole.version, count)
    together.lost = {n for n in range(count) if held_by(whole.manifest, n, count)[1]}
    assert 0 < len(together.lost) < count
    for where in (None, "price < 8"):
        for hits in head.search(QUERIES, 6, scan=together, where=where):
            assert len(hits) == 6
            assert all(hit.row < COUNT for hit in hits)


def _only(together: Together, number: int) -> Any:
    share = together.shares[number]
    return lambda queries, depths, where: merged([share.scan(queries, depths, where)], depths)


@pytest.mark.parametrize("config", ALL_CODES, ids=NAMES)
def test_every_code_is_held_once(tmp_path: Path, config: IndexConfig) -> None:
    whole = grown(tmp_path, config)
    shares = Together(tmp_path, whole.version, 3).shares
    assert sum(share.num_vectors for share in shares) == COUNT + FURTHER
    assert all(share.num_vectors < 0.6 * (COUNT + FURTHER) for share in shares)
    assert {(share.version, share.fingerprint) for share in shares} == {("v000003", "3f2a")}


@pytest.mark.parametrize("codes_of", ["int8", "pq4"])
def test_a_share_keeps_no_lists_of_the_file_that_only_has_the_centroids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes_of: str
) -> None:
    whole = grown(tmp_path, next(one for one in ALL_CODES if one.codes == codes_of))
    read = []
    original = codes.read_centroids

    def watching(path: Path) -> Any:
        index = original(path)
        read.append(index.ntotal)
        import faiss

        assert faiss.extract_index_ivf(index).invlists is None
        return index

    monkeypatch.setattr(codes, "read_centroids", watching)
    shares = Together(tmp_path, whole.version, 3).shares
    assert read
    assert shares[0].scan(QUERIES, [5, 5], None)[0] is not None


def test_a_head_without_codes_says_that_someone_must_scan_them(tmp_path: Path) -> None:
    published(tmp_path)
    head = VectorIndex(tmp_path, has_codes=False)
    with pytest.raises(ValueError, match="holds no codes; tell each search who scans them"):
        head.search(QUERIES, 3)
    assert len(head.search(QUERIES, 3, exact=True)) == len(QUERIES)  # which no codes are for


def test_a_filter_that_cannot_be_used_is_refused_before_shares_are_asked(tmp_path: Path) -> None:
    published(tmp_path)

    def never(*_: Any) -> Any:
        raise AssertionError

    head = VectorIndex(tmp_path, has_codes=False)
    with pytest.raises(DataError, match="the filter 'prize < 3' cannot be used"):
        head.search(QUERIES, 3, where="prize < 3", scan=never)


def test_a_share_reads_and_checks_only_what_it_needs(tmp_path: Path) -> None:
    whole = grown(tmp_path, small_partitions(ALL_CODES[3], 60))
    home = tmp_path / SEGMENTS / whole.manifest.segments[0].name
    files = sorted((home / PARTITIONS).glob(f"*/{INDEX}"))
    (home / STAMPS).unlink()
    for path in (files[-1], home / "parts" / "00000" / VECTORS):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    refused = []
    for number in range(3):
        try:
            IndexShare(tmp_path, whole.version, number, 3)
        except ArtifactError as error:
            refused.append(str(error))
    (message,) = refused  # of the one that holds the damaged codes
    assert "does not match the sha256 in its manifest" in message
    with pytest.raises(ArtifactError, match="does not match the sha256"):
        VectorIndex(tmp_path, has_codes=False)  # which answers for all


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_dealing_gives_every_thing_to_one_share_and_evenly(count: int) -> None:
    sizes = np.random.default_rng(3).integers(1, 100, 40).tolist()
    shares = dealt(sizes, count)
    held = [sum(s for s, to in zip(sizes, shares, strict=True) if to == n) for n in range(count)]
    assert sum(held) == sum(sizes)
    assert max(held) - min(held) <= max(sizes)
    assert dealt(sizes, count) == shares


def test_shares_agree_whatever_became_of_a_file(tmp_path: Path) -> None:
    whole = grown(tmp_path, small_partitions(ALL_CODES[3], 60))
    before = [IndexShare(tmp_path, whole.version, n, 3).num_vectors for n in range(3)]
    home = tmp_path / SEGMENTS / whole.manifest.segments[0].name
    lost = sorted((home / PARTITIONS).glob(f"*/{INDEX}"))[-1]
    lost.write_bytes(lost.read_bytes()[:40])
    after: list[int | None] = []
    for number in range(3):
        try:
            after.append(IndexShare(tmp_path, whole.version, number, 3).num_vectors)
        except ArtifactError:
            after.append(None)
    assert after.count(None) == 1
    assert all(b is None or a == b for a, b in zip(before, after, strict=True))


def test_more_shares_than_things_leaves_some_empty() -> None:
    assert sorted(dealt([5, 9], 4)) == [0, 1]
    assert dealt([], 3) == []


def test_merging_keeps_the_best_and_of_equal_scores_the_lower_row() -> None:
    one: Candidates = (np.array([[0.9, 0.5]], np.float32), np.array([[7, 3]]))
    other: Candidates = (np.array([[0.5, 0.4, -np.inf]], np.float32), np.array([[1, 2, -1]]))
    (joined, none) = merged([[one, None], [other, None]], [3, 0])
    assert none is None
    assert joined is not None
    assert joined[1].tolist() == [[7, 1, 3]]
    assert merged([[other]], [2])[0][1].tolist() == [[1, 2]]  # type: ignore[index]


def test_an_empty_share_adds_nothing(tmp_path: Path) -> None:
    whole = published(tmp_path, FLAT)
    empty = IndexShare(tmp_path, whole.version, 1, 2)
    assert empty.num_vectors == 0
    found = whole.search(QUERIES, 4)
    head = VectorIndex(tmp_path, has_codes=False)
    again = head.search(QUERIES, 4, scan=Together(tmp_path, whole.version, 2))
    assert again == found
    assert isinstance(again[0][0], Hit)
