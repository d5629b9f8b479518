"""Before anything starts: refuse what would stall without a word, and warn of what would idle."""

import logging

from pipelines.recipe import Recipe
from slq.errors import ConfigError, HardwareError

log = logging.getLogger(__name__)
_PIECES_IN_STORE = (
    16  # that the object store must have room for: in reading, waiting, encoding and writing
)


def require_room(recipe: Recipe, resources: dict[str, float], num_nodes: int) -> None:
    """Check the flow against the cluster.

    Args:
        recipe: The resolved recipe.
        resources: Of the whole cluster, as `ray.cluster_resources` tells.
        num_nodes: That are alive.

    Raises:
        ConfigError: Encoders would hold every CPU, or pieces would not fit into the object store.
        HardwareError: There are fewer GPUs than the encoders ask for.
    """
    wanted, section = recipe.resources, recipe.embed
    gpus, cpus = wanted.gpus_per_worker, resources.get("CPU", 0.0)
    if not gpus and wanted.embed_workers >= cpus:
        raise ConfigError(
            f"resources.embed_workers is {wanted.embed_workers}, but the cluster has {cpus:g} CPUs and reading needs "
            f"one; set it to at most {max(1, int(cpus) - 1)}"
        )
    if gpus * wanted.embed_workers > resources.get("GPU", 0.0):
        raise HardwareError(
            f"{wanted.embed_workers} encoders with {gpus:g} GPUs each were asked for, but the cluster has "
            f"{resources.get('GPU', 0.0):g}; lower resources.embed_workers"
        )
    store = resources.get("object_store_memory")
    if store is not None and section.piece_bytes * _PIECES_IN_STORE > store:
        raise ConfigError(
            f"embed.piece_bytes is {section.piece_bytes}, but {_PIECES_IN_STORE} pieces must fit into the cluster's "
            f"object store of {store / 2**20:.0f} MiB; lower it to {int(store / _PIECES_IN_STORE)}"
        )
    if num_nodes > 1 and "://" not in recipe.storage.embeddings:
        log.warning(
            "the cluster has %d nodes, and %s must be the same folder on all of them; "
            "otherwise set storage.embedding_dir to an object store",
            num_nodes,
            recipe.storage.embeddings,
        )


def workers_for(recipe: Recipe, num_rows: int | None, num_shards: int) -> int:
    """Encoders that will have work: a piece has some thousand rows, and fewer pieces than encoders leave some idle."""
    wanted = recipe.resources.embed_workers
    pieces = num_shards
    if num_rows is not None:
        pieces = max(num_shards, -(-num_rows // recipe.embed.piece_rows))
    if pieces < wanted:
        log.warning(
            "only %d of %d encoders are started: there are no more pieces; lower embed.piece_rows to use all",
            pieces,
            wanted,
        )
    return min(wanted, pieces)
