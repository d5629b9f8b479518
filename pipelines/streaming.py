"""What flows on Ray Data share: rows that stay alone, and actors that stay."""

import logging
from typing import Any

_BLOCK_BYTES = (
    128  # below any piece of work and above any shard id: every row is a block of its own
)
WHOLE: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
"""Arguments of `map_batches` with which a function gets a block as it is."""


def rows_alone(todo: list[dict[str, Any]]) -> Any:
    """A data set of these rows, each a block of its own that Ray Data neither splits nor joins to others."""
    import ray
    from ray.data import DataContext

    context = DataContext.get_current()
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray.data.from_items(todo, override_num_blocks=len(todo))


def staying_actors(size: int, threads: int) -> Any:
    """A pool of actors that stay, each of which works on `threads` pieces at once and has as many waiting."""
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(
        size=size,
        max_concurrent_calls_per_actor=threads,
        max_tasks_in_flight_per_actor=2 * threads,
        enable_true_multi_threading=True,
    )
