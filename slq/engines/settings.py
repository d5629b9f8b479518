"""Settings of an index and of the engine that holds it."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from slq.config import SECRET
from slq.engines.opening import FAISS, IndexPlace, unfit_target
from slq.index import IndexConfig

_DEFAULT_TARGETS = {"lance": "lance", "milvus": "milvus.db", "qdrant": "qdrant"}


class IndexSettings(IndexConfig):
    """How the index is built and searched, and what holds it."""

    engine: Literal["faiss", "lance", "milvus", "qdrant"] = "faiss"
    """What holds and searches the vectors: files of ours, or another engine, which takes none of the keys above."""
    target: str | None = None
    """Where another engine is: a folder, a file, or an address without credentials; below `storage.dir` if null."""
    collection: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=255)] = "slq"
    """Name of the table or collection there."""

    @model_validator(mode="after")
    def _fits_its_engine(self) -> "IndexSettings":
        problem = None if self.target is None else unfit_target(self.engine, self.target)
        if problem is not None:  # the first thing to be told: other errors show all keys
            raise PydanticCustomError(SECRET, "{problem}", {"problem": problem})
        if self.engine == FAISS:
            if self.target is not None:
                raise ValueError(
                    "target is a place in another engine, and engine is faiss; an index of faiss lies below storage.dir"
                )
            return self
        default = IndexConfig()
        set_anyway = [
            name
            for name in IndexConfig.model_fields
            if getattr(self, name) != getattr(default, name)
        ]
        if set_anyway:
            raise ValueError(
                f"{', '.join(set_anyway)} say how faiss builds an index, and engine is {self.engine}; leave them out"
            )
        return self

    @property
    def own(self) -> IndexConfig:
        """What an index of faiss depends on."""
        return IndexConfig.model_validate(self.model_dump(include=set(IndexConfig.model_fields)))

    def place(self, folder: Path) -> IndexPlace:
        """Where the index is.

        Args:
            folder: Of the run's index.
        """
        if self.engine == FAISS:
            return IndexPlace.of_folder(folder)
        target = self.target or str(folder / _DEFAULT_TARGETS[self.engine])
        return IndexPlace(self.engine, target, self.collection, folder)
