"""Says so where a cluster shrank until encoders hold all that is left: Ray Data would wait without a word."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.embedding.preflight import require_room
from pipelines.recipe import Recipe
from slq.errors import SlqError

log = logging.getLogger(__name__)
_EVERY_S = 15.0


@contextmanager
def shortage_told(
    recipe: Recipe, resources: Callable[[], dict[str, float]], every_s: float = _EVERY_S
) -> Iterator[None]:
    """Look at the cluster now and then while the block runs, and warn once for each time that it has become too small.

    It is no error: a node that comes back lets the run go on.

    Args:
        recipe: The resolved recipe.
        resources: Of the whole cluster, as `ray.cluster_resources` tells.
        every_s: Between two looks.
    """
    ended = threading.Event()

    def look() -> None:
        told = False
        while not ended.wait(every_s):
            try:
                require_room(recipe, resources(), 1)
                told = False
            except SlqError as error:
                if not told:
                    log.warning(
                        "the cluster has become too small: %s; until then, or until nodes come back, the run waits",
                        error,
                    )
                told = True

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
