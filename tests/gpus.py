"""GPUs that are not there: faiss's entry points for them, on CPU indexes that behave as its own on a GPU do.

What faiss refuses on a GPU is refused here too, and so is what would break there: two threads at once.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
import pytest

from slq.index import building, devices

MOST = 2048
CLONED = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
"""What `ToGpuCloner` of faiss 1.15 copies; `test_index_gpu.py` asks faiss where it has code for GPUs."""


class FakeGpus:
    """Stands for the GPUs of a machine.

    Args:
        count: How many.

    Attributes:
        moved: Number of the GPU and the copy, of each index that was moved.
        searched: Queries of each search on a GPU, with the number of results.
        full: Whether memory is used up.
        scratch: Bytes that were asked for.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.moved: list[tuple[int, Any]] = []
        self.searched: list[tuple[int, int]] = []
        self.full = False
        self.scratch: list[int] = []
        self._at_work = threading.Lock()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Let faiss have them."""
        for cached in (devices._gpu, building._read):
            cached.cache_clear()
        patch.setattr(faiss, "StandardGpuResources", lambda: self, raising=False)
        patch.setattr(faiss, "get_num_gpus", lambda: self.count, raising=False)
        patch.setattr(faiss, "index_cpu_to_gpu", self._move, raising=False)

    def setTempMemory(self, size: int) -> None:  # noqa: N802 - faiss's name
        self.scratch.append(size)

    def _move(self, resources: Any, number: int, index: Any) -> Any:
        with self._alone():
            assert resources is self
            if number >= self.count:
                raise RuntimeError(
                    f"Error: 'device < getNumDevices()': Invalid GPU device {number}"
                )
            if self.full:
                raise RuntimeError(
                    "Error in allocMemory at StandardGpuResources.cpp:452:\nError: 'err == cudaSuccess' failed: "
                    "StandardGpuResources: alloc fail size 64 (cudaMalloc error out of memory [2])"
                )
            _require_cloned(index)
            copy = _copied(index)
            copy.search = self._search_of(copy)
            self.moved.append((number, copy))
            return copy

    def _search_of(self, copy: Any) -> Any:
        search = copy.search

        def recorded(queries: Any, k: int, *, params: Any = None, **room: Any) -> Any:
            with self._alone():
                if params is not None:
                    raise RuntimeError("GPU index: passed unhandled SearchParameters")
                if not 0 < k <= MOST:
                    raise RuntimeError(f"GPU index only supports min/max-K selection up to {MOST}")
                self.searched.append((len(queries), k))
                return search(queries, k, **room)

        return recorded

    @contextmanager
    def _alone(self) -> Iterator[None]:
        assert self._at_work.acquire(blocking=False), "two threads use one GpuResources"
        try:
            yield
        finally:
            self._at_work.release()


def _require_cloned(index: Any) -> None:
    deep = faiss.downcast_index(index)
    if isinstance(deep, faiss.IndexIDMap | faiss.IndexPreTransform):
        _require_cloned(deep.index)
        return
    if not isinstance(deep, CLONED):
        raise RuntimeError("This index type is not implemented on GPU.")  # noqa: TRY004 - as faiss does
    if isinstance(deep, faiss.IndexIVF):
        _require_cloned(deep.quantizer)
        if not 0 < deep.nprobe <= MOST:
            raise RuntimeError(f"GPU index only supports nprobe <= {MOST}; passed {deep.nprobe}")
        sizes = sum(deep.invlists.list_size(n) for n in range(deep.nlist))
        assert sizes == deep.ntotal == index.ntotal, "a GPU index counts what its lists hold"


def _copied(index: Any) -> Any:
    """A copy with lists of its own, which are read one by one as a GPU's are."""
    lists = faiss.try_extract_index_ivf(index)
    if lists is None:
        return faiss.clone_index(index)
    held, empty = lists.invlists, faiss.ArrayInvertedLists(lists.nlist, lists.code_size)
    lists.invlists = empty
    try:
        copy = faiss.clone_index(index)
    finally:
        lists.invlists = held
    stored: Any = faiss.extract_index_ivf(copy).invlists
    for number in range(lists.nlist):
        size = held.list_size(number)
        if size:
            ids = faiss.rev_swig_ptr(held.get_ids(number), size).astype(np.int64)
            codes = faiss.rev_swig_ptr(held.get_codes(number), size * lists.code_size).copy()
            stored.add_entries(number, size, faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    return copy


def real_gpus() -> int:
    """That faiss sees here."""
    return devices.faiss_build().num_gpus
