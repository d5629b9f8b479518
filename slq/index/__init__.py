"""Nearest-neighbour search over embeddings; scores are inner products of unit vectors, so cosines.

An index folder holds immutable versions and a pointer file. A version is complete before the pointer names it, so a
reader never sees half of one; every file's sha256 stands in its manifest and is checked on load.
"""

from slq.index.config import IndexConfig
from slq.index.contract import Hit, SearchIndex
from slq.index.searching import VectorIndex
from slq.index.versions import current_version, prune, roll_back, versions
from slq.index.writing import Content, append, build, compact, delete, write_version

__all__ = [
    "Content",
    "Hit",
    "IndexConfig",
    "SearchIndex",
    "VectorIndex",
    "append",
    "build",
    "compact",
    "current_version",
    "delete",
    "prune",
    "roll_back",
    "versions",
    "write_version",
]
