"""Builds index versions from the committed shards of embedding data sets, and changes what they hold.

Another engine that holds the vectors is written by the code of `slq export`; its collections are changed by writing a
new state of the data set.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipelines.choosing import CHOICE, Choice, choice_name
from pipelines.embeddings import open_embeddings
from pipelines.export import hand_over
from pipelines.recipe import Recipe
from pipelines.tasks import Countdown, cluster_errors, collect_windowed, require_gpus
from slq.engines import FAISS
from slq.errors import ArtifactError, ConfigError
from slq.index import Content, append, compact, current_version, delete, write_version
from slq.index.building import Each, here
from slq.index.canary import keep_canary
from slq.index.config import CPU
from slq.index.versions import Manifest, read_manifest, require_whole

log = logging.getLogger(__name__)
_RETRIES = 3
A = TypeVar("A")
R = TypeVar("R")


def index(recipe: Recipe) -> Path:
    """Build and publish an index version; does nothing when the current one already holds these vectors.

    Returns:
        The index folder.

    Raises:
        ArtifactError: The data set is unfinished, damaged or empty; the shard is named.
        ConfigError: The settings do not fit to the number of vectors, or to one another.
        HardwareError: A GPU that is asked for is not there.
        StorageError: The index cannot be written; the old version stays in place.
    """
    folder, location = recipe.storage.index, recipe.storage.embeddings
    found = open_embeddings(location, recipe.storage.retry_s)
    chosen = {} if recipe.index.goal is None else {CHOICE: choice_name(recipe, found)}
    content = found.content(**chosen)
    if _is_current(folder, recipe, content):
        log.info("%s is up to date: nothing to do", folder)
        return folder
    if chosen:
        choice = Choice.made(recipe, found)
        manifest = write_version(
            folder, content, choice.config, each=_workers(recipe), settle=choice.settle
        )
    else:
        manifest = write_version(folder, content, recipe.index.own, each=_workers(recipe))
    _tell(folder, manifest)
    return folder


def fill(recipe: Recipe) -> str:
    """Write the data set into the collection of another engine; does nothing when it holds all of it already.

    Returns:
        Which collection.

    Raises:
        ArtifactError: The data set is unfinished, damaged or empty; the shard is named.
        ConfigError: The collection is of another embedding space or was not written by slq, or a package is missing.
        DataError: A vector is not finite or zero, or an id comes twice.
        StorageError: The engine cannot be reached, or refuses.
    """
    place = recipe.index_place
    found = open_embeddings(recipe.storage.embeddings, recipe.storage.retry_s)
    rows = hand_over(found, place.engine)
    if found.canary is not None:
        keep_canary(place.folder, found.canary, found.fingerprint)
    log.info("%s: %d vectors of dimension %d", place, rows, found.dimension)
    return str(place)


def require_own(recipe: Recipe, change: str) -> None:
    """Refuse a change of versions where another engine holds the vectors.

    Args:
        recipe: The resolved recipe.
        change: What is asked for, as on the command line.

    Raises:
        ConfigError: One does.
    """
    if recipe.index.engine != FAISS:
        raise ConfigError(
            f"{change} changes an index of faiss, and index.engine is {recipe.index.engine}: change the data set and "
            "run `slq index` again, or use the engine's own client"
        )


def grow(recipe: Recipe, location: str) -> Path:
    """A new version with the rows of a further data set; items that were there already are replaced.

    Args:
        recipe: The resolved recipe.
        location: The further data set.

    Raises:
        ArtifactError: There is no index, or the data set is unfinished, damaged or empty.
        ArtifactMismatchError: It is of another embedding space.
    """
    found = open_embeddings(location, recipe.storage.retry_s)
    folder = recipe.storage.index
    each, device = _workers(recipe), recipe.index.device
    _tell(folder, append(folder, found.content(), each=each, device=device))
    return folder


def _workers(recipe: Recipe) -> Each:
    """Ray tasks, or this process where one worker is enough: it uses all cores.

    Raises:
        ConfigError: A GPU is named, and tasks would each get another one.
        HardwareError: Tasks ask for GPUs that the cluster does not have.
    """
    workers, gpus = recipe.resources.index_workers, recipe.resources.gpus_per_index_worker
    device = recipe.index.device
    if workers == 1:
        return each_here
    if device not in (CPU, "cuda"):
        raise ConfigError(
            f"index.device is {device}, but with resources.index_workers {workers} each task works on the GPU that Ray "
            "gives it; set index.device=cuda"
        )
    if device != CPU:
        require_gpus("resources.gpus_per_index_worker", gpus, "set index.device=cpu")
    return partial(each_in_tasks, workers, gpus=gpus)


def each_here(
    what: str, function: Callable[[A], R], arguments: Sequence[A], *, device: str = CPU
) -> list[R]:
    """`slq.index.building.here` with a line of progress where a step takes longer than a second."""
    countdown = Countdown(f"index {what}", len(arguments), quiet_s=1.0)

    def counted(argument: A) -> R:
        result = function(argument)
        countdown.ended()
        return result

    return here(what, counted, arguments, device=device)


def each_in_tasks(
    workers: int,
    what: str,
    function: Callable[[A], R],
    arguments: Sequence[A],
    *,
    device: str = CPU,
    gpus: float = 1.0,
) -> list[R]:
    """Call a function for each argument in Ray tasks, so many at once; as `slq.index.building.Each`.

    A task whose worker is lost is done again by another one. One that works on a GPU holds `gpus` of it, and as Ray has
    it by itself, its process ends with it: CUDA would stay at this GPU, whichever one the next task gets.

    Raises:
        ClusterError: Ray gave up on lost workers.
        SlqError: Ours that ended a task, as it was raised there; so are errors of the file system.
    """
    import ray

    held = {} if device == CPU else {"num_gpus": gpus}
    options = {"max_retries": _RETRIES, "scheduling_strategy": "SPREAD", **held}
    task = ray.remote(num_cpus=1, **options)(_called)
    starting = (task.remote(function, argument) for argument in arguments)
    with cluster_errors():
        return collect_windowed(starting, len(arguments), f"index {what}", workers)


def _called(function: Callable[[A], R], argument: A) -> R:
    return function(argument)


def shrink(recipe: Recipe, ids: Collection[str]) -> Path:
    """A new version without these items; ids that are not there are counted.

    Raises:
        ArtifactError: There is no index.
    """
    folder = recipe.storage.index
    manifest, gone = delete(folder, ids)
    if gone < len(ids):
        log.warning("%d of %d ids are not in the index", len(ids) - gone, len(ids))
    _tell(folder, manifest)
    return folder


def join(recipe: Recipe) -> Path:
    """A new version of one segment without deleted rows, built as the recipe says.

    Raises:
        ArtifactError: There is no index, or nothing is left of it.
    """
    folder = recipe.storage.index
    config = None if recipe.index.goal else recipe.index.own
    _tell(folder, compact(folder, config, _workers(recipe), device=recipe.index.device))
    return folder


def _tell(folder: Path, manifest: Manifest) -> None:
    log.info(
        "%s: version %s with %d vectors of dimension %d, segments: %d",
        folder,
        manifest.version,
        manifest.num_vectors,
        manifest.dimension,
        len(manifest.segments),
    )


def _is_current(folder: Path, recipe: Recipe, content: Content) -> bool:
    """Whether the current version is what would be built, and whole."""
    try:
        manifest = read_manifest(folder, current_version(folder))
        require_whole(folder, manifest)
    except ArtifactError:  # none yet, or a damaged one: both are built anew
        return False
    is_chosen = recipe.index.goal is not None
    return (
        (is_chosen or manifest.config == recipe.index.own.recorded())
        and manifest.source == content.origin
        and manifest.num_vectors == content.num_rows
        and not any(one.num_deleted for one in manifest.segments)
    )
