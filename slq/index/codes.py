"""faiss indexes: how they are made, trained, filled, stored and searched. Ids are explicit row numbers.

faiss is imported on first use: settings and exact search need none of it.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.errors import ArtifactError
from slq.index.config import PQ_SUBSPACE, IndexConfig
from slq.index.exact import Block, Rows, Scores, best

_SCALAR_TYPES = {"float16": "SQfp16", "int8": "SQ8", "int4": "SQ4"}
_ID_MAP = b"IxMp"  # how faiss's file of an index without lists begins: rows by id
_HNSW_LINKS = 32
_SEARCH_BREADTH = 2  # of the coarse graph, per probe
_BUILD_BREADTH = (
    64  # of it, to find the list that a vector belongs to, however few are visited later
)


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many for what this thread asks of faiss."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def for_each(call: Callable[[int], None], numbers: Sequence[int]) -> None:
    """Call with each number, in as many threads as faiss would take for this one; each has one for faiss itself."""
    import faiss

    count = min(faiss.omp_get_max_threads(), len(numbers))
    if count <= 1:
        for number in numbers:
            call(number)
        return

    def alone(number: int) -> None:
        with threads(1):
            call(number)

    with ThreadPoolExecutor(count) as pool:
        for _ in pool.map(alone, numbers):
            pass  # which raises what a call raised


def untrained(config: IndexConfig, dimension: int) -> Any:
    """An empty index as the settings ask for."""
    import faiss

    if config.kind == "flat":
        return faiss.IndexIDMap(faiss.IndexFlatIP(dimension))
    coarse = f"IVF{config.num_lists}" + (
        f"_HNSW{_HNSW_LINKS}" if config.quantizer == "hnsw" else ""
    )
    parts = [_rotation(config, dimension), coarse, _codes(config, dimension)]
    index = faiss.index_factory(
        dimension, ",".join(part for part in parts if part), faiss.METRIC_INNER_PRODUCT
    )
    lists = faiss.extract_index_ivf(index)
    lists.cp.seed = config.seed
    lists.cp.min_points_per_centroid = 1
    lists.nprobe = min(config.num_probes, lists.nlist)
    graph = faiss.downcast_index(lists.quantizer)
    if isinstance(graph, faiss.IndexHNSW):
        graph.hnsw.efSearch = _BUILD_BREADTH
    return index


def _rotation(config: IndexConfig, dimension: int) -> str:
    if config.rotation == "opq":
        return f"OPQ{-(-dimension // PQ_SUBSPACE)}"
    return f"RR{dimension}" if config.rotation == "random" else ""


def _codes(config: IndexConfig, dimension: int) -> str:
    if config.codes == "float32":
        return "Flat"
    if config.codes == "rabitq":
        return "RaBitQfs"
    if config.codes == "pq4":
        return f"PQ{-(-dimension // PQ_SUBSPACE)}x4fs"
    return _SCALAR_TYPES[config.codes]


def set_probes(index: Any, num_probes: int) -> None:
    """Lists that a search visits from now on; a coarse graph looks a little further."""
    import faiss

    lists = faiss.extract_index_ivf(index)
    lists.nprobe = min(num_probes, lists.nlist)
    graph = faiss.downcast_index(lists.quantizer)
    if isinstance(graph, faiss.IndexHNSW):
        graph.hnsw.efSearch = _SEARCH_BREADTH * lists.nprobe


def fill(index: Any, blocks: Iterable[Block]) -> None:
    """Add vectors under their row numbers."""
    for rows, vectors in blocks:
        index.add_with_ids(np.ascontiguousarray(vectors), rows)


def coded(index: Any, vectors: NDArray[np.float32], numbers: Rows) -> NDArray[np.uint8]:
    """What `fill` would store of vectors.

    Args:
        index: A trained one with lists.
        vectors: (rows, dimension) float32, as `turned` gives them.
        numbers: (rows,) int64 numbers of their lists.

    Returns:
        (rows, bytes) codes.
    """
    import faiss

    lists = faiss.extract_index_ivf(index)
    codes = np.zeros((len(vectors), lists.code_size), np.uint8)
    arrays = (faiss.swig_ptr(array) for array in (vectors, numbers, codes))
    lists.encode_vectors(len(vectors), *arrays)
    return codes


def turned(index: Any, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """(rows, dimension) float32 vectors as the lists of an index get them."""
    ready = np.ascontiguousarray(vectors)
    for turn in turns(index):
        ready = turn.apply(ready)
    return ready


def turns(index: Any) -> list[Any]:
    """Transforms that vectors pass before they come to the lists of an index."""
    import faiss

    whole = faiss.downcast_index(index)
    if not isinstance(whole, faiss.IndexPreTransform):
        return []
    chain: Any = whole.chain  # a C++ vector, whatever faiss's stubs say
    return [faiss.downcast_VectorTransform(chain.at(number)) for number in range(chain.size())]


def fill_list(index: Any, number: int, rows: Rows, codes: NDArray[np.uint8]) -> None:
    """Put the codes of `coded` into an empty list, and so build what `fill` would have built.

    Args:
        index: A trained one with lists.
        number: Of the list.
        rows: (rows,) int64 row numbers.
        codes: (rows, bytes).
    """
    import faiss

    if not len(rows):
        return
    lists: Any = faiss.extract_index_ivf(index)
    stored: Any = faiss.downcast_InvertedLists(lists.invlists)
    rows = np.ascontiguousarray(rows)
    packed = np.ascontiguousarray(codes)
    if hasattr(stored, "packer"):  # of fast scanning
        packed = _packed(stored, packed)
    stored.add_entries(number, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(packed))
    lists.ntotal += len(rows)
    index.ntotal = lists.ntotal


def _packed(stored: Any, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes in blocks, whose bits are interleaved for fast scanning."""
    import faiss

    size = stored.n_per_block
    count = -(-len(codes) // size)
    whole = np.zeros((count, size, codes.shape[1]), np.uint8)
    whole.reshape(count * size, -1)[: len(codes)] = codes
    blocks = np.zeros((count, stored.block_size), np.uint8)
    for flat, block in zip(whole, blocks, strict=True):
        stored.packer.pack_all(faiss.swig_ptr(flat), faiss.swig_ptr(block))
    return blocks


def code_bytes(config: IndexConfig, dimension: int) -> int:
    """Of a vector in a list, without its row number."""
    import faiss

    few = config.model_copy(update={"num_lists": 1, "quantizer": "flat"})
    index = untrained(few, dimension)  # what faiss extracts from it does not keep it
    return int(faiss.extract_index_ivf(index).code_size)


def num_lists(index: Any) -> int:
    """Of an index that has lists."""
    import faiss

    return int(faiss.extract_index_ivf(index).nlist)


def write(index: Any, path: Path, *, with_centroids: bool = True) -> None:
    """Write an index file.

    Args:
        index: As filled.
        path: The file.
        with_centroids: Whether to keep the centroids of lists; if not, `share_centroids` gives them back.

    Raises:
        OSError: It cannot be written.
    """
    import faiss

    with nullcontext() if with_centroids else _without_centroids(index):
        try:
            faiss.write_index(index, str(path))
        except RuntimeError as error:
            raise OSError(reason(error)) from None


@contextmanager
def _without_centroids(index: Any) -> Iterator[None]:
    import faiss

    lists: Any = faiss.extract_index_ivf(index)
    kept, none = lists.quantizer, faiss.IndexFlatIP(lists.d)
    lists.quantizer = none
    try:
        yield
    finally:
        lists.quantizer = kept


def share_centroids(indexes: Sequence[Any]) -> None:
    """Let all partitions have the centroids of the first one, which must live as long as they do."""
    import faiss

    first: Any = faiss.extract_index_ivf(indexes[0])
    for index in indexes[1:]:
        lists: Any = faiss.extract_index_ivf(index)
        lists.own_fields = False  # and so nothing frees what it was written with: an empty index
        lists.quantizer = first.quantizer


def read(path: Path, *, mapped: bool = True) -> Any:
    """An index file.

    Args:
        path: The file.
        mapped: Whether its lists stay on disk; nothing can be added to such an index. Blocks for fast scanning come
            into memory nevertheless.

    Raises:
        ArtifactError: faiss cannot read it.
    """
    import faiss

    try:
        index = faiss.read_index(str(path), _how(path) if mapped else 0)
    except RuntimeError as error:
        raise ArtifactError(f"{path} is no index of this faiss: {reason(error)}") from None
    _keep_threads(index)
    return index


def _how(path: Path) -> int:
    """The flag of faiss that leaves vectors on disk: one for what has lists, another for what has none.

    Either flag reads what is of the other kind into memory.
    """
    import faiss

    is_flat = False
    with suppress(OSError), path.open("rb") as file:  # which faiss will meet, too
        is_flat = file.read(len(_ID_MAP)) == _ID_MAP
    return int(faiss.IO_FLAG_MMAP_IFC if is_flat else faiss.IO_FLAG_MMAP)


def _keep_threads(index: Any) -> None:
    """Let lists on disk be read by the threads that search: faiss would start 32 more for every search."""
    import faiss

    lists = faiss.try_extract_index_ivf(index)
    stored: Any = None if lists is None else faiss.downcast_InvertedLists(lists.invlists)  # type: ignore[arg-type]
    if isinstance(stored, faiss.OnDiskInvertedLists):
        stored.prefetch_nthread = 0


def read_centroids(path: Path) -> Any:
    """An index file without what is in its lists; it cannot be searched."""
    import faiss

    index = read(path)
    faiss.extract_index_ivf(index).replace_invlists(None, False)  # type: ignore[arg-type]  # which frees them
    return index


def reason(error: RuntimeError) -> str:
    """What faiss says at the end, after its own source line: of the system, if that refused something."""
    text = str(error).strip().splitlines()[-1]
    system = re.search(r"\(([^()]+)\)$", text)
    return text if system is None else system[1]


def widened(vectors: NDArray[np.float16]) -> NDArray[np.float32]:
    """The same (rows, dimension) values in float32; numpy takes half as long again."""
    import faiss

    quantizer: Any = faiss.ScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_fp16)
    wide: NDArray[np.float32] = quantizer.decode(np.ascontiguousarray(vectors).view(np.uint8))
    return wide


def search(
    index: Any,
    queries: NDArray[np.float32],
    top_k: int,
    selected: NDArray[np.uint8] | None = None,
) -> tuple[Scores, Rows]:
    """The best rows by their codes.

    Args:
        index: As filled.
        queries: (queries, dimension) float32.
        top_k: Results per query.
        selected: Bits of the rows that may be found, lowest first; None for all.

    Returns:
        (queries, top_k) scores and rows; -1 fills up.
    """
    import faiss

    params = None
    if selected is not None:
        bitmap = faiss.IDSelectorBitmap(8 * len(selected), faiss.swig_ptr(selected))
        params = _parameters(index, bitmap)
    scores, rows = _room(len(queries), top_k)
    index.search(np.ascontiguousarray(queries), top_k, params=params, D=scores, I=rows)
    return scores, rows


def _room(num_queries: int, top_k: int) -> tuple[Scores, Rows]:
    """(num_queries, top_k) arrays for faiss to write scores and rows to.

    They are never left as memory was found: a search of pq4 codes takes the largest float32 there for a score that
    is to be beaten, and then finds nothing (faiss 1.15.1).
    """
    return np.zeros((num_queries, top_k), np.float32), np.zeros((num_queries, top_k), np.int64)


def search_partitions(
    indexes: Sequence[Any],
    queries: NDArray[np.float32],
    top_k: int,
    selected: NDArray[np.uint8] | None = None,
    *,
    centroids: Any = None,
) -> tuple[Scores, Rows]:
    """The best rows of some partitions, which visit the lists that are nearest in all there are.

    Args:
        indexes: Those that are searched.
        queries: As of `search`.
        top_k: As of `search`.
        selected: As of `search`.
        centroids: The index of lists that tells which are nearest; by default the first of those that are searched. If
            it is given, a partition is searched in the same way, to the bit, whether alone or beside others.
    """
    import faiss

    if len(indexes) == 1 and centroids is None:
        return search(indexes[0], queries, top_k, selected)
    if isinstance(faiss.downcast_index(indexes[0]), faiss.IndexIDMap):
        found = [search(index, queries, top_k, selected) for index in indexes]
    else:
        whole = indexes[0] if centroids is None else centroids
        first: Any = faiss.extract_index_ivf(whole)
        ready = turned(whole, queries)
        near, numbers = first.quantizer.search(ready, first.nprobe)
        params = None
        if selected is not None:
            bitmap = faiss.IDSelectorBitmap(8 * len(selected), faiss.swig_ptr(selected))
            params = faiss.SearchParametersIVF(sel=bitmap, nprobe=first.nprobe)  # type: ignore[call-arg]
        found = [_search_lists(index, ready, top_k, near, numbers, params) for index in indexes]
    scores, rows = (np.concatenate(values, axis=1) for values in zip(*found, strict=True))
    return best(scores, rows, top_k)


def _search_lists(
    index: Any,
    queries: NDArray[np.float32],
    top_k: int,
    near: Scores,
    numbers: Rows,
    params: Any,
) -> tuple[Scores, Rows]:
    """The best rows of lists that are given; faiss's own wrapper takes no selection."""
    import faiss

    lists: Any = faiss.extract_index_ivf(index)
    scores, rows = _room(len(queries), top_k)
    arrays = (faiss.swig_ptr(array) for array in (numbers, near, scores, rows))
    lists.search_preassigned_c(len(queries), faiss.swig_ptr(queries), top_k, *arrays, False, params)
    return scores, rows


def _parameters(index: Any, selector: Any) -> Any:
    import faiss

    if isinstance(faiss.downcast_index(index), faiss.IndexIDMap):
        return faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]  # faiss adds keywords at run time
    lists = faiss.extract_index_ivf(index)
    params = faiss.SearchParametersIVF(sel=selector, nprobe=lists.nprobe)  # type: ignore[call-arg]
    if isinstance(faiss.downcast_index(index), faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=params)  # type: ignore[call-arg]
    return params
