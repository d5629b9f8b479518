"""Other engines for what outgrows a folder of files: tables of Lance, collections of Milvus and Qdrant, plain arrays.

Each takes the same stream of rows, and those that can search answer as `slq.index.SearchIndex` says.
"""

from slq.engines.base import Collection, Engine, SearchEngine
from slq.engines.opening import ENGINES, FAISS, SEARCH_ENGINES, IndexPlace, engine
from slq.engines.settings import IndexSettings

__all__ = [
    "ENGINES",
    "FAISS",
    "SEARCH_ENGINES",
    "Collection",
    "Engine",
    "IndexPlace",
    "IndexSettings",
    "SearchEngine",
    "engine",
]
