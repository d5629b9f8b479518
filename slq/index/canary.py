"""Items with inputs and vectors that lie beside an index: a replica that is to embed queries embeds them first.

A fingerprint names a model by its settings; weights that were exchanged under the same name show here.
"""

import hashlib
import uuid
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from slq.errors import ArtifactError, ArtifactMismatchError, StorageError
from slq.files import read_json, write_json
from slq.index.checks import require_file
from slq.index.parts import EMBEDDING, matrix
from slq.index.vectors import unit
from slq.index.versions import CANARY, read_manifest
from slq.media import decode_image
from slq.quantization import cut
from slq.schema import Item

KEPT = "canaries"
_LEAST_COSINE = 0.99  # other hardware and types stay far above, other weights far below


class Encodes(Protocol):
    """What embeds items, as `slq.encoder.Encoder`."""

    def encode(self, inputs: list[Any]) -> NDArray[np.float32]:
        """(inputs, dimension) float32 unit vectors."""


def require_canary(folder: Path, version: str, encoder: Encodes) -> int:
    """Embed the items anew and compare.

    Args:
        folder: The index folder.
        version: Of the index.
        encoder: Is to embed queries.

    Returns:
        How many items there are; 0 for an index that was built without.

    Raises:
        ArtifactError: The file is missing or is not what was written.
        ArtifactMismatchError: The encoder gives other vectors; the worst item is named.
    """
    manifest, path = read_manifest(folder, version), folder / version / CANARY
    if manifest.canary_sha256 is None:
        return 0
    require_file(path, manifest.canary_sha256)
    return _require_same(path, encoder, f"index {folder} ({version})")


def keep_canary(folder: Path, data: bytes, fingerprint: str) -> None:
    """Store items of an embedding space whose vectors another engine holds.

    Args:
        folder: Of the run's index.
        data: A Parquet file.
        fingerprint: Of the embedding space.

    Raises:
        StorageError: It cannot be written.
    """
    home = folder / KEPT
    path, record = home / f"{fingerprint}.parquet", home / f"{fingerprint}.json"
    try:
        home.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error}; free space or choose another folder"
        ) from None
    write_json(record, {"sha256": hashlib.sha256(data).hexdigest()})


def require_kept_canary(folder: Path, fingerprint: str, encoder: Encodes) -> int:
    """As `require_canary`, with the items of `keep_canary`; 0 where none were kept.

    Args:
        folder: Of the run's index.
        fingerprint: Of the embedding space.
        encoder: Is to embed queries.

    Raises:
        ArtifactError: The file is missing or is not what was written.
        ArtifactMismatchError: The encoder gives other vectors; the worst item is named.
    """
    record = folder / KEPT / f"{fingerprint}.json"
    if not record.exists():
        return 0
    path = record.with_suffix(".parquet")
    require_file(path, read_json(record)["sha256"])
    return _require_same(path, encoder, "the collection of its index")


def _require_same(path: Path, encoder: Encodes, holder: str) -> int:
    try:
        table = pq.read_table(path, columns=["id", "text", "image", EMBEDDING])
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    items = [
        Item(id=row["id"], text=row["text"], image=row["image"] and decode_image(row["image"]))
        for row in table.drop_columns([EMBEDDING]).to_pylist()
    ]
    stored = unit(matrix(table[EMBEDDING]))
    found = cut(encoder.encode(list(items)), stored.shape[1])
    cosines = (stored * found).sum(axis=1)
    worst = int(cosines.argmin())
    if not cosines[worst] >= _LEAST_COSINE:  # nor where it is NaN
        raise ArtifactMismatchError(
            f"the model embeds item {items[worst].id!r} otherwise than {holder} holds it: cosine "
            f"{cosines[worst]:.3f}; its weights are others, though the fingerprint is the same"
        )
    return len(items)
