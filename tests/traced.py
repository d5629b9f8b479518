"""The most memory that Python objects take during a call, measured in a process of its own.

Threads that other tests have left would count too, and tracemalloc of Python 3.11 may crash where it is stopped while
a thread allocates, so it never is: the process ends instead.
"""

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def with_peaks(call: Callable[..., Any], *calls: tuple[Any, ...]) -> list[tuple[Any, int]]:
    """Result and peak in bytes of a module's function, called with each tuple of arguments in turn."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_with_peaks, call, calls).result()


def _with_peaks(
    call: Callable[..., Any], calls: tuple[tuple[Any, ...], ...]
) -> list[tuple[Any, int]]:
    tracemalloc.start()
    found = []
    for arguments in calls:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        result = call(*arguments)
        found.append((result, tracemalloc.get_traced_memory()[1] - before))
    return found
