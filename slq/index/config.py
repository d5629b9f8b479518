"""How an index is built and searched."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ByteSize, Field, model_validator

from slq.config import Section
from slq.errors import ConfigError

Codes = Literal["float32", "float16", "int8", "int4", "rabitq", "pq4"]
BITS: dict[str, float] = {
    "float32": 32,
    "float16": 16,
    "int8": 8,
    "int4": 4,
    "rabitq": 1,
    "pq4": 0.5,
}
"""Bits that a value of a vector takes in the lists, about; `pq4` spends four on eight values."""
PQ_SUBSPACE = 8
"""Values that one four-bit code of `pq4` stands for."""
_EXACT_ENOUGH_BITS = 16
CPU = "cpu"
DEVICE = re.compile(r"cpu|cuda(?::([0-9]+))?")
"""A device's name, with the number of a GPU."""
GPU_CODES = ("float32", "float16", "int8", "int4")
"""Codes that faiss searches on a GPU; those that are packed for fast scanning it has for CPUs alone."""
GPU_DEPTH = 2048
"""Most results of a query, and most lists that it visits, on a GPU."""
_LEAST_OPQ_ROWS = 256
_ROW_BYTES = 8  # of a row number beside its code


class GoalConfig(Section):
    """What an index must reach on text queries."""

    recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the `top_k` nearest items that are found."""
    top_k: Annotated[int, Field(gt=0)] = 10
    """Depth of the recall."""
    memory: ByteSize | None = None
    """Of codes, row numbers and centroids, as in `64GiB`; vectors to score again stay on disk."""
    latency_ms: Annotated[float, Field(gt=0)] | None = None
    """Median of one query alone, with as many threads as faiss may use."""
    sample_rows: Annotated[int, Field(gt=0)] = 200_000
    """Items that settings are tried on."""
    num_queries: Annotated[int, Field(gt=0)] = 500
    """Text queries of `data.queries` that ask."""


SEARCH_ONLY = ("goal", "num_probes", "oversample")
"""Keys of `IndexConfig` that no file of an index depends on."""
PLACES = ("device", "search_device")
"""Keys of `IndexConfig` that say where work is done; an index records them nowhere, and is used anywhere."""


def _device(name: str) -> str:
    if not DEVICE.fullmatch(name):
        raise ValueError("must be cpu, cuda or cuda:N")
    return name


DeviceName = Annotated[str, AfterValidator(_device)]
"""`cpu`, `cuda` for the first GPU that a process sees, or `cuda:N`."""


class IndexConfig(Section):
    """How the index is built and searched."""

    goal: GoalConfig | None = None
    """If given, everything below down to `oversample` is chosen by trials."""
    kind: Literal["flat", "ivf"] = "flat"
    """`flat` compares with every vector (exact); `ivf` visits the nearest lists only."""
    num_lists: Annotated[int, Field(gt=0)] = 64
    """Inverted lists of `ivf`."""
    num_probes: Annotated[int, Field(gt=0)] = 16
    """Lists visited per query by `ivf`."""
    quantizer: Literal["flat", "hnsw"] = "flat"
    """How `ivf` finds the nearest lists: by comparing with all, or in a graph, which pays from some 10,000 lists on."""
    codes: Codes = "float32"
    """What `ivf` keeps of a vector in its lists. `rabitq` takes a bit a value, `pq4` half a bit."""
    rotation: Literal["none", "random", "opq"] = "none"
    """Of the vectors before they are coded: `random` spreads what few values hold, `opq` is trained."""
    oversample: Annotated[float, Field(ge=1)] = 4.0
    """Candidates per result that are scored again from the float16 vectors, where codes have less than sixteen bits."""
    words: bool = False
    """Keep the words of texts too, for hybrid search; to build them takes memory for all texts."""
    partition_bytes: Annotated[int, Field(gt=0)] = 2**30
    """Of the codes in one index file. A build needs memory for about three of them in each worker."""
    seed: int = 0
    device: DeviceName = CPU
    """Where lists and codes are learnt and vectors find their lists: `cpu`, `cuda` or `cuda:N`. Turning and coding are
    the CPU's. What a GPU built is searched on a CPU as well, and a build that was ended goes on with either."""
    search_device: DeviceName = CPU
    """Where the service and the trials of `goal` search. A GPU holds all codes in its memory, so those of `float32`,
    `float16`, `int8` or `int4` (or `flat`), and compares with all centroids whatever the quantizer. Searches with a
    filter, for more than 2,048 candidates, or in a segment with deleted items stay on the CPU."""

    @model_validator(mode="after")
    def _can_be_searched_there(self) -> "IndexConfig":
        problem = None if self.goal is not None else self.unsearchable()
        if problem is not None:
            raise ValueError(problem)
        return self

    def recorded(self) -> dict[str, Any]:
        """Plain data for manifests: all but where work is done."""
        return self.model_dump(exclude=set(PLACES))

    def placed_as(self, other: "IndexConfig") -> "IndexConfig":
        """The same, done where another one is."""
        return self.model_copy(update={name: getattr(other, name) for name in PLACES})

    @property
    def most_probes(self) -> int:
        """Lists that a query may visit."""
        return self.num_lists if self.search_device == CPU else min(self.num_lists, GPU_DEPTH)

    def require_searchable(self) -> None:
        """Check that lists can be searched on `search_device`.

        Raises:
            ConfigError: They cannot.
        """
        problem = self.unsearchable()
        if problem is not None:
            raise ConfigError(problem)

    def unsearchable(self) -> str | None:
        """Why lists cannot be searched on `search_device`; None where they can."""
        if self.search_device == CPU or self.kind == "flat":
            return None
        if self.codes not in GPU_CODES:
            return (
                f"index.search_device is {self.search_device}, but faiss searches index.codes={self.codes} on CPUs "
                f"only; set index.search_device=cpu, or choose one of {', '.join(GPU_CODES)}"
            )
        if self.num_probes > GPU_DEPTH:
            return (
                f"index.search_device is {self.search_device}, where a query visits {GPU_DEPTH} lists at most, and "
                f"index.num_probes is {self.num_probes}; lower it, or set index.search_device=cpu"
            )
        return None

    def partition_rows(self, dimension: int) -> int:
        """Vectors in one index file, about."""
        bits = BITS[self.codes] if self.kind == "ivf" else 32
        return max(1, int(self.partition_bytes // (bits * dimension / 8 + _ROW_BYTES)))

    @property
    def is_rescored(self) -> bool:
        """Whether scores of the codes are too coarse to rank by."""
        return self.kind == "ivf" and BITS[self.codes] < _EXACT_ENOUGH_BITS

    def require_room(self, count: int, dimension: int) -> None:
        """Check the settings against the vectors.

        Raises:
            ConfigError: There are too few of them, or their length cannot be coded so.
        """
        problem = self.unfit(count, dimension)
        if problem is not None:
            raise ConfigError(problem)

    def unfit(self, count: int, dimension: int) -> str | None:
        """Why vectors cannot be indexed so; None where they can."""
        if self.kind == "flat":
            return None
        if self.num_lists > count:
            return (
                f"index.num_lists is {self.num_lists}, but there are only {count} vectors; lower it or set "
                "index.kind=flat"
            )
        if self.rotation == "opq" and count < _LEAST_OPQ_ROWS:
            return (
                f"index.rotation=opq is learnt from {_LEAST_OPQ_ROWS} vectors at least, and there are only {count}; "
                "set index.rotation=random"
            )
        if self.codes == "pq4" or self.rotation == "opq":
            parts = -(-dimension // PQ_SUBSPACE)
            if dimension % parts:
                return (
                    f"vectors of {dimension} values cannot be cut into {parts} equal parts, as index.codes=pq4 and "
                    "index.rotation=opq do; choose others"
                )
        return None
