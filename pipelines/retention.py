"""What training left of the model's own skills: captions and match prompts, asked with an adapter loaded."""

from pathlib import Path
from typing import Any

from pipelines.loading import backbone_of, use_processors
from pipelines.recipe import Recipe
from pipelines.tasks import collect
from slq.artifacts import load_adapter
from slq.pretraining.config import PretrainConfig
from slq.pretraining.evaluation import accuracies_of


def retention(recipe: Recipe, adapter: Path | None, *, num_scenes: int) -> dict[str, Any]:
    """Measure the recipe's backbone, on the CPU in float32, in a Ray task whose process ends with it.

    Args:
        recipe: Names the backbone, which must be one of scenes, as `slq pretrain` makes them.
        adapter: Loaded into the backbone first, which LoRA and full fine-tuning change; None leaves it as it is.
        num_scenes: Held-out scenes to ask about.

    Returns:
        `match_accuracy` and `caption_accuracy` in 0..1, `weights_sha256` of the model as it was asked, and
        `weights_identical`: whether it has bit for bit the weights that it had before the adapter was loaded.

    Raises:
        ArtifactError: The adapter is missing or damaged.
        ArtifactMismatchError: It belongs to another backbone.
        ConfigError: The backbone is of an architecture that cannot be asked.
    """
    import ray

    # max_calls: the next adapter gets a new process, so neither memory nor a changed model is left behind
    task = ray.remote(num_cpus=1, max_calls=1)(measure)
    asked = task.remote(recipe.model_dump_json(), adapter, num_scenes)
    found: list[dict[str, Any]] = collect([asked], "retention")
    return found[0]


def measure(recipe_json: str, adapter: Path | None, num_scenes: int) -> dict[str, Any]:
    """`retention` in this process."""
    recipe = Recipe.model_validate_json(recipe_json)
    use_processors(recipe.eval.num_threads)
    section = recipe.backbone.model_copy(update={"device": "cpu", "dtype": "float32"})
    backbone = backbone_of(recipe.model_copy(update={"backbone": section}))
    before = backbone.weights_sha256()
    if adapter is not None:
        load_adapter(adapter, backbone)
    after = backbone.weights_sha256()
    found = accuracies_of(backbone, PretrainConfig(), num_scenes=num_scenes)
    return {**found, "weights_sha256": after, "weights_identical": before == after}
