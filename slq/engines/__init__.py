"""Other engines for what outgrows a folder of files: tables of Lance, collections of Milvus and Qdrant, plain arrays.

Each takes the same stream of rows, and those that can search answer as `slq.index.VectorIndex.search` does.
"""

from slq.engines.base import Collection, Engine, Found, SearchEngine
from slq.engines.opening import ENGINES, engine

__all__ = ["ENGINES", "Collection", "Engine", "Found", "SearchEngine", "engine"]
