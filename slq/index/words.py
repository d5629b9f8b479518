"""BM25 over the texts of a segment, for queries whose words matter as well as their meaning."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.errors import ConfigError
from slq.index.exact import Rows, Scores

WORDS = "words"
_NONE = "no-words"
_TOKENS = r"(?u)\b\w+\b"  # single letters and digits too
_RANK_OFFSET = 60  # of reciprocal rank fusion (Cormack, Clarke and Buettcher 2009)


def require_words() -> None:
    """Check that the package is there.

    Raises:
        ConfigError: bm25s is not installed.
    """
    _bm25s()


def write_words(folder: Path, texts: Iterable[str | None]) -> None:
    """Write the words of texts; all of them are in memory meanwhile.

    Args:
        folder: Is there, and empty.
        texts: Of all rows, in their order.

    Raises:
        ConfigError: bm25s is not installed.
        OSError: A file cannot be written.
    """
    tokens = _tokens([text or "" for text in texts], ids=True)
    if not any(tokens.ids):
        (folder / _NONE).touch()
        return
    index = _bm25s().BM25(method="lucene")
    index.index(tokens, show_progress=False)
    index.save(folder, show_progress=False)


def _bm25s() -> Any:
    try:
        import bm25s
    except ModuleNotFoundError:
        raise ConfigError("bm25s is not installed: pip install 'slq[words]'") from None
    return bm25s


def _tokens(texts: Sequence[str], *, ids: bool) -> Any:
    return _bm25s().tokenize(
        list(texts), token_pattern=_TOKENS, stopwords=None, return_ids=ids, show_progress=False
    )


def words_of(text: str) -> Counter[str]:
    """How often each word is in a text."""
    (found,) = _tokens([text], ids=False)
    return Counter(found)


class Words:
    """Files of `write_words`, which stay on disk.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _index(self) -> Any:
        if (self._folder / _NONE).exists():
            return None
        return _bm25s().BM25.load(self._folder, mmap=True, show_progress=False)

    @property
    def num_texts(self) -> int:
        """With those that have no words; 0 where none has."""
        return 0 if self._index is None else int(self._index.scores["num_docs"])

    def frequencies(self, words: Iterable[str]) -> dict[str, int]:
        """In how many texts each word is."""
        if self._index is None:
            return dict.fromkeys(words, 0)
        ends, known = self._index.scores["indptr"], self._index.vocab_dict
        return {
            word: int(ends[known[word] + 1] - ends[known[word]]) if word in known else 0
            for word in words
        }

    def scores(self, words: Mapping[str, int], rarity: Mapping[str, float]) -> Scores | None:
        """(rows,) BM25 scores; None where no text has any word.

        Args:
            words: Of the query, and how often each is in it.
            rarity: Inverse document frequency of each over all that is searched, which takes the place of the one over
                these texts.
        """
        if self._index is None:
            return None
        own = inverse_frequencies(self.num_texts, self.frequencies(words))
        total = np.zeros(self.num_texts, np.float32)
        for word, often in words.items():
            if word in self._index.vocab_dict:
                weight = often * rarity[word] / own[word]
                total += np.float32(weight) * np.asarray(self._index.get_scores([word]))
        return total


def inverse_frequencies(num_texts: int, frequencies: Mapping[str, int]) -> dict[str, float]:
    """How rare words are: Lucene's logarithm of texts without a word over those with it."""
    return {
        word: float(np.log(1 + (num_texts - count + 0.5) / (count + 0.5)))
        for word, count in frequencies.items()
    }


def best_words(
    found: Sequence[tuple[Words, NDArray[np.bool_] | None, int]], text: str, top_k: int
) -> Rows:
    """Rows of several segments that share words with a text, best first.

    Args:
        found: Of each segment its words, which of its rows may be found (None for all), and its first row.
        text: The query.
        top_k: Rows at most; those without any of its words are never among them.
    """
    words, totals, num_texts = words_of(text), Counter[str](), 0
    for one, _, _ in found:
        totals.update(one.frequencies(words))
        num_texts += one.num_texts
    rarity = inverse_frequencies(num_texts, {word: totals[word] for word in words})
    rows, scores = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for one, selected, start in found:
        values = one.scores(words, rarity)
        if values is None:
            continue
        if selected is not None:
            values = np.where(selected, values, 0)
        some = np.flatnonzero(values > 0)
        rows.append(some + start)
        scores.append(values[some])
    together, numbers = np.concatenate(scores), np.concatenate(rows)
    best: Rows = numbers[np.lexsort((numbers, -together))[:top_k]]
    return best


def fused(rankings: Sequence[Sequence[int]], top_k: int) -> list[tuple[int, float]]:
    """Reciprocal rank fusion.

    Args:
        rankings: Rows, best first.
        top_k: Rows to keep.

    Returns:
        Rows and the sums of 1 / (60 + rank) over the rankings, best first; of equal sums the lower row.
    """
    sums: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, start=1):
            sums[row] = sums.get(row, 0.0) + 1 / (_RANK_OFFSET + rank)
    return sorted(sums.items(), key=lambda one: (-one[1], one[0]))[:top_k]
