"""A collection of Qdrant: a folder, or a server at an address, through the same client."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.engines.base import Collection, Found, SearchEngine, missing, opened
from slq.errors import ConfigError, DataError
from slq.index.parts import EMBEDDING, matrix
from slq.index.vectors import unit

KEY = "QDRANT_API_KEY"
_BATCH_ROWS = 500
_MARK = "slq_fingerprint"
_MARKED = uuid.uuid5(uuid.NAMESPACE_URL, "slq:collection")
"""A point that says what the collection is; searches leave it out."""


class Qdrant(SearchEngine):
    """The collection `name` at `target`: `http://host:6333`, or a folder.

    The environment variable QDRANT_API_KEY is passed on to a server. Points have the UUID of their item's id.
    """

    package = "qdrant-client"

    def write(self, collection: Collection) -> Iterator[int]:
        """See `Engine.write`; a point that is there already is replaced."""
        with self._opened() as (client, models):
            self._create(client, models, collection)
            count = 0
            for table in collection.tables:
                vectors = unit(matrix(table[EMBEDDING]))
                rows = table.drop_columns([EMBEDDING]).to_pylist()
                for start in range(0, len(rows), _BATCH_ROWS):
                    stop = start + _BATCH_ROWS
                    points = [
                        models.PointStruct(id=point_id(row["id"]), vector=vector, payload=row)
                        for row, vector in zip(
                            rows[start:stop], vectors[start:stop].tolist(), strict=True
                        )
                    ]
                    client.upsert(self.name, points, wait=True)
                    count += len(points)
                    yield count

    def _create(self, client: Any, models: Any, collection: Collection) -> None:
        if client.collection_exists(self.name):
            found = self._mark_of(client)
            is_begun = found is None and not client.count(self.name).count
            if found != collection.fingerprint and not is_begun:
                raise ConfigError(
                    f"collection {self.name} of {self.target} is of {found}, not of {collection.fingerprint}; "
                    "choose another --name"
                )
            if not is_begun:
                return
        else:
            self._make(client, models, collection)
        vector = np.eye(1, collection.dimension, dtype=np.float32)[0].tolist()
        payload = {_MARK: collection.fingerprint}
        point = models.PointStruct(id=str(_MARKED), vector=vector, payload=payload)
        client.upsert(self.name, [point], wait=True)

    def _make(self, client: Any, models: Any, collection: Collection) -> None:
        params = models.VectorParams(size=collection.dimension, distance=models.Distance.COSINE)
        client.create_collection(self.name, vectors_config=params)

    def _mark_of(self, client: Any) -> str | None:
        found = client.retrieve(self.name, [str(_MARKED)])
        return found[0].payload.get(_MARK) if found else None

    def search(
        self, vectors: NDArray[Any], top_k: int, *, where: str | None = None
    ) -> list[list[Found]]:
        """See `SearchEngine.search`; predicates are Qdrant's JSON filters."""
        if where is not None:
            raise DataError("Qdrant's filters are no predicates; use its own client for them")
        with self._opened() as (client, models):
            marked = models.HasIdCondition(has_id=[str(_MARKED)])
            items_only = models.Filter(must_not=[marked])
            answers = [
                client.query_points(self.name, query=vector, limit=top_k, query_filter=items_only)
                for vector in np.asarray(vectors, np.float32).tolist()
            ]
        return [
            [Found(one.payload["id"], float(one.score)) for one in answer.points]
            for answer in answers
        ]

    @property
    def fingerprint(self) -> str:
        """See `SearchEngine.fingerprint`."""
        with self._opened() as (client, _):
            mark = self._mark_of(client)
        if mark is None:
            raise DataError(
                f"collection {self.name} was not written by slq: it names no fingerprint"
            )
        return mark

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """A client and its models; its errors as ours.

        Raises:
            ConfigError: It is not installed.
            StorageError: The place cannot be reached, or refuses.
        """
        try:
            from qdrant_client import QdrantClient, models
            from qdrant_client.http.exceptions import ApiException
        except ModuleNotFoundError:
            raise missing("qdrant-client", "qdrant") from None

        def connect() -> Any:
            if "://" not in self.target:
                return QdrantClient(path=self.target)
            key = os.environ.get(KEY)
            return QdrantClient(url=self.target, api_key=key, check_compatibility=False)

        errors = (ApiException, OSError, RuntimeError, ValueError)
        with opened(f"Qdrant at {self.target}", connect, errors) as client:
            yield client, models


def point_id(item_id: str) -> str:
    """UUID of an item's point."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"slq:item:{item_id}"))
