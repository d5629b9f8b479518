"""Search by words: BM25 against its formula, joined with vectors by reciprocal ranks, within the same filters."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from slq.arrow import vector_column
from slq.errors import DataError
from slq.index import Content, IndexConfig, VectorIndex, append, compact, delete, write_version
from slq.index.words import (
    Words,
    best_words,
    fused,
    inverse_frequencies,
    words_of,
    write_words,
)
from tests.unit.index_data import COUNT, DIMENSION, Given, published, table, unit_vectors

TEXTS = [
    "a red fox",
    "two red foxes, a fox and a bee",
    None,
    "",
    "Bee above THE castle",
    "a fox",
    "schl\u00f6sser am fluss",
]
K1, B = 1.5, 0.75
WITH_WORDS = IndexConfig(words=True)


def tokens(text: str | None) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in (text or "").lower()).split()


def bm25(query: str) -> list[float]:
    """Robertson and Zaragoza 2009 with the idf of Lucene, term by term."""
    documents = [tokens(text) for text in TEXTS]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        total = 0.0
        for term in tokens(query):
            holding = sum(term in document for document in documents)
            if not holding:
                continue
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            often = words.count(term)
            total += idf * often / (often + K1 * (1 - B + B * len(words) / mean))
        scores.append(total)
    return scores


def ranked(query: str) -> list[int]:
    scores = bm25(query)
    return sorted((n for n, value in enumerate(scores) if value), key=lambda n: (-scores[n], n))


def scores_of(words: Words, query: str) -> list[float]:
    counts = words_of(query)
    rarity = inverse_frequencies(words.num_texts, words.frequencies(counts))
    scores = words.scores(counts, rarity)
    assert scores is not None
    found: list[float] = scores.tolist()
    return found


@pytest.mark.parametrize(
    "query", ["fox", "a red bee", "Castle, castle!", "SCHL\u00d6SSER", "unknown"]
)
def test_scores_are_those_of_the_formula(tmp_path: Path, query: str) -> None:
    write_words(tmp_path, TEXTS)
    words = Words(tmp_path)
    np.testing.assert_allclose(scores_of(words, query), bm25(query), rtol=1e-5)
    assert best_words([(words, None, 0)], query, 10).tolist() == ranked(query)


def test_only_selected_rows_are_found(tmp_path: Path) -> None:
    write_words(tmp_path, TEXTS)
    words = Words(tmp_path)
    selected = np.array([False, True, True, True, True, True, True])
    everything = ranked("a red fox")
    assert everything[0] == 0
    assert best_words([(words, selected, 0)], "a red fox", 10).tolist() == everything[1:]
    assert best_words([(words, None, 0)], "a red fox", 1).tolist() == [0]


def test_segments_are_scored_as_if_they_were_one(tmp_path: Path) -> None:
    """A word that is rare over all is rare in a segment of one text, where every word is in all texts."""
    many = [f"a red fox number {n}" for n in range(200)]
    found = []
    for number, texts in enumerate((many, ["red zebrafish"], [None, ""])):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_words(folder, texts)
        found.append((Words(folder), None, (0, 200, 201)[number]))
    assert best_words(found, "red zebrafish", 5).tolist()[0] == 200
    together = tmp_path / "together"
    together.mkdir()
    write_words(together, [*many, "red zebrafish"])
    counts = words_of("red zebrafish")
    whole = scores_of(Words(together), "red zebrafish")
    rarity = inverse_frequencies(201, {"red": 201, "zebrafish": 1})
    one = found[1][0].scores(counts, rarity)
    assert one is not None
    assert one[0] == pytest.approx(
        whole[200], rel=0.35
    )  # lengths are compared with those of a segment


@pytest.mark.parametrize("query", ["", "!!!", "fox"])
def test_nothing_is_found_by_no_words_or_in_none(tmp_path: Path, query: str) -> None:
    write_words(tmp_path, [None, "", "  "])
    assert best_words([(Words(tmp_path), None, 0)], query, 5).tolist() == []
    other = tmp_path / "other"
    other.mkdir()
    write_words(other, TEXTS)
    assert len(best_words([(Words(other), None, 0)], query, 5)) == (3 if query == "fox" else 0)


def test_reciprocal_ranks_are_summed() -> None:
    found = fused([[7, 3, 9], [3, 8]], 3)
    assert [row for row, _ in found] == [3, 7, 8]
    assert [value for _, value in found] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])
    assert fused([[], []], 3) == []


def with_texts(folder: Path, config: IndexConfig = WITH_WORDS) -> VectorIndex:
    rows = table(len(TEXTS)).set_column(2, "text", pa.array(TEXTS))
    content = Content([Given(rows.slice(0, 3)), Given(rows.slice(3))], DIMENSION, "3f2a")
    write_version(folder, content, config)
    return VectorIndex(folder)


def test_a_hybrid_search_joins_both_rankings_and_keeps_filters(tmp_path: Path) -> None:
    index = with_texts(tmp_path)
    queries = unit_vectors(2, seed=1)
    dense = [[hit.row for hit in hits] for hits in index.search(queries, len(TEXTS))]
    lexical = [ranked("red fox"), ranked("fluss")]
    found = index.search(queries, 5, words=["red fox", "fluss"])
    for hits, by_vector, by_words in zip(found, dense, lexical, strict=True):
        expected = fused([by_vector, by_words], 5)
        assert [hit.row for hit in hits] == [row for row, _ in expected]
        assert [hit.score for hit in hits] == pytest.approx([value for _, value in expected])
    some = index.search(queries, 9, words=["red fox", "fluss"], where="price in (1, 6)")
    assert [{hit.row for hit in hits} for hits in some] == [{1, 6}] * 2
    without = index.search(queries[:1], 9, words=["red fox"], exclude=["item-0"])
    assert "item-0" not in [hit.id for hit in without[0]]
    with pytest.raises(DataError, match="there are 1 texts for 2 queries"):
        index.search(queries, 5, words=["fox"])


def test_words_of_deleted_appended_and_joined_rows(tmp_path: Path) -> None:
    with_texts(tmp_path)
    delete(tmp_path, ["item-0"])
    more = table(2, first=len(TEXTS)).set_column(2, "text", pa.array(["one red fox", "none"]))
    append(tmp_path, Content([Given(more)], DIMENSION, "3f2a"))
    query = unit_vectors(1, seed=1)
    for number in range(2):
        index = VectorIndex(tmp_path)
        (hits,) = index.search(query, 20, words=["red fox"])
        ids = [hit.id for hit in hits]
        assert "item-0" not in ids
        assert len(ids) == len(set(ids)) == len(TEXTS) + 1
        found = {hit.id: hit.score for hit in hits}
        both = {name for name, score in found.items() if score > 1 / 61}
        assert both == {"item-1", "item-5", f"item-{len(TEXTS)}"}
        if number == 0:
            compact(tmp_path)


def test_an_index_without_words_or_items_without_texts_say_so(tmp_path: Path) -> None:
    index = published(tmp_path / "plain")
    with pytest.raises(
        DataError, match=r"keeps no words of texts; build it with --set index\.words"
    ):
        index.search(unit_vectors(1), 5, words=["fox"])
    rows = pa.table({"id": ["x"], "embedding": vector_column(unit_vectors(1).astype(np.float16))})
    with pytest.raises(DataError, match="no column `text`"):
        write_version(tmp_path / "none", Content([Given(rows)], DIMENSION, "3f2a"), WITH_WORDS)
    assert len(index) == COUNT
