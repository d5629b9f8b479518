"""Refuses a service that could not answer, before anything of it is started."""

import logging
import uuid

from pipelines.recipe import Recipe
from pipelines.serving import traces
from pipelines.serving.access import require_keys
from pipelines.serving.pinned import Pinned
from pipelines.serving.recall import require_exact
from pipelines.tasks import require_gpus
from slq.artifacts import load_adapter_config, require_same_fingerprint
from slq.engines import FAISS
from slq.errors import ConfigError
from slq.index import VectorIndex
from slq.index.config import CPU
from slq.index.shares import num_partitions

log = logging.getLogger(__name__)


def pinned_to(recipe: Recipe) -> Pinned:
    """What the service of a recipe will be pinned to, if it can answer.

    Raises:
        ArtifactError: Adapter or index is missing or damaged.
        ConfigError: A GPU is named for the index, whose replica gets one from Ray; the service would be open to
            other machines without API keys; traces are asked for and cannot be made; or recall is, and the index's
            engine has no exact search.
        HardwareError: A GPU is asked for the index, and the cluster has none.
        ArtifactMismatchError: They belong to different embedding spaces; both fingerprints are named.
    """
    require_keys(recipe.serve)
    _require_engine(recipe)
    _require_search_device(recipe)
    _require_together(recipe)
    if recipe.serve.telemetry.traces is not None:
        traces.require_installed()
    adapter = load_adapter_config(recipe.storage.adapter)
    course_file = recipe.storage.dir.resolve() / "serve" / f"{uuid.uuid4().hex[:12]}.json"
    adapters = {
        name: load_adapter_config(folder).fingerprint
        for name, folder in recipe.serve.adapters.items()
    }
    # Closed again: what only one process can open is the replica's.
    with recipe.index_place.open(has_codes=False) as index:
        if isinstance(index, VectorIndex):
            _warn_of_empty_partitions(recipe, index)
        elif recipe.serve.telemetry.recall_share:
            require_exact(index)  # an index of faiss always can, at the price of reading all of it
        found = Pinned(index.fingerprint, index.version, course_file, adapters)
    require_same_fingerprint(
        found.fingerprint,
        adapter.fingerprint,
        expected_in=f"index {recipe.index_place}",
        found_in=f"adapter {recipe.storage.adapter}",
        remedy="rebuild it with `slq embed` and `slq index`",
    )
    return found


def _require_together(recipe: Recipe) -> None:
    """Where the service is in one process, each replica opens the index."""
    if not recipe.serve.is_together:
        return
    if recipe.index.engine != FAISS and recipe.serve.scaling.backbone.max_replicas > 1:
        raise ConfigError(
            f"with serve.is_together each replica opens the index, and one of {recipe.index.engine} may let only one "
            "process in; set serve.scaling.backbone.max_replicas=1 or serve.is_together=false"
        )
    if recipe.index.search_device != CPU:
        raise ConfigError(
            "with serve.is_together the index is searched on the CPU; set index.search_device=cpu or "
            "serve.is_together=false"
        )


def _require_engine(recipe: Recipe) -> None:
    """Partitions and versions are those of an index of faiss."""
    if recipe.index.engine == FAISS:
        return
    for key, is_set in {
        "resources.index_partitions": recipe.resources.index_partitions > 1,
        "serve.follow_index": recipe.serve.follow_index,
    }.items():
        if is_set:
            raise ConfigError(
                f"{key} is for an index of faiss, and index.engine is {recipe.index.engine}, which has its own; leave "
                "it out"
            )


def _require_search_device(recipe: Recipe) -> None:
    device = recipe.index.search_device
    if device not in (CPU, "cuda"):
        raise ConfigError(
            f"index.search_device is {device}, but the service's index works on the GPU that Ray gives it; set "
            "index.search_device=cuda"
        )
    if device != CPU:
        gpus, way_out = recipe.resources.gpus_per_index_worker, "set index.search_device=cpu"
        require_gpus("resources.gpus_per_index_worker", gpus, way_out)
        if recipe.resources.index_partitions > 1:
            raise ConfigError(
                "a GPU holds a whole index: with index.search_device=cuda set resources.index_partitions=1"
            )


def _warn_of_empty_partitions(recipe: Recipe, index: VectorIndex) -> None:
    count, files = recipe.resources.index_partitions, num_partitions(index.manifest)
    if files < count:
        log.warning(
            "index version %s has its codes in %d files, so that %d of %d partitions hold nothing; lower "
            "resources.index_partitions, or build it with a smaller index.partition_bytes",
            *(index.version, files, count - files, count),
        )
