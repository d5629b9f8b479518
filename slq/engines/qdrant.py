"""A collection of Qdrant: a folder, or a server at an address, through the same client."""

import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.engines.base import Mark, missing, opened, told
from slq.engines.live import SOURCE, LiveEngine, Row
from slq.engines.predicates import Among, Comparison, Group, Like, Null, Predicate, Value
from slq.engines.searching import EngineIndex, Stored, Wanted
from slq.errors import ConfigError, DataError, StorageError
from slq.index import Hit

KEY = "QDRANT_API_KEY"
_MARK = "slq_mark"
_MARKED = str(uuid.uuid5(uuid.NAMESPACE_URL, "slq:collection"))
"""A point that says what the collection is; searches leave it out."""


class Qdrant(LiveEngine):
    """The collection `name` at `target`: `http://host:6333`, or a folder.

    The environment variable QDRANT_API_KEY is passed on to a server. Points have the UUID of their item's id.
    """

    package = "qdrant-client"
    credentials = KEY
    label = "Qdrant"
    batch_rows = 500

    def require_names(self, columns: list[str]) -> None:
        """See `LiveEngine.require_names`: filters quote names."""
        for name in columns:
            if not name or '"' in name:
                raise ConfigError(
                    f"Qdrant cannot filter by a column with the name {name!r}; rename it"
                )

    def _exists(self, client: Any) -> bool:
        return bool(client.collection_exists(self.name))

    def _marked(self, client: Any) -> dict[str, Any] | None:
        found = client.retrieve(self.name, [_MARKED])
        mark: dict[str, Any] | None = found[0].payload.get(_MARK) if found else None
        return mark

    def _make(self, client: Any, mark: Mark) -> None:
        models = _models()
        params = models.VectorParams(size=mark.dimension, distance=models.Distance.COSINE)
        client.create_collection(self.name, vectors_config=params)

    def _begin(self, client: Any, mark: Mark) -> None:
        """See `LiveEngine._begin`; one that was killed between the two requests left an empty collection."""
        if self._exists(client) and not client.count(self.name).count:
            self._set(client, mark)
        super()._begin(client, mark)

    def _set(self, client: Any, mark: Mark) -> None:
        vector = np.eye(1, mark.dimension, dtype=np.float32)[0].tolist()
        point = _models().PointStruct(id=_MARKED, vector=vector, payload={_MARK: mark.to_json()})
        client.upsert(self.name, [point], wait=True)

    def _put(self, client: Any, rows: list[Row], version: str) -> None:
        models = _models()
        points = [
            models.PointStruct(
                id=point_id(columns["id"]), vector=vector, payload={**columns, SOURCE: version}
            )
            for columns, vector in rows
        ]
        client.upsert(self.name, points, wait=True)

    def _drop_others(self, client: Any, version: str) -> None:
        models = _models()
        foreign = models.IsEmptyCondition(is_empty=models.PayloadField(key=SOURCE))
        others = models.Filter(must_not=[_of(version), foreign])
        client.delete(self.name, models.FilterSelector(filter=others), wait=True)

    def _count(self, client: Any, version: str | None) -> int:
        if version is None:
            return int(client.count(self.name, exact=True).count) - 1  # without the mark
        chosen = _models().Filter(must=[_of(version)])
        return int(client.count(self.name, chosen, exact=True).count)

    def _index(self, client: Any, mark: Mark, count: int, connection: ExitStack) -> "QdrantIndex":
        return QdrantIndex(self, client, mark, count, connection)

    def connection(self) -> AbstractContextManager[Any]:
        """See `LiveEngine.connection`."""
        try:
            from qdrant_client import QdrantClient
        except ModuleNotFoundError:
            raise missing("qdrant-client", "qdrant") from None

        def connect() -> Any:
            if self.is_exclusive:
                return _folder(self.target)
            key = os.environ.get(KEY)
            return QdrantClient(url=self.target, api_key=key, check_compatibility=False)

        return opened(f"Qdrant at {self.target}", connect, lambda one: one.close(), errors())


def _models() -> Any:
    from qdrant_client import models

    return models


def _of(version: str) -> Any:
    """The condition that a point came with a state."""
    models = _models()
    return models.FieldCondition(key=SOURCE, match=models.MatchValue(value=version))


def _folder(target: str) -> Any:
    """A client of a folder.

    Raises:
        StorageError: It is open already.
    """
    from qdrant_client import QdrantClient

    try:
        return QdrantClient(path=target)
    except RuntimeError as error:
        if "already accessed" not in str(error):
            raise
        raise StorageError(
            f"{target} is open already. Only one process at a time can open a folder of Qdrant's client: stop what "
            "has it open (a service?), or use a Qdrant server"
        ) from None


class QdrantIndex(EngineIndex):
    """A collection as Qdrant searches it: approximately on a server, unless it is asked otherwise.

    Args:
        place: Where it is.
        client: Open there.
        mark: What the collection says of itself.
        count: Items that are there.
        connection: What is let go of in the end.
    """

    engine = "Qdrant"

    def __init__(
        self, place: Qdrant, client: Any, mark: Mark, count: int, connection: ExitStack
    ) -> None:
        super().__init__(mark, count, mark.version, connection)
        self._name, self._client = place.name, client
        self._where = f"Qdrant at {place.target}"
        self._is_server = not place.is_exclusive  # a folder is always searched exactly

    def _nearest(
        self, queries: NDArray[np.float32], depth: int, wanted: Wanted
    ) -> Iterable[list[Hit]]:
        models = _models()
        hidden = [_MARKED, *map(point_id, wanted.exclude)]
        chosen = models.Filter(
            must=None if wanted.where is None else [_condition(wanted.where)],
            must_not=[models.HasIdCondition(has_id=hidden)],
        )
        requests = [
            models.QueryRequest(
                query=query,
                limit=depth,
                filter=chosen,
                params=models.SearchParams(exact=True)
                if wanted.exact and self._is_server
                else None,
                with_payload=True,
            )
            for query in queries.tolist()
        ]
        with told(self._where, errors()):
            answers = self._client.query_batch_points(self._name, requests)
        return [
            [self._hit(float(point.score), point.payload) for point in answer.points]
            for answer in answers
        ]

    def _stored(self, item_ids: Sequence[str], *, with_vectors: bool) -> Iterable[Stored]:
        with told(self._where, errors()):
            found = self._client.retrieve(
                self._name,
                [point_id(name) for name in item_ids],
                with_payload=True,
                with_vectors=with_vectors,
            )
        return [Stored(point.payload, point.vector) for point in found]


def errors() -> tuple[type[Exception], ...]:
    """What the client raises where a place cannot be reached, or refuses."""
    from qdrant_client.http.exceptions import ApiException

    return ApiException, OSError, RuntimeError, ValueError


def point_id(item_id: str) -> str:
    """UUID of an item's point."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"slq:item:{item_id}"))


def _condition(one: Predicate) -> Any:
    """A predicate as Qdrant's filter.

    Raises:
        DataError: Qdrant has no such condition.
    """
    models = _models()
    match one:
        case Group():
            parts = [_condition(part) for part in one.parts]
            return models.Filter(**{"must" if one.joined_by == "and" else "should": parts})
        case Comparison(operator="=" | "<>"):
            return _among(one.column, (one.value,), is_negated=one.operator == "<>")
        case Comparison():
            return _ordered(one)
        case Among():
            return _among(one.column, one.values, is_negated=one.is_negated)
        case Like():
            raise DataError(
                f"{one.column} like {one.pattern!r}: Qdrant has no patterns; index.engine faiss, lance and milvus have"
            )
        case Null():
            empty = _empty(one.column)
            return models.Filter(must_not=[empty]) if one.is_negated else empty


def _among(column: str, values: Iterable[Value], *, is_negated: bool) -> Any:
    models = _models()
    found = [_equal(column, value) for value in values]
    if is_negated:
        return models.Filter(must_not=[_empty(column), *found])
    return models.Filter(should=found)


def _equal(column: str, value: Value) -> Any:
    models, key = _models(), _key(column)
    if isinstance(value, str | bool):
        return models.FieldCondition(key=key, match=models.MatchValue(value=value))
    return models.FieldCondition(key=key, range=models.Range(gte=value, lte=value))


def _ordered(one: Comparison) -> Any:
    models = _models()
    name = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}[one.operator]
    if one.kind == "number":
        bounds = models.Range(**{name: one.value})
    elif one.kind in ("date", "time"):
        bounds = models.DatetimeRange(**{name: one.value})
    else:
        raise DataError(
            f"{one.column} {one.operator} {one.value!r}: Qdrant orders numbers, dates and times alone; index.engine "
            "faiss, lance and milvus order texts too"
        )
    return models.FieldCondition(key=_key(one.column), range=bounds)


def _empty(column: str) -> Any:
    models = _models()
    return models.IsEmptyCondition(is_empty=models.PayloadField(key=_key(column)))


def _key(column: str) -> str:
    """A key of a payload; dots and brackets would lead into what it holds."""
    return column if column.isidentifier() else f'"{column}"'
