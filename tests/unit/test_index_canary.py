"""Items that lie beside an index: an encoder that embeds them otherwise is refused, whatever its fingerprint says."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from slq.arrow import vector_column
from slq.engines import IndexPlace
from slq.errors import ArtifactError, ArtifactMismatchError, StorageError
from slq.index import Content, append, compact, current_version, delete, write_version
from slq.index.canary import KEPT, keep_canary, require_canary
from slq.index.versions import CANARY
from tests.unit.index_data import COUNT, DIMENSION, FLAT, Given, published, table, unit_vectors

VECTORS = unit_vectors(4, seed=8)


class Encoder:
    """Knows four items: two texts, and two images of one colour each."""

    def __init__(self, changed: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
        self.changed = changed

    def encode(self, inputs: list[Any]) -> NDArray[np.float32]:
        numbers = [
            int(one.text) if one.image is None else one.image.getpixel((0, 0))[0] // 100
            for one in inputs
        ]
        return self.changed(VECTORS[numbers])


def png(red: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(sink, "PNG")
    return sink.getvalue()


def canary() -> bytes:
    rows = pa.table(
        {
            "id": ["c0", "c1", "c2", "c3"],
            "text": ["0", None, None, "3"],
            "image": pa.array([None, png(100), png(200), None], pa.binary()),
            "embedding": vector_column(VECTORS.astype(np.float16)),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def with_canary(folder: Path) -> str:
    content = Content([Given(table())], DIMENSION, "3f2a", canary=canary())
    return write_version(folder, content, FLAT).version


def turned(amount: float) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The third vector turned towards another direction."""

    def change(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        other = vectors.copy()
        other[2] += amount * vectors[0]
        other[2] /= np.linalg.norm(other[2])
        return other

    return change


def test_an_encoder_that_embeds_the_items_as_they_are_stored_may_ask(tmp_path: Path) -> None:
    version = with_canary(tmp_path)
    assert require_canary(tmp_path, version, Encoder(lambda same: same)) == 4
    assert require_canary(tmp_path, version, Encoder(turned(0.02))) == 4  # as other hardware may
    with pytest.raises(ArtifactMismatchError, match=r"embeds item 'c2' otherwise .* cosine nan"):
        require_canary(tmp_path, version, Encoder(turned(math.nan)))
    with pytest.raises(
        ArtifactMismatchError,
        match=r"embeds item 'c2' otherwise than index .*v000001.*cosine 0\.\d+",
    ):
        require_canary(tmp_path, version, Encoder(turned(0.5)))


def test_every_later_version_keeps_the_items(tmp_path: Path) -> None:
    with_canary(tmp_path)
    delete(tmp_path, ["item-3"])
    append(tmp_path, Content([Given(table(9, first=COUNT))], DIMENSION, "3f2a"))
    compact(tmp_path)
    version = current_version(tmp_path)
    assert version == "v000004"
    assert require_canary(tmp_path, version, Encoder(lambda same: same)) == 4


def test_a_damaged_file_is_refused_and_an_index_without_one_is_not(tmp_path: Path) -> None:
    version = with_canary(tmp_path / "with")
    path = tmp_path / "with" / version / CANARY
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"canary\.parquet does not match"):
        require_canary(tmp_path / "with", version, Encoder(lambda same: same))
    published(tmp_path / "without")
    assert require_canary(tmp_path / "without", "v000001", Encoder(turned(9))) == 0


def test_where_another_engine_holds_the_vectors_the_items_lie_beside_the_run(
    tmp_path: Path,
) -> None:
    place = IndexPlace("milvus", "http://db:19530", "slq", tmp_path)
    same, other = Encoder(lambda given: given), Encoder(lambda given: -given)
    assert place.require_canary("any", "3f2a", other) == 0  # none were kept
    keep_canary(tmp_path, canary(), "3f2a")
    assert place.require_canary("any", "3f2a", same) == 4
    assert place.require_canary("any", "91bc", other) == 0
    with pytest.raises(ArtifactMismatchError, match="otherwise than the collection of its index"):
        place.require_canary("any", "3f2a", other)
    longer = Encoder(lambda given: np.concatenate([given, given], axis=1))
    assert place.require_canary("any", "3f2a", longer) == 4  # an index of cut vectors
    path = tmp_path / KEPT / "3f2a.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"3f2a\.parquet does not match the sha256"):
        place.require_canary("any", "3f2a", same)
    keep_canary(tmp_path, canary(), "3f2a")
    assert place.require_canary("any", "3f2a", same) == 4
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        keep_canary(tmp_path / "file", canary(), "3f2a")
