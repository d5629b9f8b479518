"""Where faiss learns, assigns and searches: on the CPU, or on one GPU for what it can do there.

A GPU does what compares vectors with many others: k-means for lists and codebooks, the list of each vector, and the
search of lists with plain or scalar codes. Vectors are turned and coded by the CPU, which also searches where faiss has
nothing for GPUs: codes packed for fast scanning, selections of rows, and results beyond the first 2,048. Sums are
rounded in another order there, so a vector between two lists may come into the other one; all else is the same. Files
hold CPU indexes, whoever made them.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slq.errors import ConfigError, HardwareError
from slq.index import codes
from slq.index.config import CPU, DEVICE, GPU_DEPTH
from slq.index.exact import Rows, Scores

log = logging.getLogger(__name__)
BUILDING, SEARCHING = "index.device", "index.search_device"
"""Keys that ask for a device."""
# Holds what 512 vectors need to be compared with 65,536 centroids; faiss allocates what goes beyond. By itself it would
# take 1.5 GiB in each process that shares a GPU.
_SCRATCH_BYTES = 2**29
_OPQ_BITS = 8  # of the products that faiss learns a rotation with

Nearest = Callable[[NDArray[np.float32]], Rows]
"""(rows, dimension) float32 vectors, as `codes.turned` gives them, to the (rows,) numbers of their lists."""
Search = Callable[[NDArray[np.float32], int, NDArray[np.uint8] | None], tuple[Scores, Rows]]
"""Queries, number of results and bits of selected rows to scores and rows, as `codes.search_partitions`."""


class Device(Protocol):
    """What faiss works on."""

    def train(self, index: Any, vectors: NDArray[np.float32]) -> None:
        """Learn rotation, lists and codes.

        Args:
            index: As `codes.untrained` makes it, with lists.
            vectors: (rows, dimension) float32.
        """

    def nearest(self, index: Any) -> Nearest:
        """What finds the list of a vector; any thread may call it.

        Args:
            index: A trained one with lists.
        """

    def search(self, partitions: Sequence[Any]) -> Search:
        """What searches all partitions; any thread may call it.

        Args:
            partitions: Of one segment, with shared centroids.
        """


class _Cpu:
    """See `Device`."""

    def train(self, index: Any, vectors: NDArray[np.float32]) -> None:
        index.train(vectors)

    def nearest(self, index: Any) -> Nearest:
        import faiss

        def nearest(vectors: NDArray[np.float32]) -> Rows:
            lists: Any = faiss.extract_index_ivf(index)  # which lives as long as the index does
            return _first_of(lists.quantizer, vectors)

        return nearest

    def search(self, partitions: Sequence[Any]) -> Search:
        return lambda queries, top_k, selected: codes.search_partitions(
            partitions, queries, top_k, selected
        )


class _Gpu:
    """See `Device`. faiss's objects on a GPU serve one thread at a time, and so does this.

    Args:
        number: Of the GPU, among those that this process sees.
    """

    def __init__(self, number: int) -> None:
        import faiss

        self._number = number
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(_SCRATCH_BYTES)
        self._turn = threading.Lock()

    def train(self, index: Any, vectors: NDArray[np.float32]) -> None:
        with self._at_work("learn lists and codes", BUILDING), _lent(index, self._moved):
            index.train(vectors)

    def nearest(self, index: Any) -> Nearest:
        import faiss

        doing = "find the lists of vectors"
        with self._at_work(doing, BUILDING):
            centroids = self._moved(_compared(faiss.extract_index_ivf(index)))

        def nearest(vectors: NDArray[np.float32]) -> Rows:
            with self._at_work(doing, BUILDING):
                return _first_of(centroids, vectors)

        return nearest

    def search(self, partitions: Sequence[Any]) -> Search:
        with self._at_work("hold the index", SEARCHING), _joined(partitions) as whole:
            held = [self._moved(one) for one in whole]
        told = "cuda:%d holds %d vectors; searches with a filter or for more than %d are the CPU's"
        log.info(told, self._number, sum(one.ntotal for one in held), GPU_DEPTH)

        def search(
            queries: NDArray[np.float32], top_k: int, selected: NDArray[np.uint8] | None
        ) -> tuple[Scores, Rows]:
            if selected is not None or top_k > GPU_DEPTH:
                return codes.search_partitions(partitions, queries, top_k, selected)
            with self._at_work("search", SEARCHING):
                return codes.search_partitions(held, queries, top_k)

        return search

    def _moved(self, index: Any) -> Any:
        """A copy on the GPU."""
        import faiss

        return faiss.index_cpu_to_gpu(self._resources, self._number, index)

    @contextmanager
    def _at_work(self, doing: str, key: str) -> Iterator[None]:
        with self._turn:
            try:
                yield
            except RuntimeError as error:  # of faiss: too little memory, most often
                raise HardwareError(
                    f"cuda:{self._number} cannot {doing}: {codes.reason(error)}; set {key}=cpu, or let fewer processes "
                    "share the GPU"
                ) from None


def _first_of(centroids: Any, vectors: NDArray[np.float32]) -> Rows:
    _, nearest = centroids.search(vectors, 1)
    return np.ascontiguousarray(nearest[:, 0])


@contextmanager
def _lent(index: Any, moved: Callable[[Any], Any]) -> Iterator[None]:
    """While this lasts, every k-means of an index compares on the GPU.

    Args:
        index: With lists.
        moved: Copies an index there.
    """
    lent = [*_for_lists(index, moved), *_for_products(index, moved)]  # nothing else keeps them
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in lent]
    for owner, name, value in lent:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


_Loan = tuple[Any, str, Any]
"""An object of faiss, the name of a value of it, and what takes its place."""


def _for_lists(index: Any, moved: Callable[[Any], Any]) -> Iterator[_Loan]:
    import faiss

    lists: Any = faiss.extract_index_ivf(index)
    is_graph = isinstance(faiss.downcast_index(lists.quantizer), faiss.IndexHNSW)
    # As on the CPU: for a graph faiss learns lists by distance, otherwise by inner product.
    flat = faiss.IndexFlatL2 if is_graph else faiss.IndexFlatIP
    yield lists, "clustering_index", moved(flat(lists.d))
    if isinstance(faiss.downcast_index(lists), faiss.IndexIVFRaBitQFastScan):
        # These codes learn nothing, yet faiss would first take the residuals of all vectors, on the CPU.
        yield lists, "by_residual", False


def _for_products(index: Any, moved: Callable[[Any], Any]) -> Iterator[_Loan]:
    import faiss

    for turn in codes.turns(index):
        if isinstance(turn, faiss.OPQMatrix):
            product: Any = faiss.ProductQuantizer(turn.d_out, turn.M, _OPQ_BITS)
            yield product, "assign_index", moved(faiss.IndexFlatL2(product.dsub))
            yield turn, "pq", product
    lists: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    if isinstance(lists, faiss.IndexIVFPQFastScan):
        yield lists.pq, "assign_index", moved(faiss.IndexFlatL2(lists.pq.dsub))


def _compared(lists: Any) -> Any:
    """An index that compares with all centroids of lists; a GPU knows no graph of them."""
    import faiss

    quantizer = faiss.downcast_index(lists.quantizer)
    if not isinstance(quantizer, faiss.IndexHNSW):
        return quantizer
    flat = faiss.IndexFlatIP(lists.d)
    flat.add(quantizer.reconstruct_n(0, lists.nlist))
    return flat


@contextmanager
def _joined(partitions: Sequence[Any]) -> Iterator[list[Any]]:
    """Partitions as they are moved to a GPU: those of lists as one, so that centroids are there once.

    Each list lies in one partition and is empty in the others. The first partition holds all of them while this lasts.
    """
    import faiss

    if isinstance(faiss.downcast_index(partitions[0]), faiss.IndexIDMap):
        yield list(partitions)
        return
    every: list[Any] = [faiss.extract_index_ivf(one) for one in partitions]
    first, masks = every[0], [every[0].invlists]
    for one in every[1:]:
        masked = faiss.MaskedInvertedLists(masks[-1], one.invlists)  # type: ignore[attr-defined]  # no stub
        masks.append(masked)
    centroids, count = _compared(first), sum(one.ntotal for one in every)
    before = (first.invlists, first.quantizer, first.ntotal)
    first.invlists, first.quantizer = masks[-1], centroids
    first.ntotal = partitions[0].ntotal = count
    try:
        yield [partitions[0]]
    finally:
        first.invlists, first.quantizer, first.ntotal = before
        partitions[0].ntotal = first.ntotal


@dataclass(frozen=True)
class FaissBuild:
    """The faiss that is installed.

    Attributes:
        version: Its version.
        is_for_gpus: Whether it has code for GPUs.
        num_gpus: GPUs that it sees from this process.
    """

    version: str
    is_for_gpus: bool
    num_gpus: int


def faiss_build() -> FaissBuild:
    """What is installed.

    Raises:
        ImportError: Nothing is.
        RuntimeError: A build for GPUs misses a library of CUDA; faiss tells which.
    """
    import faiss

    is_for_gpus = hasattr(faiss, "StandardGpuResources")
    return FaissBuild(faiss.__version__, is_for_gpus, faiss.get_num_gpus() if is_for_gpus else 0)


def device_of(name: str, key: str = BUILDING) -> Device:
    """The device of this name; one object for each GPU in a process.

    Args:
        name: `cpu`, `cuda` for the first GPU that this process sees, or `cuda:N`.
        key: Which asks for it, for messages.

    Raises:
        ConfigError: This is no device's name.
        HardwareError: The GPU is not there, or faiss has no code for GPUs.
    """
    known = DEVICE.fullmatch(name)
    if known is None:
        raise ConfigError(f"{key} is {name!r}; it must be cpu, cuda or cuda:N")
    if name == CPU:
        return _Cpu()
    build, way_out = faiss_build(), f"set {key}=cpu, or run this where there is one"
    if not build.is_for_gpus:
        raise HardwareError(
            f"{key} is {name}, but the faiss {build.version} that is installed has no code for GPUs; replace it by "
            f"`pip uninstall -y faiss-cpu && pip install 'slq[gpu]'`, or set {key}=cpu"
        )
    number = int(known[1] or 0)
    if not build.num_gpus:
        raise HardwareError(f"{key} is {name}, but faiss sees no CUDA GPU here; {way_out}")
    if number >= build.num_gpus:
        last = build.num_gpus - 1
        seen = "cuda:0 only" if not last else f"cuda:0 to cuda:{last}"
        raise HardwareError(f"{key} is {name}, but faiss sees {seen} here; {way_out}")
    return _gpu(number)


@lru_cache
def _gpu(number: int) -> Device:
    return _Gpu(number)
