"""faiss indexes: how they are made, trained, filled, stored and searched. Ids are explicit row numbers.

faiss is imported on first use: settings and exact search need none of it.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.errors import ArtifactError
from slq.index.config import IndexConfig
from slq.index.exact import Block, Rows, Scores

_SCALAR_TYPES = {"float16": "SQfp16", "int8": "SQ8", "int4": "SQ4"}
_PQ_SUBSPACE = 8  # values that one four-bit code of `pq4` stands for
_HNSW_LINKS = 32
_SEARCH_BREADTH = 2  # of the coarse graph, per probe


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
    set_probes(index, config.num_probes)
    return index


def _rotation(config: IndexConfig, dimension: int) -> str:
    if config.rotation == "opq":
        return f"OPQ{-(-dimension // _PQ_SUBSPACE)}"
    return f"RR{dimension}" if config.rotation == "random" else ""


def _codes(config: IndexConfig, dimension: int) -> str:
    if config.codes == "float32":
        return "Flat"
    if config.codes == "rabitq":
        return "RaBitQfs"
    if config.codes == "pq4":
        return f"PQ{-(-dimension // _PQ_SUBSPACE)}x4fs"
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


def write(index: Any, path: Path) -> None:
    """Write an index file.

    Raises:
        OSError: It cannot be written.
    """
    import faiss

    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(_reason(error)) from None


def read(path: Path) -> Any:
    """An index file whose lists stay on disk.

    Raises:
        ArtifactError: faiss cannot read it.
    """
    import faiss

    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ArtifactError(f"{path} is no index of this faiss: {_reason(error)}") from None


def _reason(error: RuntimeError) -> str:
    """What faiss says at the end, after its own source line: of the system, if that refused something."""
    text = str(error).strip().splitlines()[-1]
    system = re.search(r"\(([^()]+)\)$", text)
    return text if system is None else system[1]


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
    scores, rows = index.search(np.ascontiguousarray(queries), top_k, params=params)
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
