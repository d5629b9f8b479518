"""BM25 over the texts of a segment, for queries whose words matter as well as their meaning."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.errors import ConfigError
from slq.index.exact import Rows, Scores

WORDS = "words"
_TOKENS = r"(?u)\b\w+\b"  # single letters and digits too
_RANK_OFFSET = 60  # of reciprocal rank fusion (Cormack, Clarke and Buettcher 2009)


def write_words(folder: Path, texts: Iterable[str | None]) -> None:
    """Write the words of texts; all of them are in memory meanwhile.

    Args:
        folder: Is there, and empty.
        texts: Of all rows, in their order.

    Raises:
        ConfigError: bm25s is not installed.
        OSError: A file cannot be written.
    """
    index = _bm25s().BM25(method="lucene")
    index.index(_tokens([text or "" for text in texts], ids=True), show_progress=False)
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


class Words:
    """Files of `write_words`, which stay on disk.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._index: Any = _bm25s().BM25.load(folder, mmap=True, show_progress=False)

    def search(
        self, text: str, top_k: int, selected: NDArray[np.bool_] | None = None
    ) -> tuple[Scores, Rows]:
        """Rows that share words with a text, best first.

        Args:
            text: The query.
            top_k: Rows at most; those without any of its words are never among them.
            selected: (rows,) those that may be found; None for all.

        Returns:
            (found,) scores and rows.
        """
        (tokens,) = _tokens([text], ids=False)
        mask = None if selected is None else selected.astype(np.float32)
        scores: Scores = np.asarray(self._index.get_scores(tokens, weight_mask=mask), np.float32)
        rows = np.flatnonzero(scores > 0)
        best = rows[np.lexsort((rows, -scores[rows]))[:top_k]]
        return scores[best], best.astype(np.int64)


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
