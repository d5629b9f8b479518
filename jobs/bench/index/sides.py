"""What is compared: exact search by faiss, hnswlib, and segments of ours; each searched with some settings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.bench.index.data import SearchedSet
from slq.errors import ConfigError
from slq.index import Content, IndexConfig, VectorIndex, write_version
from slq.index.config import CPU
from slq.index.segment import Segment
from slq.index.versions import SEGMENTS

Search = Callable[[NDArray[np.float32], int], NDArray[np.int64]]
"""(queries, dimension) and k to (queries, k) rows."""
LINKS, BUILD_BREADTH = 32, 300  # of hnswlib: generous ones, for high recall in many dimensions
# Close together where recall rises fast, so that sides are compared at the recall that is asked for and not far above.
_PROBES = (4, 8, 12, 16, 20, 24, 32, 48, 64, 128)
_DEPTHS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0)
_BREADTHS = (10, 15, 20, 24, 28, 32, 36, 40, 50, 60, 80, 120, 160, 240, 320, 480, 960)


@dataclass(frozen=True)
class Point:
    """A way to search.

    Attributes:
        side: Whose: `flat`, `hnswlib`, or a name of ours.
        setting: What was chosen.
        search: Does it.
        bytes_per_vector: In memory or in mapped lists, row numbers and links included.
    """

    side: str
    setting: str
    search: Search
    bytes_per_vector: float


@dataclass(frozen=True)
class Rows:
    """The set as a source."""

    data: SearchedSet

    @property
    def num_rows(self) -> int:
        """Images."""
        return self.data.num_rows

    def tables(self) -> Iterator[pa.Table]:
        """Ids and vectors."""
        return self.data.tables()


def flat(vectors: NDArray[np.float32]) -> Point:
    """Every vector, compared in float32."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return Point("flat", "", lambda queries, k: index.search(queries, k)[1], 4 * vectors.shape[1])


def hnswlib_points(vectors: NDArray[np.float32], num_threads: int) -> list[Point]:
    """A graph of all vectors, searched with more and more breadth.

    Raises:
        ConfigError: hnswlib is not installed.
    """
    try:
        import hnswlib
    except ModuleNotFoundError:
        raise ConfigError("hnswlib is not installed: pip install 'slq[bench]'") from None
    graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
    graph.init_index(len(vectors), M=LINKS, ef_construction=BUILD_BREADTH, random_seed=7)
    graph.add_items(vectors, num_threads=num_threads)
    size = 4 * vectors.shape[1] + 4 * 2 * LINKS + 8

    def point(breadth: int) -> Point:
        def search(queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
            graph.set_ef(breadth)
            rows, _ = graph.knn_query(queries, k, num_threads=num_threads_of())
            return np.asarray(rows, dtype=np.int64)

        return Point("hnswlib", f"ef={breadth}", search, size)

    return [point(breadth) for breadth in _BREADTHS]


def num_threads_of() -> int:
    """As many as faiss has now: both sides get the same."""
    import faiss

    return int(faiss.omp_get_max_threads())


def on_gpu(device: str, num_lists: int) -> dict[str, IndexConfig]:
    """Settings of ours that are learnt, filled and searched on a GPU, by name."""
    places = {"device": device, "search_device": device}
    found = {"gpu flat": IndexConfig.model_validate(places)}
    for codes in ("float16", "int8"):
        lists = {"kind": "ivf", "num_lists": num_lists, "codes": codes, **places}
        found[f"gpu {codes}"] = IndexConfig.model_validate(lists)
    return found


def ours(folder: Path, data: SearchedSet, name: str, config: IndexConfig) -> list[Point]:
    """A segment, searched with more and more lists and candidates.

    Args:
        folder: Where it is written.
        data: What is searched.
        name: Of the side.
        config: How it is built, and where it is searched. A GPU holds the codes once for each point: there are fewer.
    """
    write_version(folder, Content([Rows(data)], data.dimension, "bench"), config)
    (record,) = VectorIndex(folder).manifest.segments
    home = folder / SEGMENTS / record.name
    size = sum(path.stat().st_size for path in home.glob("partitions/*/index.faiss"))

    def point(probes: int, oversample: float) -> Point:
        chosen = config.model_copy(update={"num_probes": probes, "oversample": oversample})
        segment = Segment(home, chosen, np.zeros(0, np.int64))

        def search(queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
            return segment.search(queries, k)[1]

        return Point(
            name, f"probes={probes} oversample={oversample:g}", search, size / data.num_rows
        )

    if config.kind == "flat":
        return [point(config.num_probes, 1.0)]
    depths = _DEPTHS if config.search_device == CPU else (4.0,)
    probes = [n for n in _PROBES if n <= config.num_lists]
    return [point(n, depth) for n in probes for depth in (depths if config.is_rescored else (1.0,))]


def matrix_of(data: SearchedSet) -> NDArray[np.float32]:
    """(rows, dimension) float32 unit vectors as an index sees them: rounded to float16, then of norm one."""
    whole = np.empty((data.num_rows, data.dimension), np.float32)
    start = 0
    for vectors in data.images():
        rounded: Any = vectors.astype(np.float16).astype(np.float32)
        whole[start : start + len(vectors)] = rounded / np.linalg.norm(
            rounded, axis=1, keepdims=True
        )
        start += len(vectors)
    return whole
