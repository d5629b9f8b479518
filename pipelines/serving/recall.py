"""How much of the exact top k coarse searches find, measured while the service runs.

A share of searches is done again, exactly, behind the answers: one at a time, at the lowest priority, and not at all
while one runs. Exact search reads every vector, so it costs memory bandwidth in proportion to the index.
"""

import logging
import os
import random
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from pipelines.serving import metrics
from pipelines.serving.metrics import forget, record
from slq.errors import ConfigError, DataError
from slq.index import Hit, SearchIndex

log = logging.getLogger(__name__)
_LOWEST_PRIORITY = 19
_WINDOW = 256  # comparisons that the mean is of


class RecallMeter:
    """Compares searches with exact ones.

    Args:
        share: Of searches, 0 to 1.
        top_k: Results that are compared; searches for fewer are left out.

    Attributes:
        mean: Of the last comparisons with the version that was compared last; None before the first.
    """

    def __init__(self, share: float, top_k: int) -> None:
        self._share = share
        self._top_k = top_k
        self._busy = threading.Lock()
        self._found: deque[float] = deque(maxlen=_WINDOW)
        self._version = ""
        self._pool = ThreadPoolExecutor(1, "recall", initializer=_lower_priority)
        self.mean: float | None = None

    def consider(
        self, index: SearchIndex, vector: NDArray[np.float32], hits: Sequence[Hit], top_k: int
    ) -> None:
        """Compare a search, if its turn is; nobody waits for it.

        Args:
            index: That answered; of the version that answered, whatever the service moves to meanwhile.
            vector: (dimension,) of the query.
            hits: Its answer, of the whole index.
            top_k: That were asked for.
        """
        if top_k < self._top_k or random.random() >= self._share:
            return
        if not self._busy.acquire(blocking=False):
            record(metrics.RECALL_CHECKS, result="dropped")
            return
        self._pool.submit(self._compare, index, vector, [hit.id for hit in hits[: self._top_k]])

    def _compare(
        self, index: SearchIndex, vector: NDArray[np.float32], found: Sequence[str]
    ) -> None:
        try:
            (best,) = index.search(vector[None, :], self._top_k, exact=True)
            self._add(index.version, recall(found, [hit.id for hit in best]))
        except Exception as error:  # noqa: BLE001 - whatever it is, answers do not depend on it
            record(metrics.RECALL_CHECKS, result="failed")
            log.warning("recall of index version %s is unknown: %s", index.version, error)
        finally:
            self._busy.release()

    def _add(self, version: str, value: float) -> None:
        if version != self._version:
            self._found.clear()
            forget(metrics.RECALL, k=str(self._top_k), version=self._version)
            self._version = version
        self._found.append(value)
        self.mean = sum(self._found) / len(self._found)
        record(metrics.RECALL, self.mean, k=str(self._top_k), version=version)
        record(metrics.RECALL_CHECKS, result="compared")

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown()


def recall(found: Sequence[str], best: Sequence[str]) -> float:
    """Share of the best ids that were found; 1 where there are none.

    Args:
        found: Ids of a search.
        best: Ids of the exact one.
    """
    return len(set(found) & set(best)) / len(best) if best else 1.0


def require_exact(index: SearchIndex) -> None:
    """Check that an index can be searched exactly.

    Raises:
        ConfigError: Its engine cannot.
    """
    try:
        index.search(np.eye(1, index.dimension, dtype=np.float32), 1, exact=True)
    except DataError as error:
        raise ConfigError(
            f"serve.telemetry.recall_share compares with exact search: {error}; set it to 0"
        ) from None


def _lower_priority() -> None:
    """Of this thread only, which Linux alone can tell from its process."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
