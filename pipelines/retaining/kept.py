"""Results that are kept until something they depend on changes."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.progress import show
from pipelines.recipe import Recipe
from slq.artifacts import ADAPTER_WEIGHTS
from slq.backbones.loading import backbone_revision
from slq.errors import StorageError
from slq.files import file_sha256, read_json, write_json

_ASKED_WITH = ("batch_size",)  # passes of other sizes differ in their last bits


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A block that writes below a folder.

    Raises:
        StorageError: It cannot.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error}; free space or choose another folder"
        ) from None


def kept(
    path: Path, digest: str, make: Callable[[], dict[str, Any]], *, table: str | None = None
) -> dict[str, Any]:
    """What a file holds if it was made with the same digest, and its table lies beside it; else it is made."""
    found = finished(path, digest)
    if found is not None:
        show(f"retention {path.parent.name}/{path.stem}: finished before")
        return found
    made = make()
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"digest": digest, "found": made, "table": table})
    return made


def finished(path: Path, digest: str) -> dict[str, Any] | None:
    """What a file holds if it was made with this digest and nothing beside it is missing.

    Raises:
        ArtifactError: It is damaged.
    """
    if not path.is_file():
        return None
    written: dict[str, Any] = read_json(path)
    table = written["table"]
    if written["digest"] != digest or (table and not (path.parent / table).is_file()):
        return None
    found: dict[str, Any] = written["found"]
    return found


def digest_of(recipe: Recipe, adapter: Path | None, name: str) -> str:
    """sha256 of what answers depend on: model, adapter, files and settings."""
    found = recipe.retention.sets.get(name)
    settings = recipe.retention.model_dump(mode="json")
    asked = {key: settings[key] for key in (name, *_ASKED_WITH) if key in settings}
    if found is not None:
        for key in ("dir", "expected"):
            del asked[name][key]  # the same files are the same anywhere
    identity = {
        "asked": asked,
        "files": {} if found is None else found.digests(),
        "backbone": recipe.backbone.model_dump(mode="json"),
        "revision": revision_of(recipe),
        "adapter": adapter and file_sha256(adapter / ADAPTER_WEIGHTS),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def revision_of(recipe: Recipe) -> str:
    """Of the recipe's backbone."""
    return backbone_revision(recipe.backbone.name, recipe.backbone.revision)
