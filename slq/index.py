"""Nearest-neighbour search over embeddings with faiss; scores are inner products of unit vectors, so cosines.

An index folder holds immutable versions and a pointer file. A version is complete before the pointer names it, so a
reader never sees half of one; every file's sha256 stands in its manifest and is checked on load.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from slq.config import Section
from slq.errors import ArtifactError, ConfigError, StorageError
from slq.files import file_sha256, read_json, write_json
from slq.quantization import cut

POINTER = "CURRENT"
MANIFEST = "manifest.json"
VECTORS = "index.faiss"
ROWS = "items.parquet"


class IndexConfig(Section):
    """How the index is built."""

    kind: Literal["flat", "ivf"] = "flat"
    """`flat` compares with every vector (exact); `ivf` visits the nearest lists only."""
    num_lists: Annotated[int, Field(gt=0)] = 64
    """Inverted lists of `ivf`."""
    num_probes: Annotated[int, Field(gt=0)] = 16
    """Lists visited per query by `ivf`."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result."""

    id: str
    score: float
    row: int


def build(config: IndexConfig, vectors: NDArray[np.float32]) -> Any:
    """A faiss index of (n, dimension) float32 unit vectors with explicit ids 0..n-1.

    Raises:
        ConfigError: `ivf` has more lists than vectors.
    """
    import faiss

    count, dimension = vectors.shape
    base: Any = faiss.IndexFlatIP(dimension)
    if config.kind == "ivf":
        if config.num_lists > count:
            raise ConfigError(
                f"index.num_lists is {config.num_lists}, but there are only {count} vectors"
            )
        base = faiss.IndexIVFFlat(base, dimension, config.num_lists, faiss.METRIC_INNER_PRODUCT)
        base.cp.seed = config.seed
        base.cp.min_points_per_centroid = 1
        base.train(vectors)
        base.nprobe = config.num_probes
        base.add_with_ids(vectors, np.arange(count, dtype=np.int64))
        return base
    index = faiss.IndexIDMap(base)
    index.add_with_ids(vectors, np.arange(count, dtype=np.int64))
    return index


def publish(
    folder: Path, index: Any, rows: pa.Table, *, fingerprint: str, config: IndexConfig
) -> str:
    """Write a new immutable version and point to it.

    Args:
        folder: The index folder; older versions stay.
        index: As built.
        rows: One row per vector in id order, with a column `id`.
        fingerprint: The embedding space's.
        config: How it was built.

    Returns:
        The version's name.

    Raises:
        StorageError: It cannot be written; the old version stays in place.
    """
    import faiss

    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = [int(path.name[1:]) for path in folder.glob("v[0-9]*") if path.name[1:].isdigit()]
        version = f"v{max(known, default=0) + 1:06d}"
        partial = folder / f".{version}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / VECTORS).write_bytes(faiss.serialize_index(index).tobytes())
        pq.write_table(rows, partial / ROWS, compression="zstd")
        manifest = {
            "version": version,
            "fingerprint": fingerprint,
            "num_vectors": rows.num_rows,
            "dimension": int(index.d),
            "config": config.model_dump(),
            "sha256": {name: file_sha256(partial / name) for name in (VECTORS, ROWS)},
        }
        write_json(partial / MANIFEST, manifest)
        partial.rename(folder / version)
        pointer = folder / f"{POINTER}.partial"
        pointer.write_text(version + "\n")
        os.replace(pointer, folder / POINTER)  # noqa: PTH105 - the atomic step deserves its plain name
    except OSError as error:
        raise StorageError(
            f"index {folder} cannot be written: {error}; free space or choose another folder"
        ) from None
    return version


class VectorIndex:
    """A loaded version of an index.

    Args:
        folder: The index folder.
        version: A version's name; the current one by default.

    Raises:
        ArtifactError: There is no index, or a file does not match its recorded sha256.
    """

    def __init__(self, folder: Path, version: str | None = None) -> None:
        import faiss

        self.version = version or current_version(folder)
        home = folder / self.version
        self.manifest: dict[str, Any] = read_json(home / MANIFEST)
        for name, recorded in self.manifest["sha256"].items():
            if not (home / name).is_file() or file_sha256(home / name) != recorded:
                raise ArtifactError(
                    f"{home / name} does not match the sha256 in its manifest; rebuild with `slq index`"
                )
        blob = np.frombuffer((home / VECTORS).read_bytes(), dtype=np.uint8)
        self._index: Any = faiss.deserialize_index(blob)
        self.rows = pq.read_table(home / ROWS)
        self._ids = self.rows["id"].to_pylist()

    @property
    def fingerprint(self) -> str:
        """Of the embedding space that the vectors live in."""
        return str(self.manifest["fingerprint"])

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, vectors: NDArray[np.float32], top_k: int) -> list[list[Hit]]:
        """The best items for each query vector, best first.

        Args:
            vectors: (queries, dimension) float32 unit vectors; longer ones are cut as the index's own were.
            top_k: Results per query; fewer come back when the index is smaller.

        Raises:
            DataError: They are shorter than the index's.
        """
        if vectors.shape[1] != self._index.d:
            vectors = cut(vectors, self._index.d)
        scores, rows = self._index.search(np.ascontiguousarray(vectors), min(top_k, len(self)))
        return [
            [
                Hit(self._ids[row], float(score), int(row))
                for score, row in zip(scores[q], rows[q], strict=True)
                if row >= 0
            ]
            for q in range(len(vectors))
        ]

    def row(self, number: int) -> dict[str, Any]:
        """The stored columns of one item."""
        return {name: self.rows[name][number].as_py() for name in self.rows.column_names}


def current_version(folder: Path) -> str:
    """The version that the pointer names.

    Raises:
        ArtifactError: `folder` holds no index.
    """
    try:
        return (folder / POINTER).read_text().strip()
    except OSError:
        raise ArtifactError(f"{folder} holds no index; build one with `slq index`") from None
