"""What names a resolved recipe, wherever its run lies."""

import hashlib
import json
from typing import Any

from pipelines.recipe import Recipe
from slq.backbones.loading import backbone_revision
from slq.files import file_sha256


def recipe_digest(recipe: Recipe, **others: Any) -> str:
    """sha256 of the settings and the backbone's revision, without what changes no figure of a study.

    Args:
        recipe: The resolved recipe.
        others: What a result depends on beside it.
    """
    left_out = {"storage", "index", "karr", "sweep", "serve"} - (
        {"index"} if recipe.train.negatives else set()
    )
    settings = recipe.model_dump(mode="json", exclude=left_out)
    del settings["resources"]["address"]
    if recipe.data.scenes is not None:
        del settings["data"]["dir"]  # generated files are the same anywhere
    else:
        others["files"] = [
            file_sha256(path)
            for name in ("train", "corpus", "queries", "relevance", "candidates")
            if (path := recipe.data.path(name)).is_file()
        ]
    revision = backbone_revision(recipe.backbone.name, recipe.backbone.revision)
    identity = {"recipe": settings, "revision": revision, **others}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def training_digest(recipe: Recipe) -> str:
    """sha256 of the settings that a training's time and memory depend on, more than what it learns does."""
    parts = {"backbone", "adapter", "train", "resources"}
    settings = recipe.model_dump(mode="json", include=parts)
    del settings["resources"]["address"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
