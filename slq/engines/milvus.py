"""A collection of Milvus: a file of Milvus Lite, or a cluster at an address, through the same client."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.engines.base import Collection, Found, SearchEngine, missing, opened
from slq.errors import ConfigError, DataError
from slq.index.parts import EMBEDDING, matrix
from slq.index.vectors import unit

TOKEN = "MILVUS_TOKEN"
_MARK = "slq.fingerprint"
_BATCH_ROWS = 1000
_ID_BYTES = 1024


class Milvus(SearchEngine):
    """The collection `name` at `target`: `http://host:19530`, or a file for Milvus Lite.

    The environment variable MILVUS_TOKEN is passed on to a cluster.
    """

    package = "pymilvus"

    def write(self, collection: Collection) -> Iterator[int]:
        """See `Engine.write`; a row that is there already is replaced."""
        with self._opened() as client:
            self._create(client, collection)
            count = 0
            for table in collection.tables:
                vectors = unit(matrix(table[EMBEDDING]))
                rows = table.drop_columns([EMBEDDING]).to_pylist()
                for start in range(0, len(rows), _BATCH_ROWS):
                    stop = start + _BATCH_ROWS
                    data = [
                        {**_known(row), EMBEDDING: vector}
                        for row, vector in zip(
                            rows[start:stop], vectors[start:stop].tolist(), strict=True
                        )
                    ]
                    client.upsert(self.name, data)
                    count += len(data)
                    yield count

    def _create(self, client: Any, collection: Collection) -> None:
        from pymilvus import DataType

        if client.has_collection(self.name):
            found = self._mark_of(client)
            if found != collection.fingerprint:
                raise ConfigError(
                    f"collection {self.name} of {self.target} is of {found}, not of {collection.fingerprint}; "
                    "choose another --name"
                )
            return
        schema = client.create_schema(enable_dynamic_field=True)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=_ID_BYTES)
        schema.add_field(EMBEDDING, DataType.FLOAT_VECTOR, dim=collection.dimension)
        params = client.prepare_index_params()
        params.add_index(EMBEDDING, index_type="AUTOINDEX", metric_type="COSINE")
        marks = {_MARK: collection.fingerprint}
        client.create_collection(self.name, schema=schema, index_params=params, properties=marks)

    def _mark_of(self, client: Any) -> str | None:
        told = client.describe_collection(self.name)
        mark: str | None = (told.get("properties") or {}).get(_MARK)
        return mark

    def search(
        self, vectors: NDArray[Any], top_k: int, *, where: str | None = None
    ) -> list[list[Found]]:
        """See `SearchEngine.search`."""
        data = np.asarray(vectors, np.float32).tolist()
        with self._opened() as client:
            found = client.search(
                self.name, data=data, anns_field=EMBEDDING, limit=top_k, filter=where or ""
            )
            return [[Found(hit["id"], float(hit["distance"])) for hit in hits] for hits in found]

    @property
    def fingerprint(self) -> str:
        """See `SearchEngine.fingerprint`."""
        with self._opened() as client:
            mark = self._mark_of(client)
        if mark is None:
            raise DataError(
                f"collection {self.name} was not written by slq: it names no fingerprint"
            )
        return mark

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """A client; its errors as ours.

        Raises:
            ConfigError: It is not installed.
            StorageError: The place cannot be reached, or refuses.
        """
        try:
            from pymilvus import MilvusClient
            from pymilvus.exceptions import MilvusException
        except ModuleNotFoundError:
            raise missing("pymilvus", "milvus") from None

        def connect() -> Any:
            return MilvusClient(self.target, token=os.environ.get(TOKEN, ""))

        errors = (MilvusException, OSError)
        with opened(f"Milvus at {self.target}", connect, errors) as client:
            yield client


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """Dynamic fields have no null."""
    return {name: value for name, value in row.items() if value is not None}
