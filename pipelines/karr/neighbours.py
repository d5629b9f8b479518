"""Vectors of the images, which say what the neighbours of each are."""

import io
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.fetching import fetch_images
from pipelines.loading import encoder_of, use_processors
from pipelines.recipe import Recipe
from pipelines.storage import Store
from pipelines.tasks import collect, model_task, parts
from slq.arrow import vector_column
from slq.encoder import Encoder
from slq.errors import ArtifactError, DataError
from slq.media import decode_image
from slq.schema import Item

VECTORS = "vectors.parquet"


def embed_images(
    recipe: Recipe, rows: Sequence[dict[str, Any]], store: Store, *, again: bool = False
) -> None:
    """Embed every image that captions belong to, once, and store the vectors; an unreadable image has none.

    Args:
        recipe: The resolved recipe.
        rows: Of the plan.
        store: Where they go.
        again: Embed what has no vector yet where the others have theirs.

    Raises:
        ArtifactError: Stored vectors are damaged.
        StorageError: A store cannot be reached.
    """
    begun = store.exists(VECTORS)
    if begun and not again:
        return
    before = [table for table in ([_readable(store)] if begun else []) if table.num_rows]
    done = {name for table in before for name in table["id"].to_pylist()}
    places = image_places(rows)
    ids = [name for name in places if name not in done]
    if begun and not ids:
        return
    uris = [places[name] for name in ids]
    task = model_task(image_vectors, recipe.resources.gpus_per_worker)
    recipe_json = recipe.model_dump_json()
    tasks = [task.remote(recipe_json, uris[part]) for part in parts(len(uris))]
    found = collect(tasks, "karr: images embedded, part")
    vectors = np.concatenate([one for one, _ in found]) if found else np.zeros((0, 1), np.float32)
    readable = [good for _, goods in found for good in goods]
    table = pa.table({"id": pa.array(ids), "readable": pa.array(readable, pa.bool_())})
    table = table.append_column("vector", vector_column(vectors))
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables([*before, table]), sink, compression="zstd")
    (store.write if begun else store.create)(VECTORS, sink.getvalue())


def _readable(store: Store) -> pa.Table:
    """The vectors of images that could be read.

    Raises:
        ArtifactError: They are missing or damaged.
    """
    try:
        with store.open(VECTORS) as file:
            table = pq.read_table(file)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{store.url(VECTORS)} cannot be read: {error}; remove it and run `slq karr` again"
        ) from None
    return table.filter(table["readable"])


def image_places(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Where the image of each item is, of the plan's captions that nothing rejects; others may know no place."""
    return {row["item_id"]: row["uri"] for row in rows if row["reason"] is None}


@cache
def _encoder(recipe_json: str) -> Encoder:
    recipe = Recipe.model_validate_json(recipe_json)
    use_processors(recipe.eval.num_threads)
    return encoder_of(recipe, recipe.karr.identify.system)


def image_vectors(recipe_json: str, uris: list[str]) -> tuple[NDArray[np.float32], list[bool]]:
    """Vectors (n, dimension) float32, zeros where an image cannot be read, and which ones could be."""
    recipe = Recipe.model_validate_json(recipe_json)
    encoder, size = _encoder(recipe_json), recipe.embed.batch_size
    vectors = np.zeros((len(uris), encoder.dimension), dtype=np.float32)
    readable = [False] * len(uris)
    for start in range(0, len(uris), size):
        chunk = uris[start : start + size]
        images = fetch_images(list(dict.fromkeys(chunk)), recipe.storage.retry_s)
        items = {}
        for place, uri in enumerate(chunk, start):
            data = images[uri]
            try:
                if isinstance(data, bytes):
                    items[place] = Item(image=decode_image(data))
            except DataError:
                continue  # the shard of its captions counts it
        if items:
            vectors[list(items)] = encoder.encode_items(list(items.values())).cpu().numpy()
        for place in items:
            readable[place] = True
    return vectors, readable


class Neighbours:
    """Which images are nearest to which.

    Args:
        store: That holds the vectors.
        count: Neighbours of an image.

    Raises:
        ArtifactError: The vectors are missing or damaged.
    """

    def __init__(self, store: Store, count: int) -> None:
        table = _readable(store)
        self.ids: list[str] = table["id"].to_pylist()
        flat = table["vector"].combine_chunks().flatten().to_numpy()
        self.vectors: NDArray[np.float32] = flat.reshape(-1, table["vector"].type.list_size)
        self._places = {name: place for place, name in enumerate(self.ids)}
        self._count = count

    def around(self, item_id: str) -> list[int]:
        """Places of an image, first its own, then those of its neighbours from the nearest on; empty if unknown."""
        place = self._places.get(item_id)
        if place is None:
            return []
        cosines = self.vectors @ self.vectors[place]
        cosines[place] = -np.inf
        order = np.argsort(-cosines, kind="stable")[: min(self._count, len(self.ids) - 1)]
        return [place, *order.tolist()]
