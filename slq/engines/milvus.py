"""A collection of Milvus: a file of Milvus Lite, or a cluster at an address, through the same client."""

import json
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.engines.base import Mark, missing, opened, told
from slq.engines.live import SOURCE, LiveEngine, Row
from slq.engines.predicates import Among, Comparison, Group, Like, Null, Predicate, Value
from slq.engines.searching import EngineIndex, Stored, Wanted
from slq.errors import ConfigError, DataError, StorageError
from slq.index import Hit
from slq.index.parts import EMBEDDING

TOKEN = "MILVUS_TOKEN"
_MARK = "slq.mark"
_ID_BYTES = 1024
_MOST_HITS = 16_384  # that Milvus gives a query
_FIELD = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class Milvus(LiveEngine):
    """The collection `name` at `target`: `http://host:19530`, or a file for Milvus Lite, whose name ends in `.db`.

    The environment variable MILVUS_TOKEN is passed on to a cluster.
    """

    package = "pymilvus"
    credentials = TOKEN
    label = "Milvus"

    def require_names(self, columns: list[str]) -> None:
        """See `LiveEngine.require_names`: filters and requests name fields without quotes."""
        for name in columns:
            if not _FIELD.fullmatch(name):
                raise ConfigError(
                    f"Milvus has no field with the name {name!r}; names are of letters, digits and _: rename it"
                )

    def _exists(self, client: Any) -> bool:
        return bool(client.has_collection(self.name))

    def _marked(self, client: Any) -> dict[str, Any] | None:
        told_of = client.describe_collection(self.name).get("properties") or {}
        return json.loads(told_of[_MARK]) if _MARK in told_of else None

    def _make(self, client: Any, mark: Mark) -> None:
        from pymilvus import DataType

        schema = client.create_schema(enable_dynamic_field=True)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=_ID_BYTES)
        schema.add_field(EMBEDDING, DataType.FLOAT_VECTOR, dim=mark.dimension)
        params = client.prepare_index_params()
        # Lite takes AUTOINDEX for a small graph that loses hits behind filters and where many are asked for; it holds
        # no more vectors than can be compared one by one.
        kind = "FLAT" if self.is_exclusive else "AUTOINDEX"
        params.add_index(EMBEDDING, index_type=kind, metric_type="COSINE")
        properties = {_MARK: json.dumps(mark.to_json())}  # never without: nobody else's collection
        client.create_collection(
            self.name, schema=schema, index_params=params, properties=properties
        )

    def _set(self, client: Any, mark: Mark) -> None:
        properties = {_MARK: json.dumps(mark.to_json())}
        client.alter_collection_properties(self.name, properties=properties)

    def _put(self, client: Any, rows: list[Row], version: str) -> None:
        data = [{**_known(columns), EMBEDDING: vector, SOURCE: version} for columns, vector in rows]
        client.upsert(self.name, data)

    def _drop_others(self, client: Any, version: str) -> None:
        client.load_collection(self.name)
        # With less than strong consistency rows that were just replaced would be seen, and deleted, as they were.
        client.delete(self.name, filter=f'{SOURCE} != "{version}"', consistency_level="Strong")

    def _count(self, client: Any, version: str | None) -> int:
        client.load_collection(self.name)
        found = client.query(
            self.name,
            filter="" if version is None else f'{SOURCE} == "{version}"',
            output_fields=["count(*)"],
            consistency_level="Strong",
        )
        return int(found[0]["count(*)"])

    def _index(self, client: Any, mark: Mark, count: int, connection: ExitStack) -> "MilvusIndex":
        return MilvusIndex(self, client, mark, count, connection)

    def connection(self) -> AbstractContextManager[Any]:
        """A client; its errors as ours.

        Raises:
            ConfigError: It is not installed.
            StorageError: The place cannot be reached, or refuses.
        """
        try:
            from pymilvus import MilvusClient
        except ModuleNotFoundError:
            raise missing("pymilvus", "milvus") from None
        # Errors reach us as exceptions; both packages log them too, with tracebacks.
        for name in ("pymilvus", "milvus_lite"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

        def connect() -> Any:
            if not self.is_exclusive:
                return MilvusClient(self.target, token=os.environ.get(TOKEN, ""))
            return _lite.client(self.target)

        def disconnect(client: Any) -> None:
            try:
                client.close()
            finally:
                if self.is_exclusive:
                    _lite.leave(self.target)

        return opened(f"Milvus at {self.target}", connect, disconnect, errors())


class _Lite:
    """Files of Milvus Lite that this process has open, and how often.

    The package serves a file from the first client on until the process ends, and no other process can open it so long:
    a command that only looked at an index would keep it from the service that it starts.
    """

    def __init__(self) -> None:
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()

    def client(self, target: str) -> Any:
        """A further client of a file.

        Raises:
            StorageError: Another process has it open.
        """
        from pymilvus import MilvusClient
        from pymilvus.exceptions import ConnectionConfigException

        with self._lock:
            try:
                Path(target).parent.mkdir(
                    parents=True, exist_ok=True
                )  # it makes a file, and no folder
                client = MilvusClient(target)
            except OSError as error:
                raise StorageError(f"{target} cannot be opened: {error}") from None
            except ConnectionConfigException as error:
                raise StorageError(
                    f"{target} cannot be opened: {error.message}. Only one process at a time can open a file of "
                    "Milvus Lite: stop what has it open (a service?), or use a Milvus server"
                ) from None
            self._users[target] += 1
            return client

    def leave(self, target: str) -> None:
        """Close the file when its last client is gone."""
        from milvus_lite import server_manager_instance

        with self._lock:
            self._users[target] -= 1
            if not self._users[target]:
                server_manager_instance.release_server(target)


_lite = _Lite()


class MilvusIndex(EngineIndex):
    """A collection as Milvus searches it: a cluster approximately, a file exactly.

    Args:
        place: Where it is.
        client: Open there.
        mark: What the collection says of itself.
        count: Items that are there.
        connection: What is let go of in the end.
    """

    engine = "Milvus"

    def __init__(
        self, place: Milvus, client: Any, mark: Mark, count: int, connection: ExitStack
    ) -> None:
        super().__init__(mark, count, mark.version, connection)
        self._name, self._client = place.name, client
        self._where = f"Milvus at {place.target}"
        self._is_exact = place.is_exclusive

    def _nearest(
        self, queries: NDArray[np.float32], depth: int, wanted: Wanted
    ) -> Iterable[list[Hit]]:
        if wanted.exact and not self._is_exact:
            raise DataError(
                "a Milvus cluster searches by its own index alone; exact search works with index.engine faiss, lance "
                "and qdrant"
            )
        if depth > _MOST_HITS:
            raise DataError(f"Milvus gives {_MOST_HITS} results at most, not {depth}")
        parts = [] if wanted.where is None else [f"({_expression(wanted.where)})"]
        if wanted.exclude:
            parts.append(f"id not in {_literal(wanted.exclude)}")
        with told(self._where, errors()):
            found = self._client.search(
                self._name,
                data=queries.tolist(),
                anns_field=EMBEDDING,
                limit=depth,
                filter=" and ".join(parts),
                output_fields=self._columns,
            )
        return [
            [self._hit(float(hit["distance"]), {**hit["entity"], "id": hit["id"]}) for hit in hits]
            for hits in found
        ]

    def _stored(self, item_ids: Sequence[str], *, with_vectors: bool) -> Iterable[Stored]:
        fields = [*self._columns, EMBEDDING] if with_vectors else self._columns
        with told(self._where, errors()):
            found = self._client.query(
                self._name, filter=f"id in {_literal(item_ids)}", output_fields=fields
            )
        return [Stored(row, row.get(EMBEDDING)) for row in map(dict, found)]


def errors() -> tuple[type[Exception], ...]:
    """What the client raises where a place cannot be reached, or refuses."""
    from pymilvus.exceptions import MilvusException

    return MilvusException, OSError


def _expression(one: Predicate) -> str:
    """A predicate as Milvus reads it."""
    match one:
        case Group():
            return f" {one.joined_by} ".join(f"({_expression(part)})" for part in one.parts)
        case Comparison():
            operator = {"=": "==", "<>": "!="}.get(one.operator, one.operator)
            return f"{one.column} {operator} {_literal(one.value)}"
        case Among():
            return _unless_null(one, f"{one.column} in {_literal(one.values)}")
        case Like():
            return _unless_null(one, f"{one.column} like {_literal(one.pattern)}")
        case Null():
            return f"{one.column} is {'not ' if one.is_negated else ''}null"


def _unless_null(one: Among | Like, expression: str) -> str:
    """An expression or what it excludes; for Milvus what is null is not among anything."""
    return f"{one.column} is not null and not ({expression})" if one.is_negated else expression


def _literal(value: Value | Sequence[Value]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """Dynamic fields have no null."""
    return {name: value for name, value in row.items() if value is not None}
