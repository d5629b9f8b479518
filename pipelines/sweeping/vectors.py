"""Gallery and queries as vectors: those of the run's data set where they fit, embedded once where there are none."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipelines.benchmark import Benchmark
from pipelines.corpus import corpus_of
from pipelines.embedding.prepare import content_hash
from pipelines.embeddings import Embeddings, open_embeddings
from pipelines.kept_parts import content_digest
from pipelines.ledger_reader import LedgerReader
from pipelines.progress import show
from pipelines.recipe import Recipe
from slq.artifacts import load_adapter_config, require_same_fingerprint
from slq.errors import DataError
from slq.index.parts import EMBEDDING, matrix
from slq.index.vectors import unit
from slq.quantization import cut
from slq.schema import Item

_FILE = "vectors.safetensors"
Encode = Callable[[Sequence[Item], str], NDArray[np.float32]]
"""Gives (items, dimension) float32 unit vectors; also told what they are, for people."""


@dataclass(frozen=True)
class Vectors:
    """What is searched, and what asks.

    Attributes:
        gallery: (items, dimension) float32 unit vectors of what float16 keeps of the encoder's, as data sets do.
        queries: (queries, dimension) float32 unit vectors.
        origin: Where the gallery's come from.
        encoded: Items and queries that an encoder saw now.
    """

    gallery: NDArray[np.float32]
    queries: NDArray[np.float32]
    origin: str
    encoded: int

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.gallery.shape[1])

    @cached_property
    def sha256(self) -> str:
        """Of all values."""
        digest = hashlib.sha256()
        for one in (self.gallery, self.queries):
            digest.update(json.dumps(one.shape).encode())
            digest.update(np.ascontiguousarray(one).data)
        return digest.hexdigest()


def committed(recipe: Recipe) -> Embeddings | None:
    """The data set of the recipe; None where none is finished.

    Raises:
        ArtifactError: It is damaged, or there is no adapter.
        ArtifactMismatchError: It is of another embedding space than the adapter; both fingerprints are named.
        StorageError: It cannot be read.
    """
    storage = recipe.storage
    adapter = load_adapter_config(storage.adapter)
    if LedgerReader(storage.embeddings, storage.retry_s).manifest() is None:
        return None
    found = open_embeddings(storage.embeddings, storage.retry_s)
    require_same_fingerprint(
        found.fingerprint,
        adapter.fingerprint,
        expected_in=f"data set {storage.embeddings}",
        found_in=f"adapter {storage.adapter}",
        remedy="embed the corpus anew with `slq embed` into another storage.embedding_dir, or name that adapter",
    )
    return found


def vectors_of(
    recipe: Recipe, benchmark: Benchmark, found: Embeddings | None, encode: Encode
) -> Vectors:
    """Vectors of gallery and queries; what is there already is not embedded again.

    Args:
        recipe: The resolved recipe.
        benchmark: Gallery and queries.
        found: As of `committed`.
        encode: Called for what is nowhere yet.

    Raises:
        ArtifactError: A shard of the data set is damaged; it is named.
        DataError: The data set holds other items than the gallery.
        StorageError: The data set cannot be read, or what was embedded cannot be written.
    """
    path = recipe.storage.sweep / _FILE
    content = content_digest(benchmark.items, benchmark.queries)
    fingerprint = load_adapter_config(recipe.storage.adapter).fingerprint
    identity = {"fingerprint": fingerprint, "content": content}
    kept = _kept(path, identity)
    encoded = 0

    def made(name: str, items: Sequence[Item]) -> NDArray[np.float32]:
        nonlocal encoded
        if name not in kept:
            kept[name] = encode(items, name)
            encoded += len(items)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            save_file(kept, partial, metadata=identity)
            partial.replace(path)
        return kept[name]

    queries = made("queries", benchmark.queries)
    if found is None:
        show(f"no finished data set at {recipe.storage.embeddings}: the gallery is embedded here")
        gallery = unit(made("gallery", benchmark.items).astype(np.float16))
        return Vectors(gallery, queries, "embedded by this sweep", encoded)
    gallery = _stored(recipe, benchmark, found)
    return Vectors(gallery, cut(queries, found.dimension), recipe.storage.embeddings, encoded)


def _kept(path: Path, identity: dict[str, str]) -> dict[str, NDArray[np.float32]]:
    """What an earlier run has embedded of the same content in the same space."""
    try:
        with safe_open(path, "numpy") as file:
            if file.metadata() == identity:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (FileNotFoundError, SafetensorError):
        pass  # a damaged file holds nothing that cannot be made again
    return {}


def _stored(recipe: Recipe, benchmark: Benchmark, found: Embeddings) -> NDArray[np.float32]:
    """(items, dimension) float32 unit vectors of the gallery's items out of the data set."""
    contents = {record.id: content_hash(record) for record in corpus_of(recipe).all_records()}
    place = {item.id: n for n, item in enumerate(benchmark.items)}
    vectors = np.zeros((len(place), found.dimension), np.float32)
    missing = dict(place)
    for table in found.shards.tables():
        values = unit(matrix(table[EMBEDDING]))
        ids, hashes = table["id"].to_pylist(), table["content_hash"].to_pylist()
        for row, (name, content) in enumerate(zip(ids, hashes, strict=True)):
            if name not in place or contents[name] != content:
                raise _other_items(
                    recipe, f"it holds {name!r}, which the gallery has not, or not so"
                )
            vectors[place[name]] = values[row]
            missing.pop(name, None)
    if missing:
        raise _other_items(recipe, f"it lacks {next(iter(missing))!r}")
    return vectors


def _other_items(recipe: Recipe, what: str) -> DataError:
    return DataError(
        f"data set {recipe.storage.embeddings} is not of the gallery {recipe.data.corpus_location}: {what}; embed the "
        "corpus anew with `slq embed` into another storage.embedding_dir"
    )


def encoded_part(recipe_json: str, items: list[Item]) -> NDArray[Any]:
    """A Ray task: vectors of items by the trained adapter."""
    from pipelines.sweeping.models import loaded

    recipe, encoder = loaded(recipe_json)
    return encoder.encode(items, batch_size=recipe.embed.batch_size)
