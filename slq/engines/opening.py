"""Engines by name."""

from slq.engines.arrays import Arrays
from slq.engines.base import Engine
from slq.engines.lance import Lance
from slq.engines.milvus import Milvus
from slq.engines.qdrant import Qdrant
from slq.errors import ConfigError

ENGINES: dict[str, type[Engine]] = {
    "npy": Arrays,
    "lance": Lance,
    "milvus": Milvus,
    "qdrant": Qdrant,
}


def engine(kind: str, target: str, name: str) -> Engine:
    """A place in an engine.

    Args:
        kind: One of `ENGINES`.
        target: Where.
        name: Of the collection there.

    Raises:
        ConfigError: There is no such engine.
    """
    if kind not in ENGINES:
        raise ConfigError(f"engine {kind!r} is unknown; choose one of {', '.join(ENGINES)}")
    return ENGINES[kind](target, name)
