"""What is searched: a synthetic set whose queries are not distributed as it is, or what a recipe has embedded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.choosing import text_queries
from pipelines.embeddings import Embeddings, open_embeddings
from pipelines.recipe import Recipe, load_recipe
from slq.arrow import vector_column
from slq.index.parts import EMBEDDING, matrix

_TOPICS = 1000
_MEANING = 96  # dimensions that image and text share
_STYLE = 64  # dimensions that only one of both has
_SPREAD = 0.7  # of an item about its topic
_GAP = 0.8  # distance of all texts from all images, in the direction that tells them apart
_NOISE = 0.25
BATCH_ROWS = 16_384


class SearchedSet(Protocol):
    """Image vectors and text queries; vectors come a batch at a time, so that memory does not grow with rows."""

    @property
    def num_rows(self) -> int:
        """Images."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def images(self) -> Iterator[NDArray[np.float32]]:
        """(rows, dimension) float32 vectors, a batch at a time."""

    def texts(self, count: int) -> NDArray[np.float32]:
        """(count, dimension) float32 unit vectors of queries."""

    def tables(self) -> Iterator[pa.Table]:
        """The images as rows of a source."""


@dataclass(frozen=True)
class EmbeddedSet:
    """What a recipe has embedded, and its text queries.

    Attributes:
        recipe: With `data.queries`.
        found: The data set.
    """

    recipe: Recipe
    found: Embeddings

    @classmethod
    def of(cls, path: Path) -> "EmbeddedSet":
        """The set of a recipe file.

        Raises:
            ArtifactError: Nothing is embedded yet.
            ConfigError: The recipe cannot be read.
        """
        recipe = load_recipe(path)
        return cls(recipe, open_embeddings(recipe.storage.embeddings, recipe.storage.retry_s))

    @property
    def num_rows(self) -> int:
        """See `SearchedSet`."""
        return self.found.num_rows

    @property
    def dimension(self) -> int:
        """See `SearchedSet`."""
        return self.found.dimension

    def images(self) -> Iterator[NDArray[np.float32]]:
        """See `SearchedSet`."""
        for table in self.tables():
            yield matrix(table[EMBEDDING]).astype(np.float32)

    def texts(self, count: int) -> NDArray[np.float32]:
        """See `SearchedSet`; fewer where the recipe has fewer."""
        return text_queries(self.recipe, self.found, count)

    def tables(self) -> Iterator[pa.Table]:
        """See `SearchedSet`."""
        return self.found.shards.tables()


@dataclass(frozen=True)
class ShiftedSet:
    """Image vectors and text queries; made a batch at a time, so that memory does not grow with rows.

    Image and text of an item share a meaning near one of 1,000 topics. Each has a style of its own in dimensions that
    the other does not use, and all texts lie apart from all images: the gap between modalities. Both make the nearest
    images of a text lie at the edge of where images are, which indexes that are tuned on images do not see.

    Attributes:
        num_rows: Images.
        dimension: Length of a vector.
        seed: Of everything.
    """

    num_rows: int
    dimension: int = 896
    seed: int = 7

    def images(self, first: int = 0, batches: int | None = None) -> Iterator[NDArray[np.float32]]:
        """(rows, dimension) float32 unit vectors, a batch at a time.

        Args:
            first: Batch.
            batches: How many; None for all.
        """
        maps = self._maps()
        end = self.num_rows if batches is None else (first + batches) * BATCH_ROWS
        for start in range(first * BATCH_ROWS, min(end, self.num_rows), BATCH_ROWS):
            rng = np.random.default_rng([self.seed, 1, start])
            count = min(BATCH_ROWS, self.num_rows - start)
            yield self._placed(rng, maps, self._meanings(rng, count), "image")

    def texts(self, count: int) -> NDArray[np.float32]:
        """(count, dimension) float32 unit vectors of queries, each near the meaning of some image."""
        rng = np.random.default_rng([self.seed, 2])
        return self._placed(rng, self._maps(), self._meanings(rng, count), "text")

    def tables(self, first: int = 0, batches: int | None = None) -> Iterator[pa.Table]:
        """The images as rows of a source; arguments as `images`."""
        start = first * BATCH_ROWS
        for vectors in self.images(first, batches):
            ids = [f"i{n}" for n in range(start, start + len(vectors))]
            start += len(vectors)
            yield pa.table({"id": ids, "embedding": vector_column(vectors.astype(np.float16))})

    def _meanings(self, rng: np.random.Generator, count: int) -> NDArray[np.float32]:
        topics = np.random.default_rng([self.seed, 3]).standard_normal((_TOPICS, _MEANING))
        # A few topics hold most items, as on the web.
        shares = 1 / np.arange(1, _TOPICS + 1) ** 0.7
        chosen = rng.choice(_TOPICS, count, p=shares / shares.sum())
        near = topics[chosen] + _SPREAD * rng.standard_normal((count, _MEANING))
        return near.astype(np.float32)

    def _maps(self) -> dict[str, NDArray[np.float32]]:
        rng = np.random.default_rng([self.seed, 4])
        sizes = {"meaning": _MEANING, "image": _STYLE, "text": _STYLE, "gap": 1}
        return {
            name: (rng.standard_normal((size, self.dimension)) / np.sqrt(self.dimension)).astype(
                np.float32
            )
            for name, size in sizes.items()
        }

    def _placed(
        self,
        rng: np.random.Generator,
        maps: dict[str, NDArray[np.float32]],
        meanings: NDArray[np.float32],
        modality: str,
    ) -> NDArray[np.float32]:
        count = len(meanings)
        style = rng.standard_normal((count, _STYLE), dtype=np.float32)
        noise = rng.standard_normal((count, self.dimension), dtype=np.float32)
        side = 0.5 if modality == "image" else -0.5
        vectors = meanings @ maps["meaning"] + 0.5 * (style @ maps[modality])
        scale = np.sqrt(_MEANING)
        vectors += side * _GAP * scale * maps["gap"] + _NOISE * scale * noise / np.sqrt(
            self.dimension
        )
        unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit
