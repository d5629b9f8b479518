"""Which work was begun and never ended: so an item that kills its worker is found, instead of killing it for ever.

Ray starts the work of a dead worker again, as often as it dies. A first death may be anybody's fault. What has killed
two workers is done with care: every part of it (of a piece its batches, of a batch its items) is announced before it
begins, and a single item that kills two more workers is set aside. Where nothing dies twice, the work is done exactly
as without this, to the last bit.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.leaving import leave_without_destructors

DEATHS = 2
"""So many deaths over the same work are no accident."""
KILLED_WORKER = "killed_worker"


class Journal:
    """What is under way; lives as a small actor beside the driver."""

    def __init__(self) -> None:
        leave_without_destructors()
        self._begun: Counter[str] = Counter()

    def begin(self, work: str) -> int:
        """Note that work begins; how many times it was begun before and did not end."""
        before = self._begun[work]
        self._begun[work] += 1
        return before

    def end(self, work: str) -> None:
        """Note that work has ended, well or badly."""
        del self._begun[work]


class Announcer:
    """A worker's side of the journal.

    Args:
        journal: The actor's handle; without one nothing is ever announced, and nothing has ever died.
    """

    def __init__(self, journal: Any) -> None:
        self._journal = journal

    @contextmanager
    def announced(self, work: str) -> Iterator[bool]:
        """Work that others should know of if it kills this process.

        Yields:
            Whether it has killed so many workers before that care is due.
        """
        if self._journal is None:
            yield False
            return
        import ray

        deaths: int = ray.get(self._journal.begin.remote(work))
        try:
            yield deaths >= DEATHS
        finally:
            self._journal.end.remote(work)


def start_journal() -> Any:
    """A journal for one run. Where its node is lost it begins anew elsewhere, and has forgotten some deaths."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Journal).remote()


def message(stage: str) -> str:
    """What is said of an item that was set aside for it."""
    return f"{DEATHS} workers died while they {stage} this item and nothing else"
