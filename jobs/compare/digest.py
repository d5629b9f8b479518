"""What names a resolved recipe, wherever its run lies."""

import hashlib
import json
from typing import Any

from pipelines.recipe import Recipe
from slq.backbones.loading import backbone_revision


def recipe_digest(recipe: Recipe, **others: Any) -> str:
    """sha256 of the settings and the backbone's revision, without what changes no figure of a study.

    Args:
        recipe: The resolved recipe.
        others: What a result depends on beside it.
    """
    settings = recipe.model_dump(mode="json", exclude={"storage", "index", "serve"})
    del settings["resources"]["address"]
    if recipe.data.scenes is not None:
        del settings["data"]["dir"]  # generated files are the same anywhere
    revision = backbone_revision(recipe.backbone.name, recipe.backbone.revision)
    identity = {"recipe": settings, "revision": revision, **others}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
