"""What mining does in Ray tasks: embeds pairs that it reads itself, searches, and scores with the fine stage."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.loading import encoder_of, reranker_of, scoring_backbone, use_processors
from pipelines.pairs import Pairs
from pipelines.recipe import MineConfig, Recipe
from slq.artifacts import require_same_fingerprint
from slq.encoder import Encoder
from slq.errors import DataError
from slq.mining import hard_negatives
from slq.reranker import Reranker
from slq.schema import Item
from slq.training import Side

NONE = -1
"""Stands for a gallery row where there is none."""
_READ_BATCHES = 8  # decoded at a time; all images of a part would not fit into memory
_READ_THREADS = 4


@dataclass(frozen=True)
class Job:
    """What every task needs to know.

    Attributes:
        recipe_json: The resolved recipe.
        fingerprint: That of the adapter which mines; workers keep its encoder from task to task.
    """

    recipe_json: str
    fingerprint: str


@dataclass(frozen=True)
class Gallery:
    """The distinct queries (images, as a rule) that are searched.

    Attributes:
        vectors: (images, hidden) float32 unit vectors.
        pairs: (images,) int64, a pair of each.
        images: (images,) int64, number of the image key of each; two composed queries may share an image.
    """

    vectors: NDArray[np.float32]
    pairs: NDArray[np.int64]
    images: NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """Positives (captions) of one task.

    Attributes:
        places: (captions,) int64 positions in the task's vectors.
        own: (captions,) int64, the gallery row of each one's own query.
        right: For each the numbers of all images that are known to be right: its own and those with the same text.
    """

    places: NDArray[np.int64]
    own: NDArray[np.int64]
    right: list[frozenset[int]]


@dataclass(frozen=True)
class Mined:
    """Negatives of some captions, most similar first.

    Attributes:
        rows: (captions, per_pair) int64 gallery rows, -1 where there are fewer.
        similarities: (captions, per_pair) float32 cosines.
        num_doubtful: Candidates that were left out as possible right answers.
    """

    rows: NDArray[np.int64]
    similarities: NDArray[np.float32]
    num_doubtful: int


@lru_cache(maxsize=1)
def _encoder(job: Job) -> tuple[Recipe, Encoder]:
    """One encoder per worker process, whatever the number of its tasks."""
    recipe = Recipe.model_validate_json(job.recipe_json)
    use_processors(recipe.embed.num_threads)
    encoder = encoder_of(recipe)
    require_same_fingerprint(
        job.fingerprint,
        encoder.fingerprint,
        expected_in=f"adapter {recipe.storage.adapter}",
        found_in="the recipe's backbone with it",
        remedy="mine with the backbone section that it was trained with",
    )
    return recipe, encoder


@lru_cache(maxsize=1)
def _reranker(job: Job) -> tuple[Recipe, Reranker]:
    recipe, encoder = _encoder(job)
    return recipe, reranker_of(recipe, scoring_backbone(recipe, encoder))


def _pairs(recipe: Recipe) -> Pairs:
    path = recipe.data.path("train")
    return _opened(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _opened(path: Path, changed_ns: int) -> Pairs:  # noqa: ARG001 - a changed file is another one
    return Pairs(path)


def _blocks(numbers: NDArray[np.int64], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size].tolist()


def _read(pairs: Pairs, numbers: Sequence[int], side: Side) -> list[Item | str]:
    """One side of pairs, or why it cannot be read; in threads, as a store answers slowly."""

    def attempt(number: int) -> Item | str:
        try:
            return pairs.item(number, side)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return list(pool.map(attempt, numbers))


def _read_again(pairs: Pairs, numbers: Sequence[int], side: Side) -> list[Item]:
    """One side of pairs that could be read before."""
    items = []
    for read in _read(pairs, numbers, side):
        if isinstance(read, str):
            raise DataError(f"a pair changed while it was mined: {read}; run `slq mine` again")
        items.append(read)
    return items


def embed_part(
    job: Job, numbers: NDArray[np.int64], side: Side
) -> tuple[NDArray[np.float32], tuple[NDArray[np.int64], dict[int, str]]]:
    """One side of some pairs.

    Returns:
        (read, hidden) float32 unit vectors; and (read,) int64, the pairs that could be read, with the reason of each
        other.
    """
    recipe, encoder = _encoder(job)
    batch_size = recipe.embed.batch_size
    vectors, kept, lost = [], [], {}
    for block in _blocks(numbers, _READ_BATCHES * batch_size):
        items = []
        for number, read in zip(block, _read(_pairs(recipe), block, side), strict=True):
            if isinstance(read, str):
                lost[number] = read
            else:
                items.append(read)
                kept.append(number)
        vectors.append(encoder.encode(items, batch_size=batch_size))
    return np.concatenate(vectors), (np.array(kept, dtype=np.int64), lost)


def search_part(
    config: MineConfig,
    index: Any,
    gallery: Gallery,
    vectors: NDArray[np.float32],
    asked: Asked,
) -> Mined:
    """Negatives of some captions.

    Args:
        config: How many, and what is too similar.
        index: A faiss index of the gallery's vectors, with its rows as ids.
        gallery: What is searched.
        vectors: (embedded, hidden) float32 of the captions of one embedding task.
        asked: Which of those, and what is known of them.
    """
    captions = np.ascontiguousarray(vectors[asked.places])
    similarities, rows = index.search(captions, min(config.depth, len(gallery.pairs)))
    images = gallery.images[rows].tolist()
    known = [[n in right for n in row] for row, right in zip(images, asked.right, strict=True)]
    kept, doubtful = hard_negatives(
        similarities,
        np.einsum("nd,nd->n", captions, gallery.vectors[asked.own]),
        np.array(known) | (rows < 0),  # an ivf index may find too few
        per_pair=config.per_pair,
        max_share_of_positive=config.max_share_of_positive,
    )
    order = np.argsort(~kept, axis=1, kind="stable")[:, : config.per_pair]  # what is kept, first
    chosen = np.where(
        np.take_along_axis(kept, order, axis=1), np.take_along_axis(rows, order, axis=1), NONE
    )
    best = np.take_along_axis(similarities, order, axis=1)
    return Mined(chosen, best, int(doubtful.sum()))


def score_part(
    job: Job, images: NDArray[np.int64], captions: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Margins of the query of pair `images[n]` with the positive of pair `captions[n]`: (n,) float32.

    Raises:
        DataError: A pair that was embedded cannot be read any more.
    """
    recipe, reranker = _reranker(job)
    pairs, size = _pairs(recipe), _READ_BATCHES * recipe.rerank.batch_size
    margins = []
    for shown, asked in zip(_blocks(images, size), _blocks(captions, size), strict=True):
        distinct = list(dict.fromkeys(shown))  # pairs share a prefix by the identity of their image
        queries = dict(zip(distinct, _read_again(pairs, distinct, "query"), strict=True))
        texts = _read_again(pairs, asked, "positive")
        duos = [(text, queries[n]) for n, text in zip(shown, texts, strict=True)]
        margins.append(reranker.score(duos).numpy())
    found: NDArray[np.float32] = np.concatenate(margins)
    return found
