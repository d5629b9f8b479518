"""Where checkpoints of training go, and what is installed in the run folder from the last of them."""

import logging
import shutil
from pathlib import Path
from typing import Any

from pipelines.recipe import VARIANTS, Recipe
from pipelines.trainer import ADAPTER
from pipelines.training_log import HISTORY
from slq.artifacts import ADAPTER_WEIGHTS, load_adapter_config
from slq.errors import ArtifactError, ConfigError, StorageError

log = logging.getLogger(__name__)


def require_store(recipe: Recipe) -> None:
    """Try an object store before workers start: what Ray says of one that refuses fills a screen."""
    path, filesystem = checkpoint_store(recipe)
    if filesystem is None:
        return
    try:
        filesystem.create_dir(path)
        with filesystem.open_output_stream(f"{path}/.writable") as file:
            file.write(b"")
    except Exception as error:  # noqa: BLE001 - botocore's errors share no base with OSError
        raise StorageError(
            f"storage.checkpoints {recipe.storage.checkpoints} cannot be written: {error}; "
            "check the bucket, AWS_ENDPOINT_URL and the credentials in the environment"
        ) from None


def given_back(recipe: Recipe, path: str) -> bool:
    """Install the adapter of a finished run again from its last checkpoint, if that is still there."""
    from ray.train import Checkpoint

    _, filesystem = checkpoint_store(recipe)
    try:
        with Checkpoint(path, filesystem).as_directory() as folder:
            parts = [ADAPTER, *(f"{VARIANTS}/{name}" for name in recipe.adapter.variants)]
            if not all((Path(folder) / part / ADAPTER_WEIGHTS).is_file() for part in parts):
                return False
            install(Path(folder), recipe)
    except OSError as error:
        log.warning(
            "checkpoint %s cannot be read, so the run goes on from another: %s", path, error
        )
        return False
    log.info("adapter %s is given back from %s", recipe.storage.adapter, path)
    return True


def checkpoint_store(recipe: Recipe) -> tuple[str, Any]:
    """Where checkpoints go: a path, and the Arrow file system that it belongs to (None: this machine's).

    Raises:
        ConfigError: `storage.checkpoints` names a store of an unknown kind.
    """
    place = recipe.storage.checkpoints
    if place is None:
        return str(recipe.storage.dir.resolve() / "ray"), None
    scheme, separator, path = place.partition("://")
    if not separator:
        return str(Path(place).resolve()), None
    if scheme != "s3":
        raise ConfigError(f"storage.checkpoints {place!r}: give a folder or s3://bucket/prefix")
    import s3fs
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return path.rstrip("/"), PyFileSystem(
        FSSpecHandler(s3fs.S3FileSystem(use_listings_cache=False))
    )  # workers write there too


def adapters_complete(recipe: Recipe) -> bool:
    """Whether the files of the adapter and its variants are there; one that is lost is given back from a checkpoint."""
    storage = recipe.storage
    for folder in (storage.adapter, *map(storage.variant, recipe.adapter.variants)):
        try:
            load_adapter_config(folder)
        except ArtifactError:
            return False
        if not (folder / ADAPTER_WEIGHTS).is_file():
            return False
    return True


def install(checkpoint: Path, recipe: Recipe) -> None:
    """Move the adapter and the history out of the last checkpoint into the run folder."""
    target = recipe.storage.adapter
    copies = {ADAPTER: target}
    if recipe.adapter.variants:
        copies[VARIANTS] = recipe.storage.dir / VARIANTS
    try:
        for part, place in copies.items():
            partial = place.with_name(place.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(checkpoint / part, partial)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
    except OSError as error:
        raise StorageError(
            f"adapter {target} cannot be written: {error}; free space and run `slq train` again"
        ) from None
    (recipe.storage.dir / "train").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(checkpoint / HISTORY, recipe.storage.dir / "train" / HISTORY)
