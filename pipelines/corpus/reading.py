"""Reading ahead: while one answer of a store is used, the next ones are on their way."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_NUM_THREADS = 16  # an object store answers in some 20 ms, however many ask
T = TypeVar("T")
R = TypeVar("R")


def ahead(call: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Each item with its result, in order. Up to 16 calls are under way, so endless streams take bounded memory."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(call, item)))
                if len(waiting) >= _NUM_THREADS:
                    done, result = waiting.popleft()
                    yield done, result.result()
            while waiting:
                done, result = waiting.popleft()
                yield done, result.result()
        finally:
            for _, result in waiting:
                result.cancel()
